"""What is kept of tensors that have been looked at: only while they lie where they lay, and never a tensor."""

import torch

from vilt_fast.ops import encoder
from vilt_fast.remembered import Known, Memory, once


def test_what_was_found_is_forgotten_when_a_tensor_moves():
    memory, tensors, asked = Memory(), [torch.randn(3), torch.randn(2, 2)], []

    def look(known):
        return once(known, "sum", lambda: asked.append(1) or len(asked))

    assert look(memory.of(tensors)) == look(memory.of(list(tensors))) == 1
    tensors[1].data = tensors[1].data.clone()
    assert look(memory.of(tensors)) == 2
    assert look(memory.of(tensors[:1])) == 3
    assert once(tensors, "sum", lambda: 7) == 7  # a plain list: nothing is kept


def test_parts_and_replaced_tensors_are_known_apart():
    tensors, copy = [torch.randn(3) for _ in range(4)], torch.zeros(5)
    known = Memory().of(tensors)
    part = known.part("odd", [1, 3])
    assert part[0] is tensors[1] and part[1] is tensors[3] and part.found is known.part("odd", [1, 3]).found
    one, again = known.replaced("int8", {2: copy}), known.replaced("int8", {2: copy})
    assert one[2] is copy and one[1] is tensors[1] and one.found is again.found is not known.found
    assert known.replaced("int8", {2: copy.clone()}).found is not one.found
    assert known[2] is tensors[2]


def test_nothing_that_is_kept_is_a_tensor():
    """After a call: a weight that its owner has let go is free."""
    width, kept = 32, {}
    parameters = [torch.randn(*s) for s in ([width],) * 2 + ([width, width], [width]) * 4 + ([width],) * 2]
    parameters += [torch.randn(*s) for s in ([64, width], [64], [width, 64], [width])]
    x, ends = torch.randn(5, width), torch.tensor([0, 5], dtype=torch.int32)
    known = Known(parameters, kept)
    want = encoder.encoder(x, parameters, ends, ends[1:], 5, num_heads=2, eps=[1e-6] * 2)
    for _ in range(2):
        got = encoder.encoder(x, known, ends, ends[1:], 5, num_heads=2, eps=[1e-6] * 2)
        assert torch.equal(got, want)

    def leaves(value):
        if isinstance(value, dict):
            value = [*value.keys(), *value.values()]
        return [leaf for v in value for leaf in leaves(v)] if isinstance(value, list | tuple | set) else [value]

    assert kept and not any(isinstance(leaf, torch.Tensor) for leaf in leaves(kept))

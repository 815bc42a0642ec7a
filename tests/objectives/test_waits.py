"""Nothing in a training step waits for the device, but for the masks that a plan is made from.

Played on the CPU: parameters and the batch count as a GPU's, and so does whatever is computed from them. What would
have to bring one of their values to the host, or to count them to know how large a result is, is refused. What an op's
launcher does is not looked at: a GPU has others.
"""

import pytest
import torch
from support import finetuning
from support import objectives as written
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import ViltForMaskedLM

import vilt_fast
from vilt_fast import objectives
from vilt_fast.models.vilt import inputs, states, tasks
from vilt_fast.models.vilt.plan import SequencePlan
from vilt_fast.objectives import MaskedPatchHead
from vilt_fast.ops import _check, registry

aten = torch.ops.aten
#: What knows its result, or how large it is, only from values.
WAITS = {
    aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten.bincount,
    aten._unique, aten._unique2, aten.unique_dim, aten.unique_consecutive,
}  # fmt: skip
PICKS = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}


class Device(TorchDispatchMode):
    """While it is entered, what is computed from `tensors` lies on a device that nobody may wait for."""

    def __init__(self, tensors):
        super().__init__()
        self.storages = {}  # kept: memory that is free again would be somebody else's
        self.computed = 0
        self.take(tensors)

    def take(self, tree):
        for tensor in tree_leaves(tree):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage.data_ptr()] = storage

    def has(self, tensor):
        return isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() in self.storages

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(map(self.has, tree_leaves((args, kwargs)))):
            packet, self.computed = op.overloadpacket, self.computed + 1
            picked = args[1] if packet in PICKS else ()
            assert packet not in WAITS, f"{op} waits for the device"
            assert not any(self.has(i) and i.dtype in (torch.bool, torch.uint8) for i in picked), (
                f"{op} by a mask waits"
            )
            result = op(*args, **kwargs)
            self.take(result)
            return result
        return op(*args, **kwargs)


def cases():
    given = written.batch(torch.float32)
    learner = written.build(objectives.ViltForPreTraining, torch.float32, hidden_dropout_prob=0.1)
    yield "pre-training", learner, given, objectives.pretraining_loss
    yield (
        "apart",
        learner,
        given,
        lambda model, batch: objectives.mlm_loss(model, batch) + objectives.itm_loss(model, batch),
    )
    count = int((given["labels"] != -100).sum())
    soft = given | {"soft_labels": torch.full((count, 50), 1 / 50)}
    yield "soft labels", learner, soft, objectives.mlm_loss
    for task, loss in finetuning.LOSSES.items():
        yield task, finetuning.build(task, torch.float32), finetuning.batch(task, torch.float32), loss
    for form in ("classes", "pixels", "features"):
        model = written.build(ViltForMaskedLM, torch.float32)
        model.mpp_score = MaskedPatchHead(model.config, form)
        yield form, model, given, objectives.mpp_loss


CASES = {name: rest for name, *rest in cases()}


@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_for_nothing(case, monkeypatch):
    for module in (_check, inputs, states, tasks):
        monkeypatch.setattr(module, "readable", lambda tensor: False)  # as of a GPU's
    launcher, from_masks, from_keep_mask = registry.launcher, SequencePlan.from_masks, SequencePlan.from_keep_mask

    def planned(make):
        def call(*masks, **given):
            with _disable_current_modes():  # masks are brought to the host here, and nothing else
                plan = make(*masks, **given)
            played.take(list(vars(plan).values()))
            return plan

        return staticmethod(call)

    def unseen(op, backend):
        launch = launcher(op, backend)

        def call(**arguments):
            with _disable_current_modes():
                result = launch(**arguments)
            played.take(result)
            return result

        return call

    monkeypatch.setattr(registry, "launcher", unseen)
    monkeypatch.setattr(SequencePlan, "from_masks", planned(from_masks))
    monkeypatch.setattr(SequencePlan, "from_keep_mask", planned(from_keep_mask))
    model, batch, loss = CASES[case]
    model = vilt_fast.accelerate(model.train())
    model.zero_grad()
    played = Device([list(model.parameters()), list(model.buffers()), list(batch.values())])
    with played:
        value = loss(model, batch)
        (value if isinstance(value, torch.Tensor) else value.loss).backward()
    assert played.computed > 100 and any(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("what", [lambda t: t.unique(), lambda t: t[t > 0], lambda t: (t + 1)[0].item(), torch.nonzero])
def test_what_waits_is_found(what):
    tensor = torch.arange(3)
    with Device([tensor]), pytest.raises(AssertionError, match="waits"):
        what(tensor)

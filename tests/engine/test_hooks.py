"""The packed forward of modules that somebody listens to or has replaced."""

import copy

import pytest
import torch
from support.models import (
    EXTRAS,
    TEXT,
    assert_close,
    assert_follows,
    assert_same_output,
    assert_same_structure,
    assert_same_where_real,
    batch,
    build,
    call,
    changed,
    compare,
    leaves,
    only_real,
    pair,
    real_positions,
    trunk_of,
)
from torch import nn

import vilt_fast

# --- somebody listens -------------------------------------------------------------------------------------------------

PLACES = [
    "",
    "embeddings",
    "embeddings.text_embeddings",
    "embeddings.text_embeddings.word_embeddings",
    "embeddings.patch_embeddings.projection",
    "embeddings.dropout",
    "encoder",
    "encoder.layer.1",
    "encoder.layer.1.attention.attention.query",
    "encoder.layer.1.output",
    "encoder.layer.2.layernorm_after",
    "layernorm",
    "pooler",
    "pooler.dense",
]


def watch(model, place, seen, *, change=0):
    """Forward and pre-forward hooks on a module that note the shapes they see; `change` is added to what it returns."""
    module = trunk_of(model).get_submodule(place) if place is not None else model

    def shapes(value):
        return [tuple(t.shape) for _, t in leaves(value) if torch.is_tensor(t)]

    def before(module, args, kwargs):
        seen.append(("before", shapes(args), sorted(k for k, v in kwargs.items() if torch.is_tensor(v))))

    def after(module, args, output):
        seen.append(("after", shapes(output)))
        if not change:
            return None
        if torch.is_tensor(output):
            return output + change
        if isinstance(output, tuple):
            return (output[0] + change, *output[1:])
        output[next(iter(output))] = output[0] + change
        return output

    return [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["trunk", "masked_lm", "nlvr2", "question_answering"])
def test_hooks_fire_as_in_the_reference_and_are_honoured(kind, place, padded):
    theirs, ours = pair(kind)
    inputs = batch(kind)
    if not padded:
        inputs |= {k: torch.ones_like(inputs[k]) for k in ("attention_mask", "pixel_mask")}
    masks = real_positions(theirs, inputs)
    seen = ([], [])
    handles = [watch(m, place, s, change=0.25) for m, s in zip((theirs, ours), seen, strict=True)]
    for flags in ({}, EXTRAS):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                expected, actual = call(theirs, inputs, **flags), call(ours, inputs, **flags)
            # A hook that adds to padded positions too makes the task's own head see them: nothing to be zero there.
            assert_same_structure(actual, expected)
            assert_same_where_real(kind, actual, expected, masks)
    assert seen[0] and seen[0] == seen[1]
    for handle in sum(handles, []):
        handle.remove()
    assert_same_output(kind, call(ours, inputs), call(theirs, inputs), masks)


@pytest.mark.parametrize("kind", ["masked_lm", "token_classification", "question_answering", "nlvr2", "retrieval"])
def test_hooks_on_heads(kind):
    theirs, ours = pair(kind)
    inputs = batch(kind)
    seen = ([], [])
    name = {"masked_lm": "mlm_score", "retrieval": "rank_output"}.get(kind, "classifier")
    for model, notes in zip((theirs, ours), seen, strict=True):
        for module in [getattr(model, name), *getattr(model, name).children()]:
            module.register_forward_hook(
                lambda m, a, out, notes=notes: (notes.append((tuple(a[0].shape), tuple(out.shape))), out * 1.5)[1]
            )
    masks = real_positions(theirs, inputs)
    outputs = [only_real("logits", call(m, inputs).logits, masks, kind)[0] for m in (ours, theirs)]
    assert_close(*outputs)
    assert seen[0] and seen[0] == seen[1]


@pytest.mark.parametrize("kind", ["trunk", "masked_lm", "nlvr2"])
def test_global_hooks(kind):
    theirs, ours = pair(kind)
    inputs = batch(kind)
    names = [{id(m): name for name, m in model.named_modules()} for model in (theirs, ours)]
    counts = []
    masks = real_positions(theirs, inputs)
    outputs = []
    for model, name in zip((theirs, ours), names, strict=True):
        seen = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, a, out, seen=seen, name=name: seen.append(name.get(id(m), type(m).__name__))
        )
        try:
            outputs.append(call(model, inputs, **EXTRAS))
        finally:
            handle.remove()
        counts.append(sorted(seen))
    assert counts[0] and counts[0] == counts[1]
    assert_same_where_real(kind, *reversed(outputs), masks)


@pytest.mark.parametrize("place", [p for p in PLACES if not p.startswith("embeddings.text_embeddings.w")])
@pytest.mark.parametrize("kind", ["trunk", "nlvr2"])
def test_backward_hooks(kind, place):
    theirs, ours = pair(kind)
    seen = ([], [])
    inputs = batch(kind)
    for model, notes in zip((theirs, ours), seen, strict=True):

        def note(module, grad_input, grad_output, notes=notes):
            notes.append(([g is not None and tuple(g.shape) for g in grad_output], len(grad_input)))

        trunk_of(model).get_submodule(place).register_full_backward_hook(note)
        output = call(model, inputs)
        (output.pooler_output if kind == "trunk" else output.logits).sum().backward()
    assert seen[0] == seen[1]
    assert seen[0] or place in ("", "encoder")  # which return no tensors but an output object


def test_the_generator_stands_where_the_reference_leaves_it_with_hooks_too():
    theirs, ours = pair("trunk", max_image_length=7)
    after = []
    for model in (theirs, ours):
        model.embeddings.register_forward_hook(lambda *_: None)
        call(model, batch("trunk"))
        after.append(torch.rand(1))
    assert torch.equal(*after)


@pytest.mark.parametrize("length", [-1, 7])
@pytest.mark.parametrize("place", ["embeddings", "encoder", "layernorm"])
def test_raster_order_with_hooks(place, length):
    """Hooked modules see the reference's own order; what comes out is in raster order all the same."""
    plain = vilt_fast.accelerate(build("trunk", max_image_length=-1))
    hooked = vilt_fast.accelerate(build("trunk", max_image_length=length))
    seen = []
    watch(hooked, place, seen)
    inputs = batch("trunk")
    out = call(hooked, inputs, **EXTRAS)
    assert seen
    if length == -1:
        for (path, a), (_, b) in zip(leaves(out), leaves(call(plain, inputs, **EXTRAS)), strict=True):
            assert_close(a, b, path)


# --- somebody has replaced something ----------------------------------------------------------------------------------


class Shifted(nn.Module):
    """Wraps any module and adds a quarter to what it returns."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        output = self.inner(*args, **kwargs)
        return (output[0] + 0.25, *output[1:]) if isinstance(output, tuple) else output + 0.25


#: the reference itself reads the attributes of the others
REPLACEABLE = [p for p in PLACES if p not in ("", "encoder", "embeddings.patch_embeddings.projection")]


@pytest.mark.parametrize("place", REPLACEABLE)
@pytest.mark.parametrize("kind", ["trunk", "masked_lm", "nlvr2"])
def test_replaced_modules_are_honoured(kind, place):
    theirs, ours = pair(kind)
    inputs = batch(kind)
    for model in (theirs, ours):
        parent, _, name = place.rpartition(".")
        holder = trunk_of(model).get_submodule(parent)
        holder._modules[name] = Shifted(holder._modules[name])
    assert_follows(kind, (theirs, ours), inputs)


@pytest.mark.parametrize("place", [p for p in PLACES if p])
@pytest.mark.parametrize("kind", ["trunk", "masked_lm", "nlvr2"])
def test_a_forward_of_ones_own_on_an_instance_is_honoured(kind, place):
    theirs, ours = pair(kind)
    inputs = batch(kind)
    for model in (theirs, ours):
        module = trunk_of(model).get_submodule(place)

        def forward(*args, own=module.forward, **kwargs):
            output = own(*args, **kwargs)
            if torch.is_tensor(output):
                return output + 0.25
            if isinstance(output, tuple):
                return (output[0] + 0.25, *output[1:])
            output["last_hidden_state"] = output["last_hidden_state"] + 0.25
            return output

        module.forward = forward
    assert_follows(kind, (theirs, ours), inputs)


def test_a_pooler_that_looks_at_more_than_the_first_token():
    class Mean(nn.Module):
        def forward(self, hidden):
            return hidden.mean(1)

    dense = changed(attention_mask=None, pixel_mask=None)
    compare(dense, change=lambda model: setattr(model, "pooler", Mean()))


def test_heads_that_look_across_tokens():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = nn.Linear(32, 50, dtype=torch.float64)
            nn.init.constant_(self.dense.weight, 0.1)
            nn.init.zeros_(self.dense.bias)

        def forward(self, hidden):
            return self.dense(hidden + hidden.mean(1, keepdim=True))

    for kind, name in (("masked_lm", "mlm_score"), ("token_classification", "classifier")):
        theirs, ours = pair(kind)
        setattr(theirs, name, Mixing()), setattr(ours, name, Mixing())
        inputs = batch(kind) | {"attention_mask": torch.ones(4, TEXT)}
        assert_close(call(ours, inputs).logits, call(theirs, inputs).logits)


def test_visual_embed_replaced_on_the_instance():
    theirs, ours = pair("trunk")
    for model in (theirs, ours):
        own = model.embeddings.visual_embed
        model.embeddings.visual_embed = lambda *a, own=own, **k: (own(*a, **k)[0] * 2, *own(*a, **k)[1:])
    inputs = batch("trunk")
    torch.manual_seed(3)
    ours_out, theirs_out = call(ours, inputs), call(theirs, inputs)
    assert_close(ours_out.pooler_output, theirs_out.pooler_output)


def test_replaced_embedding_tables():
    for change in (
        lambda m: m.set_input_embeddings(
            nn.Embedding(60, 32, dtype=torch.float64, _weight=torch.ones(60, 32).double())
        ),
        lambda m: m.set_input_embeddings(nn.Embedding(50, 32, max_norm=1.0, _weight=torch.ones(50, 32).double())),
        lambda m: m.resize_token_embeddings(70, mean_resizing=False),
    ):

        def seeded(model, change=change):
            torch.manual_seed(0)
            change(model)
            model.double()

        compare(changed(input_ids=torch.randint(0, 50, (4, TEXT))), change=seeded)


def test_concurrent_calls_do_not_disturb_each_other():
    from concurrent.futures import ThreadPoolExecutor

    ours = vilt_fast.accelerate(build("trunk", torch.float32))
    hooked = copy.deepcopy(ours)
    hooked.embeddings.register_forward_hook(lambda *_: None)
    batches = [batch("trunk", torch.float32, seed=s) for s in range(6)]

    def run(model, inputs):
        with torch.no_grad():
            return model(**inputs).pooler_output

    expected = [run(ours, b) for b in batches]
    with ThreadPoolExecutor(4) as pool:
        for model in (ours, hooked):
            for mine, other in zip(pool.map(lambda b, m=model: run(m, b), batches * 3), expected * 3, strict=True):
                torch.testing.assert_close(mine, other)

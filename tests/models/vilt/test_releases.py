"""What releases of transformers do differently, each as the installed one does it: the plain model is asked, no number.

`make core` runs these and a few others on the oldest transformers, one in the middle and the installed one.
"""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from support.models import (
    EXTRAS,
    KINDS,
    as_dtype,
    assert_close,
    assert_same_gradients,
    assert_same_output,
    assert_same_structure,
    assert_same_where_real,
    batch,
    build,
    call,
    gradients,
    labels,
    only_real,
    pair,
    real_positions,
    trunk_of,
)
from torch import nn

import vilt_fast
from vilt_fast.testing import assert_within_budget

pytestmark = pytest.mark.core
TASKS = [kind for kind in KINDS if not kind.startswith("trunk")]


def assert_same_real(kind, ours, theirs, inputs, *, model, **flags):
    """Both models agree on real positions, with gradients and without; padding is 0 only where it is not computed."""
    masks = real_positions(model, inputs)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            mine, other = call(ours, inputs, **flags), call(theirs, inputs, **flags)
        assert_same_structure(mine, other)
        assert_same_where_real(kind, mine, other, masks)


def assert_same_backward(kind, ours, theirs):
    found = []
    for model in (ours, theirs):
        model.zero_grad()
        wanted = labels(kind)
        output = call(model, batch(kind), **({} if wanted is None else {"labels": wanted}))
        (output[0] if wanted is not None else (output.get("pooler_output", output[0])).square().sum()).backward()
        found.append(gradients(model))
    assert_same_gradients(*found)
    assert any(g is not None and g.any() for g in found[0].values())


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_block_of_every_class_is_native(native_blocks, kind, quantize):
    model = vilt_fast.accelerate(build(kind, torch.float32), quantize=quantize)
    with torch.no_grad():
        model(**batch(kind, torch.float32))
    assert native_blocks == [quantize or "float32"] * 3


@pytest.mark.parametrize("kind", TASKS)
def test_gradients(kind):
    theirs, ours = pair(kind)
    assert_same_backward(kind, ours, theirs)


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["trunk", *TASKS])
def test_arguments_by_place(kind):
    theirs, ours = pair(kind)
    given = batch(kind) | {"return_dict": True, "output_hidden_states": True}
    names = [n for n, p in inspect.signature(theirs.forward).parameters.items() if p.kind != p.VAR_KEYWORD]
    placed = [given.get(name) for name in names]
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        outputs.append(model(*placed))
    assert_same_output(kind, *outputs, real_positions(theirs, batch(kind)))
    assert_close(outputs[0][0], call(ours, given)[0])


@pytest.mark.parametrize("kind", ["trunk", "masked_lm", "nlvr2"])
def test_arguments_that_it_has_not(kind):
    """Refused or ignored, the count of a Trainer that accumulates too: as the plain model has it."""
    theirs, ours = pair(kind)
    inputs = batch(kind)
    if labels(kind) is not None:
        inputs["labels"] = labels(kind)
    assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)
    more = {"colour": "red"}, {"num_items_in_batch": torch.tensor(3)}
    for args, kwargs in (*(([], one) for one in more), ([inputs["input_ids"]], {}), ([None] * 20, {})):
        outcomes = []
        for model in (ours, theirs):
            try:
                torch.manual_seed(3)
                outcomes.append(model(*args, **inputs, **kwargs)[0])
            except TypeError as error:
                outcomes.append(str(error))
        assert type(outcomes[0]) is type(outcomes[1])
        if isinstance(outcomes[0], str):
            assert outcomes[0] == outcomes[1]
        elif "labels" in inputs:  # the loss
            assert_close(*outcomes)


@pytest.mark.parametrize("kind", ["trunk", *TASKS])
def test_masked_heads(kind):
    theirs, ours = pair(kind)
    head_mask = torch.ones(3, 4, dtype=torch.float64)
    head_mask[0, 1] = head_mask[2, 2:] = 0
    assert_same_real(kind, ours, theirs, batch(kind), model=theirs, head_mask=head_mask, **EXTRAS)
    if "head_mask" in inspect.signature(theirs.forward).parameters:
        plain, masked = (call(ours, batch(kind), head_mask=mask)[0] for mask in (None, head_mask))
        assert not torch.allclose(plain, masked)


@pytest.mark.parametrize("kind", ["trunk", "masked_lm", "nlvr2"])
def test_outputs_for_torchscript(kind):
    """Tuples where the config of transformers 4 says so."""
    theirs, ours = pair(kind)
    for model in (theirs, ours):
        for module in {model, trunk_of(model)}:
            module.config.torchscript = True
    assert_same_structure(call(ours, batch(kind)), call(theirs, batch(kind)))


# --- blocks -----------------------------------------------------------------------------------------------------------


def prune(model, layer, heads):
    """Heads taken out as transformers 4 does it, in place."""
    if hasattr(model, "prune_heads"):
        model.prune_heads({layer: heads})
        return
    attention = trunk_of(model).encoder.layer[layer].attention
    own = attention.attention
    size = own.attention_head_size
    kept = torch.tensor([h * size + i for h in range(own.num_attention_heads) if h not in heads for i in range(size)])
    for holder, name, dim in ((own, "query", 0), (own, "key", 0), (own, "value", 0), (attention.output, "dense", 1)):
        old = getattr(holder, name)
        weight, bias = old.weight.detach().index_select(dim, kept), old.bias.detach()
        new = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
        with torch.no_grad():
            new.weight.copy_(weight)
            new.bias.copy_(bias if dim else bias[kept])
        setattr(holder, name, new)
    own.num_attention_heads -= len(heads)
    own.all_head_size = own.num_attention_heads * size


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("kind", ["trunk", "masked_lm"])
def test_pruned_heads(native_blocks, kind, before):
    theirs, ours = pair(kind)
    if before:
        vilt_fast.restore(ours)
    for model in (theirs, ours):
        prune(model, 1, {0, 2})
        model.double()  # transformers makes the smaller layers in float32
    if before:
        vilt_fast.accelerate(ours, patch_order="reference")
    assert_same_real(kind, ours, theirs, batch(kind), model=theirs, **EXTRAS)
    assert_same_backward(kind, ours, theirs)
    assert trunk_of(ours).encoder.layer[1].attention.attention.query.weight.shape == (16, 32)
    native_blocks.clear()
    single = copy.deepcopy(theirs).float()
    small = vilt_fast.accelerate(copy.deepcopy(single), patch_order="reference")
    exact, masks = copy.deepcopy(single).double(), real_positions(theirs, batch(kind))
    inputs = batch(kind, torch.float32)
    with torch.no_grad():
        outputs = [
            call(m, given)[0]
            for m, given in ((small, inputs), (single, inputs), (exact, as_dtype(inputs, torch.float64)))
        ]
    assert native_blocks == ["float32"] * 2, "all but the one whose heads are fewer"
    assert_within_budget(
        *(only_real("logits" if kind == "masked_lm" else "last_hidden_state", o, masks, kind)[0] for o in outputs)
    )


def shift(module, args, output):
    """A hook on a layer, which in some releases returns a tensor and in others a tuple."""
    return (output[0] + 0.25, *output[1:]) if isinstance(output, tuple) else output + 0.25


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(model):
    trunk_of(model).encoder.layer[1].register_forward_hook(shift)


def replaced(model):
    output = trunk_of(model).encoder.layer[1].output
    new = Doubled(64, 32, dtype=torch.float64)
    new.load_state_dict(output.dense.state_dict())
    output.dense = new


def hooked_encoder(model):
    trunk_of(model).encoder.register_forward_pre_hook(lambda *_: None)


def no_positions(model):  # transformers 4 leaves them out then
    trunk_of(model).embeddings.text_embeddings.position_embedding_type = "relative_key"


@pytest.mark.parametrize("change", [hooked, replaced, hooked_encoder, no_positions])
@pytest.mark.parametrize("kind", ["trunk", *TASKS])
def test_modules_that_are_called_as_they_are(kind, change):
    theirs, ours = pair(kind)
    for model in (theirs, ours):
        change(model)
    assert_same_real(kind, ours, theirs, batch(kind), model=theirs, **EXTRAS)
    assert_same_backward(kind, ours, theirs)


def arguments_of_layer(model, inputs, flags):
    """What the middle layer is called with, by name; and how many of these came by place, as a hook sees it."""
    layer, seen = model.encoder.layer[1], []
    handle = layer.register_forward_pre_hook(lambda module, *given: seen.append(given), with_kwargs=True)
    call(model, inputs, **flags)
    handle.remove()
    bound = inspect.signature(layer.forward).bind(*seen[0][0], **seen[0][1])
    bound.apply_defaults()
    return bound.arguments | {"by place": len(seen[0][0])}


@pytest.mark.parametrize("padded", [True, False])
def test_a_layer_is_given_what_the_encoder_gives_it(padded):
    theirs, ours = pair("trunk")
    inputs = batch("trunk")
    if not padded:
        inputs |= {k: torch.ones_like(inputs[k]) for k in ("attention_mask", "pixel_mask")}
    masks = real_positions(theirs, inputs)[0]
    for flags in ({}, EXTRAS):
        seen = mine, other = [arguments_of_layer(model, inputs, flags) for model in (ours, theirs)]
        assert mine.keys() == other.keys()
        assert_close(*(torch.where(masks[..., None], given.pop("hidden_states"), 0) for given in seen))
        mine_mask, other_mask = (given.pop("attention_mask") for given in seen)
        assert (mine_mask is None) == (other_mask is None)
        if mine_mask is not None:
            assert torch.equal(mine_mask, other_mask)
        assert {k: v or None for k, v in mine.items()} == {k: v or None for k, v in other.items()}


class Counting(nn.Module):
    """An activation that notes its calls."""

    def __init__(self, inner, calls):
        super().__init__()
        self.inner, self.calls = inner, calls

    def forward(self, x):
        self.calls.append(torch.is_grad_enabled())
        return self.inner(x)


@pytest.mark.filterwarnings("ignore:.*use_reentrant")
@pytest.mark.parametrize("kind", ["trunk", "masked_lm"])
def test_checkpointing(kind):
    theirs, ours = pair(kind)
    outcomes = []
    for model in (ours, theirs):
        calls = []
        for layer in trunk_of(model).encoder.layer:
            layer.intermediate.intermediate_act_fn = Counting(layer.intermediate.intermediate_act_fn, calls)
        model.train().gradient_checkpointing_enable()
        call(model, batch(kind))[0][0, :5].square().sum().backward()
        outcomes.append((gradients(model), len(calls)))
    assert_same_gradients(outcomes[0][0], outcomes[1][0])
    assert outcomes[0][1] == outcomes[1][1] == 2 * 3


def test_an_encoder_by_itself():
    theirs = build("trunk")

    class Own(type(theirs)):
        def forward(self, **inputs):
            pixels = inputs.pop("pixel_values"), inputs.pop("pixel_mask")
            rows, mask = self.embeddings(
                inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"], *pixels, None, None
            )
            mask = (1.0 - mask[:, None, None].to(rows.dtype)) * torch.finfo(rows.dtype).min
            encoded = self.encoder(rows, attention_mask=mask, output_hidden_states=True, return_dict=True)
            return self.layernorm(encoded[0]), encoded.hidden_states[1], mask

    theirs.__class__ = Own
    ours = vilt_fast.accelerate(copy.deepcopy(theirs))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            (a, a1, mask), (b, b1, _) = (call(model, batch("trunk")) for model in (ours, theirs))
        real = (mask[:, 0, 0] == 0) & (mask[:, 0, 0] == 0).any(1, keepdim=True)
        for mine, other in ((a, b), (a1, b1)):
            assert_close(torch.where(real[..., None], mine, 0), torch.where(real[..., None], other, 0))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_restore(duplicate, tmp_path):
    theirs, ours = pair("masked_lm")
    inputs = batch("masked_lm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, mine = call(theirs, inputs).logits, call(ours, inputs).logits
        other = duplicate(ours)
        assert torch.equal(call(other, inputs).logits, mine)
        ours.save_pretrained(tmp_path)
        loaded = type(theirs).from_pretrained(tmp_path).double().eval()
        pairs = zip(loaded.state_dict().values(), theirs.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert torch.equal(call(vilt_fast.restore(other), inputs).logits, expected)

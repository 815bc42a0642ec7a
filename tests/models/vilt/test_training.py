"""Gradients, dropout, checkpointing and optimizer steps against HuggingFace's own."""

import contextlib
import copy

import pytest
import torch
from support.models import (
    KINDS,
    TEXT,
    as_dtype,
    assert_close,
    assert_same_gradients,
    batch,
    build,
    call,
    gradients,
    labels,
    leaves,
    only_real,
    pair,
    real_positions,
    trunk_of,
)
from torch import nn

import vilt_fast
from vilt_fast.models.vilt import known
from vilt_fast.testing import assert_within_budget

EXTRAS = {"output_hidden_states": True, "output_attentions": True}


def loss_of(kind, model, inputs, masks, **flags):
    """The model's own loss where it has one, else random weights on every output, real positions only."""
    wanted = labels(kind, next(model.parameters()).dtype)
    output = call(model, inputs, **({} if wanted is None else {"labels": wanted}), **flags)
    draw = torch.Generator().manual_seed(9)
    total = output.loss if wanted is not None else 0
    for path, tensor in leaves(output):
        if tensor is not None and path != "loss":
            real, _ = only_real(path, tensor, masks, kind)
            weight = torch.randn(real.shape, generator=draw, dtype=torch.float64)
            total = total + (real * weight.to(real.dtype)).sum() / real.numel()
    return total


def backward(kind, model, inputs, masks, **flags):
    """Gradients of all parameters and of the floating inputs, by name."""
    model.zero_grad()
    given = {k: v.clone().requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()}
    loss_of(kind, model, given, masks, **flags).backward()
    result = gradients(model) | {k: v.grad for k, v in given.items() if v.is_floating_point()}
    model.zero_grad()
    return result


def compare(kind, inputs=None, *, train=False, change=None, **flags):
    theirs, ours = pair(kind)
    inputs = inputs or batch(kind)
    masks = real_positions(theirs, inputs)
    found = []
    for model in (ours, theirs):
        model.train(train)
        if change:
            change(model)
        found.append(backward(kind, model, inputs, masks, **flags))
    assert_same_gradients(*found)
    return found[0]


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("text", "image"), [("ids", "pixels"), ("embeds", "pixels"), ("ids", "embeds"), ("embeds", "embeds")]
)
def test_every_gradient(kind, train, text, image):
    found = compare(kind, batch(kind, text=text, image=image), train=train)
    named = "inputs_embeds" if text == "embeds" else "pixel_values" if image == "pixels" else "image_embeds"
    assert found[named].any()
    assert sum(g is not None and bool(g.any()) for g in found.values()) > 40


@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_through_extras(kind):
    compare(kind, **EXTRAS)


@pytest.mark.parametrize("length", [1, 7])
def test_gradients_with_sampled_patches(length):
    theirs, ours = pair("trunk", max_image_length=length)
    masks = real_positions(theirs, batch("trunk"))
    assert_same_gradients(*(backward("trunk", m, batch("trunk"), masks) for m in (ours, theirs)))


def test_gradients_without_padding():
    inputs = {k: v for k, v in batch("trunk").items() if k not in ("attention_mask", "pixel_mask")}
    compare("trunk", inputs)


def test_gradients_of_pixels_in_padding_are_zero():
    found = compare("trunk", change=lambda model: None)
    mask = batch("trunk")["pixel_mask"]
    assert not found["pixel_values"].masked_select((mask == 0)[:, None]).any()


def test_the_padding_row_gets_no_gradient():
    inputs = batch("trunk")
    inputs["input_ids"][0, 3] = 7  # a real token, by the mask
    for padding_idx in (None, 7):

        def change(model, padding_idx=padding_idx):
            model.embeddings.text_embeddings.word_embeddings.padding_idx = padding_idx

        found = compare("trunk", inputs, change=change)["embeddings.text_embeddings.word_embeddings.weight"]
        assert found.any() and bool(found[7].any()) == (padding_idx is None)


def test_frozen_parameters():
    def freeze(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layer.1" in name or "layernorm_after" in name or "position" in name)

    found = compare("masked_lm", change=freeze)
    assert found["vilt.encoder.layer.0.attention.attention.query.weight"] is None
    assert found["vilt.encoder.layer.1.attention.attention.query.weight"].any()
    compare("trunk", change=lambda model: model.requires_grad_(False) and model.pooler.requires_grad_(True))
    compare("nlvr2", change=lambda model: model.vilt.requires_grad_(False))


def test_only_the_inputs_require_gradients():
    compare("trunk", batch("trunk", text="embeds"), change=lambda model: model.requires_grad_(False))


@pytest.mark.parametrize("kind", ["masked_lm", "nlvr2", "question_answering"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_of_other_dtypes_stay_within_the_reference_budget(kind, dtype, autocast):
    theirs, ours = pair(kind, dtype)
    exact = build(kind, dtype).double()
    rows = []
    for seed in range(2):
        inputs = batch(kind, dtype, seed=seed)
        masks = real_positions(theirs, inputs)
        context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
        with context:
            mine, other = (backward(kind, m, inputs, masks) for m in (ours, theirs))
        right = backward(kind, exact, as_dtype(inputs, torch.float64), masks)
        for name, gradient in right.items():
            if gradient is not None and mine[name] is not None:
                rows.append((mine[name], other[name], gradient))
    # All together, as an optimizer takes them: a bias of eight numbers says nothing about an error.
    mine, other, right = (torch.cat([t.flatten() for t in tensors]) for tensors in zip(*rows, strict=True))
    assert_within_budget(mine, other, right, what="all gradients")


@pytest.mark.parametrize("kind", ["masked_lm", "nlvr2", "question_answering", "token_classification"])
def test_training_for_a_few_steps(kind):
    """The same weights after five Adam steps: gradients, tied weights and what follows an in-place update."""
    theirs, ours = pair(kind)
    inputs = batch(kind)
    masks = real_positions(theirs, inputs)
    for model in (theirs, ours):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            loss_of(kind, model, inputs, masks).backward()
            optimizer.step()
        model.eval()
    for (name, mine), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert_close(mine, other, name)
    if kind == "masked_lm":
        assert ours.mlm_score.decoder.weight is ours.vilt.embeddings.text_embeddings.word_embeddings.weight


# --- dropout ----------------------------------------------------------------------------------------------------------

DROPOUTS = [{"hidden_dropout_prob": 0.3}, {"attention_probs_dropout_prob": 0.3}]


@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("kind", ["trunk", "nlvr2", "token_classification", "masked_lm"])
@pytest.mark.parametrize("flags", [{}, {"output_attentions": True}])
def test_dropout_is_live_in_training_only(kind, dropout, flags):
    theirs, ours = pair(kind, **dropout)
    inputs = batch(kind)

    def run(model, seed=3):
        return call(model, inputs, seed=seed, **flags)[0]

    masks = real_positions(theirs, inputs)
    first = next(path for path, _ in leaves(call(theirs, inputs)))
    assert_close(run(ours), only_real(first, run(theirs), masks, kind)[0])
    ours.train()
    assert torch.equal(run(ours, 1), run(ours, 1))
    assert not torch.equal(run(ours, 1), run(ours, 2))
    for module in ours.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert_close(run(ours), only_real(first, run(theirs), masks, kind)[0])


@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("kind", ["trunk", "nlvr2"])
def test_dropout_has_the_statistics_of_the_reference(kind, dropout):
    """Means and spreads over many draws, each within five standard errors of the reference's."""
    theirs, ours = pair(kind, torch.float32, num_hidden_layers=1, **dropout)
    inputs = {k: v[:2] for k, v in batch(kind, torch.float32).items()}
    draws = []
    for model in (ours, theirs):
        model.train()
        with torch.no_grad():
            outputs = [call(model, inputs, seed=100 + s) for s in range(300)]
        values = [o.pooler_output if kind == "trunk" else o.logits for o in outputs]
        draws.append(torch.stack(values).flatten(1).double())
    mine, other = draws
    error = ((mine.var(0) + other.var(0)) / len(mine)).sqrt()
    assert ((mine.mean(0) - other.mean(0)).abs() <= 5 * error).all()
    spread = mine.var(0).sum() / other.var(0).sum()
    assert 1 / 1.5 < spread < 1.5 and other.var(0).sum() > 0


def test_dropout_masks_differ_between_the_images_of_nlvr2():
    """The text is embedded once in evaluation; in training each image has its own mask, as in the reference."""
    _, ours = pair("nlvr2", hidden_dropout_prob=0.5)
    inputs = batch("nlvr2")
    for name in ("pixel_values", "pixel_mask"):
        inputs[name] = torch.stack([inputs[name][:, 0]] * 2, 1)
    hidden = call(ours.train(), inputs, output_hidden_states=True).hidden_states
    text = inputs["attention_mask"] != 0
    modality = ours.vilt.embeddings.token_type_embeddings.weight
    first, second = (h[0][:, :TEXT][text] - modality[0] for h in hidden)
    zero = (first.abs() < 1e-9, second.abs() < 1e-9)
    assert 0.4 < zero[0].double().mean() < 0.6 and not torch.equal(*zero)


@pytest.mark.parametrize("module", ["embeddings.text_embeddings.dropout", "embeddings.dropout"])
def test_dropout_of_one_module_follows_its_own_switch(module):
    _, ours = pair("trunk", hidden_dropout_prob=0.5)
    expected = call(ours, batch("trunk")).pooler_output
    ours.get_submodule(module).train()
    assert not torch.equal(call(ours, batch("trunk")).pooler_output, expected)
    ours.get_submodule(module).eval()
    assert torch.equal(call(ours, batch("trunk")).pooler_output, expected)


# --- gradient checkpointing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["trunk", "masked_lm", "nlvr2"])
@pytest.mark.parametrize("flags", [{}, EXTRAS])
@pytest.mark.parametrize("hooked", [False, True])
def test_checkpointing_recomputes_and_changes_no_gradient(kind, reentrant, flags, hooked):
    theirs, ours = pair(kind)
    inputs = batch(kind)
    masks = real_positions(theirs, inputs)
    expected = backward(kind, theirs, inputs, masks, **flags)
    for model in (theirs, ours):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if hooked:
            trunk_of(model).encoder.layer[1].output.register_forward_hook(lambda *_: None)
    counted = []
    for model in (ours, theirs):
        calls = []
        for layer in trunk_of(model).encoder.layer:
            layer.intermediate.intermediate_act_fn = Counting(layer.intermediate.intermediate_act_fn, calls)
        found = backward(kind, model, inputs, masks, **flags)
        assert_same_gradients(found, expected)
        counted.append(len(calls))
    # Twice a layer. An activation of unknown make is to see the images of NLVR2 one by one.
    assert counted == [2 * 3 * (2 if kind == "nlvr2" else 1)] * 2


class Counting(nn.Module):
    """An activation that notes its calls."""

    def __init__(self, inner, calls):
        super().__init__()
        self.inner, self.calls = inner, calls

    def forward(self, x):
        self.calls.append(torch.is_grad_enabled())
        return self.inner(x)


def test_checkpointing_of_some_layers_and_not_in_evaluation():
    _, ours = pair("trunk")
    ours.gradient_checkpointing_enable()
    ours.encoder.layer[0].gradient_checkpointing = False
    calls = []
    for layer in ours.encoder.layer:
        layer.intermediate.intermediate_act_fn = Counting(layer.intermediate.intermediate_act_fn, calls)
    ours.train()
    call(ours, batch("trunk")).pooler_output.sum().backward()
    assert len(calls) == 1 + 2 + 2
    calls.clear()
    ours.eval()
    call(ours, batch("trunk")).pooler_output.sum().backward()
    assert len(calls) == 3
    calls.clear()
    ours.train().gradient_checkpointing_disable()
    call(ours, batch("trunk")).pooler_output.sum().backward()
    assert len(calls) == 3


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["trunk", "nlvr2"])
def test_checkpointing_changes_no_draw(kind, reentrant):
    found = []
    for checkpointed in (False, True):
        _, ours = pair(kind, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
        ours.train()
        if checkpointed:
            ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
        call(ours, batch(kind))[-1 if kind == "trunk" else 0].sum().backward()
        found.append(gradients(ours))
    assert_same_gradients(*found)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("text", ["ids", "embeds"])
def test_checkpointing_of_a_frozen_model_with_one_trained_layer(text, reentrant):
    """As peft has it: what is made of ids requires a gradient, so that there is something to record."""

    def freeze(model):
        model.requires_grad_(False).encoder.layer[1].requires_grad_(True)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    found = compare("trunk", batch("trunk", text=text), train=True, change=freeze)
    assert found["encoder.layer.1.output.dense.weight"].any()


def test_a_hook_that_only_looks_like_that_of_checkpointing_is_called():
    def doubled(model):
        def make_inputs_require_grads(module, inputs, output):
            return 2 * output

        make_inputs_require_grads.__qualname__ = known._RECORDS
        model.embeddings.text_embeddings.word_embeddings.register_forward_hook(make_inputs_require_grads)

    compare("trunk", change=doubled)
    compare("trunk", change=lambda model: doubled(model) or model.enable_input_require_grads())


def test_a_trained_model_restored_is_the_trained_reference():
    theirs, ours = pair("masked_lm")
    inputs = batch("masked_lm") | {"labels": labels("masked_lm")}
    for model in (theirs, ours):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        call(model, inputs).loss.backward()
        optimizer.step()
    vilt_fast.restore(ours)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert torch.equal(call(ours, inputs).logits, call(theirs, inputs).logits)

"""Padded positions of per-token outputs: with padding="reference" they hold what the reference has there."""

import copy
import functools
import warnings

import pytest
import torch
from support import original_vilt
from support.models import (
    EXTRAS,
    KINDS,
    PER_TOKEN,
    TEXT,
    as_dtype,
    assert_close,
    assert_same_gradients,
    assert_same_structure,
    batch,
    build,
    call,
    gradients,
    labels,
    leaves,
    pair,
    real_positions,
    rectangles,
    text_mask,
    trunk_of,
)

import vilt_fast
from vilt_fast.models.vilt import tasks
from vilt_fast.testing import assert_within_budget

REFERENCE = {"padding": "reference", "patch_order": "reference"}
both = functools.partial(pair, options=REFERENCE)


def assert_equal_everywhere(ours, theirs):
    assert_same_structure(ours, theirs)
    for (path, mine), (_, other) in zip(leaves(ours), leaves(theirs), strict=True):
        if mine is not None:
            assert_close(mine, other, path)


def compare(kind, inputs, *, change=lambda model: None, config=None, **flags):
    theirs, ours = both(kind, **(config or {}))
    for model in (theirs, ours):
        change(model)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert_equal_everywhere(call(ours, inputs, **flags), call(theirs, inputs, **flags))


# --- equal to the reference, every number -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("text", "image"), [("ids", "pixels"), ("embeds", "embeds")])
def test_every_number_of_every_output(kind, text, image):
    inputs = batch(kind, text=text, image=image)
    compare(kind, inputs, **EXTRAS)
    compare(kind, inputs)


@pytest.mark.parametrize("length", [1, 7, 8])
def test_sampled_patches(length):
    compare("trunk", batch("trunk"), config={"max_image_length": length}, **EXTRAS)


def test_text_or_image_alone_is_padded():
    for name in ("attention_mask", "pixel_mask"):
        inputs = batch("trunk")
        compare("trunk", inputs | {name: torch.ones_like(inputs[name])}, **EXTRAS)


def test_without_text_the_first_image_token_may_be_padding():
    inputs = batch("trunk", image="embeds") | {"input_ids": torch.ones(4, 0).long()}
    inputs |= dict.fromkeys(("attention_mask", "token_type_ids"))
    inputs["pixel_mask"][:, 0, 0] = 0
    compare("trunk", inputs, **EXTRAS)


def hooked(path):
    return lambda model: trunk_of(model).get_submodule(path).register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    "path", ["encoder.layer.1", "encoder.layer.1.attention.attention", "embeddings", "encoder", "layernorm", "pooler"]
)
def test_parts_that_are_called_themselves(path):
    compare("trunk", batch("trunk"), change=hooked(path), **EXTRAS)


def test_an_embedding_that_masks_what_was_real():
    def masking(module, arguments, returned):
        embedded, mask = returned
        return embedded, mask.index_fill(1, torch.tensor([0, 2, TEXT + 3]), 0)

    compare("trunk", batch("trunk"), change=lambda m: m.embeddings.register_forward_hook(masking), **EXTRAS)


@pytest.mark.parametrize("path", ["mlm_score", "mlm_score.decoder", "vilt"])
def test_heads_that_are_called_themselves(path):
    compare(
        "masked_lm", batch("masked_lm"), change=lambda m: m.get_submodule(path).register_forward_hook(lambda *_: None)
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["trunk", *PER_TOKEN])
def test_every_gradient(kind, checkpointing):
    models = both(kind)
    inputs = batch(kind)
    inputs["pixel_values"].requires_grad_()
    given = []
    for model in models:
        inputs["pixel_values"].grad = None
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable()
        if kind == "trunk":
            loss = (
                (out := call(model, inputs).last_hidden_state)
                .mul(torch.linspace(-1, 1, out.numel()).view_as(out))
                .sum()
            )
        else:
            loss = call(model, inputs, labels=labels(kind).clamp(min=1)).loss
        loss.backward()
        given.append((gradients(model), inputs["pixel_values"].grad, loss.detach()))
    (theirs, pixels, loss), (ours, our_pixels, our_loss) = given
    assert_same_gradients(ours, theirs)
    assert_close(our_pixels, pixels, "pixels")
    assert_close(our_loss, loss, "loss")
    beside = (rectangles([(3, 5), (2, 4), (3, 5), (1, 1)]) == 0)[:, None].expand_as(pixels)
    assert (kind != "trunk") or pixels[beside].any()  # what is drawn more than once adds up


def test_gradients_of_hidden_states_and_attentions():
    found = []
    for model in both("token_classification"):
        out = call(model, batch("token_classification"), **EXTRAS)
        shown = [*out.hidden_states, *out.attentions]
        found.append((shown, torch.autograd.grad(out.logits.square().sum(), shown)))
    (values, theirs), (_, ours) = found
    for mine, other, value in zip(ours, theirs, values, strict=True):
        assert_close(mine * value, other * value)  # of a key that is padding the probability is 0, and no variable here


# --- the ways of computing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extras", [False, True])
@torch.no_grad()
def test_native_blocks_keep_the_budget_in_padding(dtype, extras):
    theirs, ours = both("trunk", dtype)
    exact = build("trunk", dtype).double()
    inputs = batch("trunk", dtype)
    flags = {"output_hidden_states": extras}
    outputs = call(ours, inputs, **flags), call(theirs, inputs, **flags)
    truth = call(exact, as_dtype(inputs, torch.float64), **flags)
    for (path, mine), (_, other), (_, right) in zip(*map(leaves, (*outputs, truth)), strict=True):
        assert_within_budget(mine, other, right, what=path)


@torch.no_grad()
def test_int8_in_padding():
    theirs, ours = both("trunk", torch.float32)
    vilt_fast.accelerate(ours, quantize="int8", **REFERENCE)
    inputs = batch("trunk", torch.float32)
    mine, other = (call(model, inputs).last_hidden_state for model in (ours, theirs))
    errors = (mine - other).norm(dim=-1) / other.norm(dim=-1)
    real = real_positions(theirs, inputs)[0]
    assert errors[~real].max() < 2 * errors[real].max() < 0.2


@pytest.mark.parametrize("kind", ["trunk", "masked_lm", "nlvr2"])
def test_a_plan_made_ahead(kind):
    theirs, ours = both(kind)
    inputs = batch(kind)
    torch.manual_seed(3)
    plan = vilt_fast.sequence_plan(ours, **inputs)
    assert_equal_everywhere(call(ours, inputs, sequence_plan=plan, **EXTRAS), call(theirs, inputs, **EXTRAS))


@torch.no_grad()
def test_a_plan_made_ahead_compiles_to_one_graph():
    _, ours = both("masked_lm", torch.float32, num_hidden_layers=1)
    inputs = batch("masked_lm", torch.float32)
    plan = vilt_fast.sequence_plan(ours, **inputs)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    assert torch.equal(compiled(**inputs, sequence_plan=plan).logits, ours(**inputs, sequence_plan=plan).logits)


# --- what padding holds -----------------------------------------------------------------------------------------------


def poisoned_inputs(text, image, dtype):
    inputs = batch("trunk", dtype, text=text, image=image)
    if text == "embeds":
        inputs["inputs_embeds"][text_mask() == 0] = float("nan")
    if image == "embeds":
        inputs["image_embeds"][inputs["pixel_mask"].flatten(1) == 0] = float("nan")
    else:
        beside = (inputs["pixel_mask"] == 0)[:, None].expand_as(inputs["pixel_values"])
        inputs["pixel_values"][beside] = float("nan")
    return inputs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("image", ["pixels", "embeds"])
@torch.no_grad()
def test_nan_in_padding_stays_there(dtype, image):
    inputs, real = poisoned_inputs("embeds", image, dtype), None
    outputs = []
    for padding in ("zero", "reference"):
        _, ours = pair("trunk", dtype, options={"padding": padding})
        real = real_positions(ours, inputs)[0] if real is None else real
        for flags in ({}, EXTRAS):
            outputs.append(call(ours, inputs, **flags).last_hidden_state)
    zero, _, reference, with_extras = outputs
    torch.testing.assert_close(reference[real], zero[real])
    assert reference[real].isfinite().all()
    assert reference[~real].isnan().all() and with_extras[~real].isnan().all()
    torch.testing.assert_close(with_extras[real], zero[real])


def test_raster_order_spreads_what_is_beside_the_image():
    mask = rectangles([(3, 5), (2, 4), (1, 1), (1, 2)])
    plan = vilt_fast.SequencePlan.from_masks(
        None, mask, text_shape=(4, 2), pixel_shape=(4, 3, 48, 80), patch_size=(16, 16), position_grid=4,
        padding="reference", max_image_length=10,
    )  # fmt: skip
    assert plan.lengths == (2 + 1 + 10,) * 4 and plan.key_lengths == (13, 2 + 1 + 8, 2 + 1 + 1, 2 + 1 + 2)
    beside = [(plan.patch_source % 15)[plan.patch_sample == b][n:].tolist() for b, n in enumerate((10, 8, 1, 2))]
    assert beside == [[], [4, 11], [1 + i * 14 // 9 for i in range(9)], [2 + i * 13 // 8 for i in range(8)]]
    assert not plan.pos_weight[~torch.isin(plan.patch_rows, plan.pack(plan.key_mask()).nonzero()[:, 0])].any()


@pytest.mark.parametrize("hook", [False, True])
def test_raster_order_pools_to_what_the_reference_pools_to(hook):
    """Beside an image pixels are zero, as its processor makes them: then it does not matter which are drawn."""
    theirs, ours = pair("trunk", options={"padding": "reference", "patch_order": "raster"})
    if hook:
        hooked("embeddings")(ours)
    inputs = batch("trunk")
    inputs["pixel_values"] = inputs["pixel_values"] * inputs["pixel_mask"][:, None]
    other = call(theirs, inputs).last_hidden_state
    found = [call(ours, inputs, seed=seed).last_hidden_state for seed in range(4)]  # what a module draws may differ
    plain = call(vilt_fast.accelerate(ours, patch_order="raster"), inputs, seed=6).last_hidden_state
    real = plain.any(-1)
    for mine in found:
        assert_close(mine[:, :TEXT], other[:, :TEXT])
        assert_close(mine.mean(1), other.mean(1))
        assert_close(mine[:, TEXT:].amax(1), other[:, TEXT:].amax(1))
        assert_close(mine[real], plain[real])  # and the real ones are where they are by default


def test_the_default_is_zero_and_the_plan_knows():
    _, ours = pair("trunk")
    inputs = batch("trunk")
    assert not call(ours, inputs).last_hidden_state[~real_positions(ours, inputs)[0]].any()
    with pytest.raises(ValueError, match="padding must be"):
        vilt_fast.accelerate(ours, padding="nan")
    with pytest.raises(vilt_fast.InputError, match="padding must be"):
        vilt_fast.SequencePlan.from_keep_mask(None, torch.ones(1, 2), text_shape=(1, 1), padding="nan")
    plan = vilt_fast.sequence_plan(ours, **inputs)
    with pytest.raises(vilt_fast.InputError, match=r"padding='zero'.*padding='reference'"):
        call(vilt_fast.accelerate(ours, padding="reference"), inputs, sequence_plan=plan)


def test_align_is_not_touched():
    _, ours = both("trunk")
    plain = build("trunk")
    found = [m.forward.features(batch("trunk"), torch.device("cpu")) for m in (ours, vilt_fast.accelerate(plain))]
    assert torch.equal(found[0].image, found[1].image) and torch.equal(found[0].image_real, found[1].image_real)
    assert all(map(torch.equal, found[0].cells, found[1].cells))


# --- the original repository ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize("hook", [None, "text_embeddings", "transformer.blocks.1.mlp"])
@pytest.mark.parametrize("max_image_len", [-1, 6])
def test_the_original(max_image_len, hook, ready):
    torch.manual_seed(0)
    theirs = original_vilt.ViLTransformerSS(max_image_len=max_image_len).double().eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = vilt_fast.accelerate(copy.deepcopy(theirs), **REFERENCE)
    if hook:
        ours.get_submodule(hook).register_forward_hook(lambda *_: None)
    inputs = batch("trunk")
    pixels = inputs["pixel_values"] * inputs["pixel_mask"][:, None]
    given = {"text_ids": inputs["input_ids"], "text_masks": text_mask(), "text_labels": text_mask(), "image": [pixels]}
    more = {}
    if ready:
        embeds, masks, *_ = theirs.transformer.visual_embed(pixels, max_image_len=max_image_len)
        more = {"image_embeds": embeds, "image_masks": masks}
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        outputs.append(model.infer(given, **more))
    mine, other = outputs
    for name in ("text_feats", "image_feats", "cls_feats", "raw_cls_feats"):
        assert_close(mine[name], other[name], name)
    assert torch.equal(mine["image_masks"], other["image_masks"])
    if not ready:
        assert torch.equal(mine["patch_index"][0], other["patch_index"][0])


# --- labels on padding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [None, "hooked"])
@pytest.mark.parametrize("kind", PER_TOKEN)
def test_labels_on_padding_are_said_once(kind, head):
    _, ours = pair(kind)
    if head:
        getattr(ours, {"masked_lm": "mlm_score"}.get(kind, "classifier")).register_forward_hook(lambda *_: None)
    inputs, everywhere = batch(kind), labels(kind).clamp(min=1)
    with pytest.warns(UserWarning, match=r"16 of the labels.*-100.*padding='reference'"):
        call(ours, inputs, labels=everywhere)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(ours, inputs, labels=everywhere)
        for options, given in (({}, labels(kind)), ({"padding": "reference"}, everywhere)):
            vilt_fast.accelerate(ours, **options)
            call(ours, inputs, labels=given)


def test_labels_are_not_looked_at_where_that_would_wait(monkeypatch):
    _, ours = pair("masked_lm")
    monkeypatch.setattr(tasks, "readable", lambda tensor: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(ours, batch("masked_lm"), labels=labels("masked_lm").clamp(min=1))

"""Every model class against HuggingFace's own, output by output."""

import pytest
import torch
from support.models import (
    KINDS,
    PER_TOKEN,
    as_dtype,
    assert_close,
    assert_same_output,
    assert_same_structure,
    batch,
    build,
    call,
    labels,
    leaves,
    only_real,
    pair,
    real_positions,
    text_mask,
    trunk_of,
)

import vilt_fast
from vilt_fast.testing import assert_within_budget

LABELLED = ("masked_lm", "question_answering", "nlvr2", "token_classification")


def compare(kind, inputs, *, config=None, **flags):
    """Both models on the same inputs and seed; with and without autograd. Returns the last two outputs."""
    theirs, ours = pair(kind, **(config or {}))
    masks = real_positions(theirs, inputs)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            expected, actual = call(theirs, inputs, **flags), call(ours, inputs, **flags)
        assert_same_output(kind, actual, expected, masks)
    return actual, expected


@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["ids", "embeds"])
@pytest.mark.parametrize("image", ["pixels", "embeds"])
def test_every_output_of_every_class(kind, text, image):
    actual, _ = compare(kind, batch(kind, text=text, image=image), output_hidden_states=True, output_attentions=True)
    assert len(leaves(actual.hidden_states)) == 4 * (2 if kind == "nlvr2" else 1)
    assert len(leaves(actual.attentions)) == 3 * (2 if kind == "nlvr2" else 1)
    compare(kind, batch(kind, text=text, image=image))


@pytest.mark.parametrize("kind", KINDS)
def test_extras_one_by_one_and_from_the_config(kind):
    inputs = batch(kind)
    compare(kind, inputs, output_hidden_states=True)
    compare(kind, inputs, output_attentions=True)
    compare(kind, inputs, config={"output_hidden_states": True, "output_attentions": True})
    compare(kind, inputs, config={"output_hidden_states": True}, output_hidden_states=False)


@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extras", [False, True])
def test_tuples(kind, extras):
    if kind == "nlvr2" and extras:
        # The reference itself fails on these: it asks its trunk's tuple for `.hidden_states`.
        theirs, ours = pair(kind)
        with pytest.raises(AttributeError):
            call(theirs, batch(kind), return_dict=False, output_hidden_states=True)
        loose = call(ours, batch(kind), return_dict=False, output_hidden_states=True, output_attentions=True)
        named = call(ours, batch(kind), output_hidden_states=True, output_attentions=True)
        assert all(
            torch.equal(a, b) for (_, a), (_, b) in zip(leaves(loose), leaves(list(named.values())), strict=True)
        )
        return
    flags = {"return_dict": False, "output_hidden_states": extras, "output_attentions": extras}
    theirs, ours = pair(kind)
    _, by_config = pair(kind, return_dict=False)
    inputs = batch(kind)
    expected, actual = call(theirs, inputs, **flags), call(ours, inputs, **flags)
    assert_same_structure(actual, expected)
    named = call(ours, inputs, output_hidden_states=extras, output_attentions=extras)
    pooled_is_none = kind == "trunk_without_pooler"
    flat = [tensor for _, tensor in leaves(actual)]
    assert [t is None for t in flat].count(True) == (1 if pooled_is_none else 0) + (2 if kind == "nlvr2" else 0)
    for mine, (path, tensor) in zip((t for t in flat if t is not None), leaves(named), strict=True):
        assert torch.equal(mine, tensor), path
    if not extras:
        assert_same_structure(call(by_config, inputs), expected)


@pytest.mark.core
@pytest.mark.parametrize("kind", LABELLED)
@pytest.mark.parametrize("return_dict", [True, False])
def test_loss(kind, return_dict):
    theirs, ours = pair(kind)
    inputs = batch(kind) | {"labels": labels(kind)}
    expected, actual = (call(model, inputs, return_dict=return_dict) for model in (theirs, ours))
    assert_same_structure(actual, expected)
    assert_close(actual[0], expected[0], "loss")
    assert actual[0].dim() == 0


def test_retrieval_refuses_labels_as_the_reference_does():
    for model in pair("retrieval"):
        with pytest.raises(NotImplementedError):
            call(model, batch("retrieval"), labels=torch.zeros(4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 7, 8, 200])
def test_sampled_patches(kind, length):
    compare(kind, batch(kind), config={"max_image_length": length}, output_hidden_states=True, output_attentions=True)


@pytest.mark.parametrize("kind", KINDS)
def test_raster_order_changes_nothing_but_the_order(kind):
    theirs, ours = pair(kind, options={"patch_order": "raster"})
    inputs = batch(kind)
    masks = real_positions(theirs, inputs)
    expected = call(theirs, inputs, output_hidden_states=True)
    actual = call(ours, inputs, seed=99, output_hidden_states=True)  # the seed has no say
    assert_same_structure(actual, expected)
    orders = raster_orders(theirs, inputs)
    for (path, mine), (_, other) in zip(leaves(actual), leaves(expected), strict=True):
        if mine is None:
            continue
        other, _ = only_real(path, other, masks, kind)
        if path.split(".")[0] in ("last_hidden_state", "hidden_states"):
            order = orders[int(path.split(".")[1]) if kind == "nlvr2" else 0]
            other = other.gather(1, order[:, :, None].expand_as(other))
        assert_close(mine, other, path)


def raster_orders(model, inputs, seed=3):
    """Indices [B, L] that put the reference's image tokens in raster order, padding last; one tensor an image."""
    trunk = trunk_of(model)
    pixels, mask = inputs["pixel_values"], inputs["pixel_mask"]
    several = zip(pixels.unbind(1), mask.unbind(1), strict=True) if pixels.dim() == 5 else [(pixels, mask)]
    torch.manual_seed(seed)
    orders = []
    for pixels, mask in several:
        _, kept, (index, (_, width)) = trunk.embeddings.visual_embed(pixels, mask, trunk.config.max_image_length)
        cells = index[..., 0] * width + index[..., 1]
        cells = torch.where(kept[:, 1:] != 0, cells, 10_000)
        head = torch.arange(text_mask().shape[1] + 1).expand(len(cells), -1)
        orders.append(torch.cat([head, head.shape[1] + cells.argsort(dim=1, stable=True)], dim=1))
    return orders


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("extras", [False, True])
def test_other_dtypes_stay_within_the_reference_budget(kind, dtype, extras):
    theirs, ours = pair(kind, dtype)
    exact = build(kind, dtype).double()
    flags = {"output_hidden_states": extras, "output_attentions": extras}
    rows = {}
    for seed in range(4):  # small outputs: a handful of numbers says nothing about an error
        inputs = batch(kind, dtype, seed=seed)
        masks = real_positions(theirs, inputs)
        with torch.no_grad():
            outputs = [call(model, inputs, **flags) for model in (ours, theirs)]
            truth = call(exact, as_dtype(inputs, torch.float64), **flags)
        assert_same_structure(*outputs)
        for (path, mine), (_, other), (_, right) in zip(*map(leaves, (*outputs, truth)), strict=True):
            if mine is None:
                continue
            other, right = (only_real(path, t, masks, kind)[0] for t in (other, right))
            rows.setdefault(path, []).append((mine, other, right))
    for path, parts in rows.items():
        assert_within_budget(*map(torch.stack, zip(*parts, strict=True)), what=path)


def test_nlvr2_with_one_image_takes_pixels_without_an_image_dimension():
    theirs, ours = pair("nlvr2", num_images=1, modality_type_vocab_size=2)
    inputs = batch("trunk")
    inputs["pixel_mask"] = inputs["pixel_mask"][:, None]
    assert_close(call(ours, inputs).logits, call(theirs, inputs).logits)
    inputs = batch("trunk", image="embeds")
    inputs["pixel_mask"] = inputs["pixel_mask"][:, None]
    assert_close(call(ours, inputs).logits, call(theirs, inputs).logits)


def test_nlvr2_with_three_images():
    theirs, ours = pair("nlvr2", num_images=3, modality_type_vocab_size=4)
    inputs = batch("nlvr2")
    for name in ("pixel_values", "pixel_mask"):
        inputs[name] = torch.cat([inputs[name], inputs[name][:, :1].flip(0)], dim=1)
    assert_same_output("nlvr2", call(ours, inputs), call(theirs, inputs), real_positions(theirs, inputs))


@pytest.mark.parametrize("kind", PER_TOKEN)
def test_padded_text_positions_have_zero_logits(kind):
    _, ours = pair(kind)
    logits = call(ours, batch(kind)).logits
    assert logits.any(-1).equal(text_mask() != 0)


def test_a_task_around_a_trunk_accelerated_alone():
    for kind in LABELLED:
        theirs, ours = pair(kind)
        vilt_fast.restore(ours)
        vilt_fast.accelerate(ours.vilt, patch_order="reference")
        expected, actual = call(theirs, batch(kind)), call(ours, batch(kind))
        masks = real_positions(theirs, batch(kind))
        assert_close(*(only_real("logits", o.logits, masks, kind)[0] for o in (actual, expected)), kind)

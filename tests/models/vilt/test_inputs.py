"""The packed forward on every kind of input that the reference accepts."""

import copy

import pytest
import torch
from support.models import (
    GRIDS,
    PATCH,
    TEXT,
    as_dtype,
    assert_same_output,
    batch,
    call,
    changed,
    compare,
    pair,
    real_positions,
    rectangles,
    text_mask,
)
from torch import nn

from vilt_fast.testing import sliced, strided


@pytest.mark.parametrize("name", ["attention_mask", "pixel_mask"])
@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int8, torch.int32, torch.float16, torch.bfloat16, torch.float32, torch.float64],
)
def test_masks_of_any_dtype(name, dtype):
    inputs = batch("trunk")
    compare(inputs | {name: inputs[name].to(dtype)})


@pytest.mark.parametrize("value", [-1, 2, 7])
def test_any_nonzero_text_mask_counts_as_real(value):
    compare(changed(attention_mask=text_mask() * value))
    compare(changed(attention_mask=text_mask().double() * value / 10))


@pytest.mark.parametrize("name", ["attention_mask", "pixel_mask", "token_type_ids"])
def test_without(name):
    compare(changed(**{name: None}))


def test_without_any_mask():
    compare(changed(attention_mask=None, pixel_mask=None, token_type_ids=None))


def test_token_types_shared_by_the_batch():
    compare(changed(token_type_ids=torch.randint(0, 2, (1, TEXT))))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_id_dtypes(dtype):
    inputs = batch("trunk")
    compare(inputs | {k: inputs[k].to(dtype) for k in ("input_ids", "token_type_ids")})


@pytest.mark.parametrize("scale", [1, 3, 32])
def test_pixel_mask_at_another_resolution(scale):
    compare(changed(pixel_mask=rectangles(GRIDS, scale=scale)))


def test_pixel_mask_that_ends_within_a_patch():
    mask = torch.zeros(4, 48, 80)
    for b, (h, w) in enumerate([(48, 80), (33, 17), (1, 1), (47, 79)]):
        mask[b, :h, :w] = 1
    compare(changed(pixel_mask=mask))


def test_pixels_that_are_no_multiple_of_the_patch():
    pixels = torch.randn(4, 3, 50, 83, dtype=torch.float64)
    compare(changed(pixel_values=pixels))
    compare(changed(pixel_values=pixels, pixel_mask=None))
    mask = torch.zeros(4, 50, 83)
    for b, (h, w) in enumerate([(50, 83), (35, 83), (50, 20), (16, 16)]):
        mask[b, :h, :w] = 1
    compare(changed(pixel_values=pixels, pixel_mask=mask))


@pytest.mark.parametrize("canvas", [(4, 4), (7, 6), (1, 9), (9, 1), (1, 1)])
def test_grids_of_other_sizes_than_the_position_table(canvas):
    height, width = canvas
    grids = [canvas, (max(1, height - 1), width), (height, max(1, width - 2)), (1, 1)]
    pixels = torch.randn(4, 3, height * PATCH, width * PATCH, dtype=torch.float64)
    compare(changed(pixel_values=pixels, pixel_mask=rectangles(grids, canvas)))


def test_table_of_a_single_position():
    compare(batch("trunk"), config={"image_size": PATCH})


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16])
def test_pixels_of_another_dtype(dtype):
    compare(changed(pixel_values=torch.randint(0, 5, (4, 3, 48, 80)).to(dtype)))


@pytest.mark.parametrize("text", ["ids", "embeds"])
@pytest.mark.parametrize("image", ["pixels", "embeds"])
@pytest.mark.parametrize("lay", [strided, sliced, lambda t: t.transpose(0, -1).contiguous().transpose(0, -1)])
@pytest.mark.parametrize("kind", ["trunk", "nlvr2"])
def test_noncontiguous_inputs(kind, text, image, lay):
    inputs = batch(kind, text=text, image=image)
    floats = {k: lay(v) for k, v in inputs.items() if v.is_floating_point()}
    whole = {
        k: torch.stack([v, v], -1)[..., 0] for k, v in inputs.items() if not v.is_floating_point()
    }  # integers have no NaN
    assert not any(v.is_contiguous() for v in (floats | whole).values())
    compare(whole | floats, kind=kind)


def test_broadcast_inputs():
    """The same image for every text, without a copy of it."""
    pixels = torch.randn(1, 3, 48, 80, dtype=torch.float64).expand(4, -1, -1, -1)
    compare(changed(pixel_values=pixels, pixel_mask=torch.ones(1, 48, 80).expand(4, -1, -1)))


def test_channels_last_pixels():
    inputs = batch("trunk")
    compare(inputs | {"pixel_values": inputs["pixel_values"].to(memory_format=torch.channels_last)})


@pytest.mark.parametrize("index", [0, 1, None])
def test_image_token_type(index):
    compare(batch("trunk"), image_token_type_idx=index)
    compare(batch("trunk", image="embeds"), image_token_type_idx=index)


def test_text_of_length_0():
    ids = torch.zeros(4, 0, dtype=torch.long)
    compare(changed(input_ids=ids, attention_mask=None, token_type_ids=None))
    compare(changed(input_ids=ids, attention_mask=ids, token_type_ids=ids))
    embeds = batch("trunk", image="embeds") | {"input_ids": ids, "attention_mask": ids, "token_type_ids": ids}
    embeds["pixel_mask"][:, 0, 0] = 1  # the reference pools from the first image token
    compare(embeds)


def test_text_as_long_as_the_model_can_read():
    compare(changed(input_ids=torch.randint(0, 50, (4, 12)), attention_mask=None, token_type_ids=None))


def test_one_text_token_and_one_patch():
    ids = torch.randint(0, 50, (4, 1))
    pixels = torch.randn(4, 3, PATCH, PATCH, dtype=torch.float64)
    compare(changed(input_ids=ids, attention_mask=None, token_type_ids=None, pixel_values=pixels, pixel_mask=None))


@pytest.mark.parametrize(
    "rows",
    [
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 0, 0, 1],
        [1, 0, 1, 0, 1, 0, 1, 0, 1],
        [1, 0, 0, 0, 0, 0, 0, 0, 0],
    ],
)
def test_text_masks_shared_by_all_samples(rows):
    mask = torch.tensor(rows).expand(4, -1)
    compare(changed(attention_mask=mask))
    compare(batch("trunk", image="embeds") | {"attention_mask": mask})


def test_a_single_sample():
    compare({k: v[1:2] for k, v in batch("trunk").items()})


def test_embeddings_of_another_dtype():
    for text, image in (("embeds", "pixels"), ("ids", "embeds"), ("embeds", "embeds")):
        compare(as_dtype(batch("trunk", text=text, image=image), torch.float32))


def test_image_embeds_whose_mask_has_two_dimensions():
    inputs = batch("trunk", image="embeds")
    compare(inputs | {"pixel_mask": inputs["pixel_mask"].flatten(1)})


def test_any_negative_max_image_length_keeps_all():
    compare(batch("trunk"), config={"max_image_length": -3})


@pytest.mark.parametrize(
    "config",
    [
        {"qkv_bias": False},
        {"hidden_act": "relu"},
        {"hidden_act": "gelu_new"},
        {"hidden_act": "quick_gelu"},
        {"layer_norm_eps": 0.1},
        {"num_attention_heads": 1},
        {"num_attention_heads": 32},
        {"num_hidden_layers": 1},
        {"patch_size": 8},
        {"num_channels": 1},
        {"image_size": 72},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_configurations(config, dtype):
    inputs = batch("trunk", dtype)
    if "num_channels" in config:
        inputs["pixel_values"] = inputs["pixel_values"][:, :1]
    if dtype == torch.float64:
        return compare(inputs, config=config)
    theirs, ours = pair("trunk", dtype, **config)
    masks = real_positions(theirs, inputs)
    with torch.no_grad():
        expected, actual = (call(m, inputs, output_hidden_states=True) for m in (theirs, ours))
        exact = call(copy.deepcopy(theirs).double(), as_dtype(inputs, torch.float64), output_hidden_states=True)
    assert_same_output("trunk", actual, expected, masks, exact=exact)


def test_each_norm_has_its_own_eps():
    def change(model):
        norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
        assert len(norms) == 8
        for i, norm in enumerate(norms):
            norm.eps = 0.01 * (i + 1)

    compare(batch("trunk"), change=change)
    inputs = batch("trunk", torch.float32)
    theirs, ours = pair("trunk", torch.float32)
    change(theirs), change(ours)
    with torch.no_grad():
        exact = call(copy.deepcopy(theirs).double(), as_dtype(inputs, torch.float64))
        assert_same_output(
            "trunk", call(ours, inputs), call(theirs, inputs), real_positions(theirs, inputs), exact=exact
        )

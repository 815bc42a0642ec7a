"""SequencePlan against HuggingFace's own `visual_embed`, and against inputs that it must refuse."""

import numpy as np
import pytest
import torch
from transformers import ViltConfig
from transformers.models.vilt.modeling_vilt import ViltEmbeddings

from vilt_fast import InputError, SequencePlan
from vilt_fast.models.vilt import patches

CONFIG = ViltConfig(hidden_size=16, num_attention_heads=2, image_size=64, patch_size=16, hidden_dropout_prob=0.0)


def rectangle_masks(sizes, height, width, dtype=torch.long):
    mask = torch.zeros(len(sizes), height, width, dtype=dtype)
    for b, (h, w) in enumerate(sizes):
        mask[b, :h, :w] = 1
    return mask


def plan_of(pixel_mask, pixel_shape, attention_mask=None, text_shape=None, **options):
    text_shape = text_shape or (pixel_shape[0], 5)
    return SequencePlan.from_masks(
        attention_mask,
        pixel_mask,
        text_shape=text_shape,
        pixel_shape=pixel_shape,
        patch_size=(16, 16),
        position_grid=4,
        position_dtype=torch.float64,
        **options,
    )


@pytest.mark.parametrize("max_image_length", [-1, 3, 7, 200])
@pytest.mark.parametrize("mask_scale", [1, 16, 5])
def test_reference_order_positions_and_draws_are_huggingfaces(max_image_length, mask_scale):
    torch.manual_seed(0)
    embeddings = ViltEmbeddings(CONFIG).double()
    for p in embeddings.parameters():
        torch.nn.init.normal_(p, std=0.3)
    grids = [(3, 5), (2, 5), (3, 1), (1, 1), (3, 5)]
    pixels = torch.randn(5, 3, 48, 80, dtype=torch.float64)
    pixel_mask = rectangle_masks([(h * mask_scale, w * mask_scale) for h, w in grids], 3 * mask_scale, 5 * mask_scale)
    torch.manual_seed(7)
    expected, mask, (index, _) = embeddings.visual_embed(pixels, pixel_mask, max_image_length)
    after = torch.rand(1)
    torch.manual_seed(7)
    plan = plan_of(pixel_mask, pixels.shape, max_image_length=max_image_length, patch_order="reference")
    assert torch.equal(torch.rand(1), after)  # the generator stands where the reference leaves it
    assert plan.grids == tuple(grids)
    assert plan.image_length == expected.shape[1]
    table = embeddings.position_embeddings[0]
    for b in range(5):
        positions = plan.patch_positions(b)
        assert torch.equal(positions, index[b][mask[b, 1:] != 0])
        own = plan.patch_sample == b
        resized = (table[plan.pos_index[own]] * plan.pos_weight[own, :, None]).sum(1)
        cells = embeddings.patch_embeddings(pixels)[b, :, positions[:, 0], positions[:, 1]].T
        torch.testing.assert_close(cells + resized, expected[b, 1:][mask[b, 1:] != 0])


def test_raster_order_and_sampling():
    pixel_mask = rectangle_masks([(48, 80), (32, 80)], 48, 80)
    plan = plan_of(pixel_mask, (2, 3, 48, 80))
    assert plan.patch_source.tolist() == [*range(15), *range(15, 25)]
    first = plan_of(pixel_mask, (2, 3, 48, 80), max_image_length=4, generator=torch.Generator().manual_seed(1))
    again = plan_of(pixel_mask, (2, 3, 48, 80), max_image_length=4, generator=torch.Generator().manual_seed(1))
    other = plan_of(pixel_mask, (2, 3, 48, 80), max_image_length=4, generator=torch.Generator().manual_seed(2))
    assert torch.equal(first.patch_source, again.patch_source)
    assert not torch.equal(first.patch_source, other.patch_source)
    for b in range(2):
        kept = first.patch_source[first.patch_sample == b]
        assert len(set(kept.tolist())) == 4 and torch.equal(kept, kept.sort().values)


@pytest.mark.parametrize("layout", [lambda t: t, lambda t: t.mT.contiguous().mT], ids=["rows", "columns"])
@pytest.mark.parametrize("size", [(64, 96), (5, 7), (4, 6), (2, 3), (70, 97), (1, 1), (64, 100)])
def test_masks_are_sampled_where_interpolate_samples(size, layout):
    """Of any resolution: by steps where it is a multiple of the grid, else by places; finer or coarser than that."""
    values = layout(torch.arange(2.0 * size[0] * size[1]).view(2, *size))
    expected = torch.nn.functional.interpolate(values[None], size=(4, 6))[0]
    assert np.array_equal(patches._sampled(values, (4, 6)), expected.numpy())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32, torch.float16, torch.bfloat16])
def test_masks_of_any_dtype(dtype):
    text = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    pixel_mask = rectangle_masks([(48, 16), (16, 80), (32, 32)], 48, 80)
    plan = plan_of(pixel_mask.to(dtype), (3, 3, 48, 80), text.to(dtype))
    assert plan.key_lengths == (3 + 1 + 3, 0 + 1 + 5, 5 + 1 + 4)
    assert plan.lengths == (7, 7, 10)  # the second sample's text position 0 is a query and no key
    assert plan.pool_rows.tolist() == [0, 7 + 6, 14]


def test_who_cuts_out_patches_is_told_whether_they_are_all_in_order():
    shape, whole = (2, 3, 64, 96), rectangle_masks([(64, 96)] * 2, 64, 96)
    for plan in (plan_of(whole, shape), plan_of(None, shape, padding="reference")):
        assert plan.in_order and plan.patch_source.tolist() == [*range(2 * 24)]
    narrow = rectangle_masks([(64, 96), (64, 80)], 64, 96)
    for plan in (
        plan_of(narrow, shape),
        plan_of(narrow, shape, padding="reference"),
        plan_of(whole, shape, max_image_length=23),
        SequencePlan.concatenate([plan_of(whole, shape)] * 2, 2),
    ):
        assert not plan.in_order


def test_pack_and_unpack_are_inverse_on_real_positions():
    text = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    pixel_mask = rectangle_masks([(48, 16), (16, 80), (32, 32)], 48, 80)
    plan = plan_of(pixel_mask, (3, 3, 48, 80), text)
    padded = torch.randn(3, plan.text_length + plan.image_length, 4)
    rows = plan.pack(padded)
    assert rows.shape == (plan.total_rows, 4)
    mask = plan.key_mask()
    assert mask[:, :5].equal(text.bool())
    assert plan.unpack(rows).equal(padded * mask[..., None])
    assert rows[plan.pool_rows].equal(padded[:, 0])


def test_dense_batches_are_views():
    plan = plan_of(None, (2, 3, 48, 80))
    rows = torch.randn(plan.total_rows, 4)
    assert plan.dense and plan.unpack(rows).data_ptr() == rows.data_ptr()
    assert plan.pack(plan.unpack(rows)).data_ptr() == rows.data_ptr()


def test_concatenate_looks_images_up_side_by_side():
    masks = [rectangle_masks(s, 48, 80) for s in ([(48, 80), (16, 16)], [(16, 32), (32, 16)])]
    plans = [plan_of(m, (2, 3, 48, 80), torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 1, 1]])) for m in masks]
    both = SequencePlan.concatenate(plans, 2)
    assert both.batch == 4 and both.lengths == plans[0].lengths + plans[1].lengths
    cells = 15
    images = (both.patch_source // cells).tolist()
    samples = both.patch_sample.tolist()
    assert {(s, i) for s, i in zip(samples, images, strict=True)} == {(0, 0), (1, 2), (2, 1), (3, 3)}
    rows = torch.randn(both.total_rows, 3)
    parts = both.split(both.unpack(rows))
    for part, plan, own in zip(parts, plans, rows.split([p.total_rows for p in plans]), strict=True):
        assert part.equal(plan.unpack(own))


def test_image_embeds_keep_mask_with_holes():
    keep = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]])
    plan = SequencePlan.from_keep_mask(torch.tensor([[1, 1], [0, 0]]), keep, text_shape=(2, 2))
    assert plan.key_lengths == (5, 1) and plan.lengths == (5, 2)
    assert plan.patch_source.tolist() == [0, 2, 3, 5]
    assert plan.key_mask().equal(torch.tensor([[1, 1, 1, 0, 1, 1], [0, 0, 0, 1, 0, 0]]).bool())


def test_plans_move_and_keep_their_host_side():
    plan = plan_of(None, (2, 3, 48, 80))
    moved = plan.to("meta")
    assert moved.device.type == "meta" and moved.lengths == plan.lengths and plan.to("cpu") is plan


def holes():
    mask = rectangle_masks([(48, 80)], 48, 80)
    mask[0, 16:32, 16:32] = 0
    return mask


def off_corner():
    mask = torch.zeros(1, 48, 80)
    mask[0, 16:, 16:] = 1
    return mask


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (holes(), "one rectangle"),
        (off_corner(), "top left corner"),
        (torch.zeros(1, 48, 80), "is empty"),
        (torch.full((1, 48, 80), 2), "0 .padding. and 1"),
        (torch.full((1, 48, 80), 0.5), "0 .padding. and 1"),
        (torch.full((1, 48, 80), float("nan")), "0 .padding. and 1"),
        (torch.ones(2, 48, 80), "like pixel_values"),
        (torch.ones(48, 80), "like pixel_values"),
        (torch.ones(1, 0, 80), "length 0"),
    ],
)
def test_masks_that_the_reference_computes_garbage_from_are_refused(mask, message):
    with pytest.raises(InputError, match=message):
        plan_of(mask, (1, 3, 48, 80))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(max_image_length=0), "max_image_length 0"),
        (dict(patch_order="spiral"), "patch_order"),
        (dict(text_shape=(0, 5)), "batch is empty"),
        (dict(attention_mask=torch.ones(1, 4)), "attention_mask"),
        (dict(pixel_shape=(1, 3, 15, 80)), "no whole patch"),
    ],
)
def test_other_bad_input_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        plan_of(**{"pixel_mask": None, "pixel_shape": (1, 3, 48, 80)} | change)


def test_input_error_is_caught_as_what_the_reference_raises():
    for kind in (ValueError, RuntimeError, IndexError):
        assert issubclass(InputError, kind)


def test_bilinear_weights_are_torchs_in_float32_too():
    plan = SequencePlan.from_masks(
        None, None, text_shape=(1, 1), pixel_shape=(1, 3, 11 * 16, 19 * 16), patch_size=(16, 16), position_grid=12
    )
    table = torch.randn(144, 8)
    mine = (table[plan.pos_index - 1] * plan.pos_weight[..., None]).sum(1)
    grid = table.T.view(1, 8, 12, 12)
    theirs = torch.nn.functional.interpolate(grid, size=(11, 19), mode="bilinear", align_corners=True)
    theirs64 = torch.nn.functional.interpolate(grid.double(), size=(11, 19), mode="bilinear", align_corners=True)
    error = (mine - theirs64[0].flatten(1).T).abs().max()
    assert error <= 2 * (theirs - theirs64).abs().max() + np.finfo(np.float32).eps

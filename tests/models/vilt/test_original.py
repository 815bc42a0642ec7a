"""The original `ViLTransformerSS`, accelerated, against itself in float64."""

import copy

import pytest
import torch
from support.original_vilt import ViLTransformerSS

import vilt_fast
from vilt_fast import InputError


def build(**options):
    torch.manual_seed(0)
    model = ViLTransformerSS(**options).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def make_batch(grids=((3, 5), (2, 4), (3, 1), (1, 1)), key="image"):
    torch.manual_seed(1)
    size = len(grids)
    pixels = torch.zeros(size, 3, 48, 80, dtype=torch.float64)
    for b, (h, w) in enumerate(grids):
        pixels[b, :, : h * 16, : w * 16] = torch.randn(3, h * 16, w * 16, dtype=torch.float64)
    masks = torch.ones(size, 9, dtype=torch.long)
    masks[1, 5:] = 0
    masks[2, 2] = 0
    masks[3] = 0
    ids = torch.randint(1, 50, (size, 9))
    labels = torch.full((size, 9), -100)
    return {
        "text_ids": ids, "text_ids_mlm": ids.flip(1), "text_labels": labels, "text_labels_mlm": labels + 1,
        "text_masks": masks, key: [pixels],
    }  # fmt: skip


def assert_same(actual, expected, batch):
    """Equal wherever the reference means something."""
    assert actual.keys() == expected.keys()
    for name, pad in (("text_feats", batch["text_masks"]), ("image_feats", expected["image_masks"])):
        real = pad.bool()[..., None]
        assert actual[name].shape == expected[name].shape
        torch.testing.assert_close(actual[name] * real, expected[name] * real)
        assert not (actual[name] * ~real).any()
    for name in ("cls_feats", "raw_cls_feats"):
        torch.testing.assert_close(actual[name], expected[name])
    for name in ("image_masks", "text_labels", "text_ids", "text_masks"):
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.core
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("max_image_len", [-1, 6])
@pytest.mark.parametrize("options", [{}, {"mask_text": True}, {"image_token_type_idx": 2}])
def test_infer(grad, max_image_len, options):
    model = build(max_image_len=max_image_len)
    batch = make_batch(key="image_1" if options.get("image_token_type_idx") == 2 else "image")
    with torch.set_grad_enabled(grad):
        torch.manual_seed(3)
        expected = model.infer(batch, **options)
        vilt_fast.accelerate(model, patch_order="reference")
        torch.manual_seed(3)
        actual = model.infer(batch, **options)
    assert_same(actual, expected, batch)
    real = expected["image_masks"][:, 1:].bool()
    assert torch.equal(actual["patch_index"][0][real], expected["patch_index"][0][real])
    assert actual["patch_index"][1] == tuple(expected["patch_index"][1])


def test_infer_with_ready_image_embeddings():
    model, batch = build(), make_batch()
    embeds, masks, _, _ = model.transformer.visual_embed(batch["image"][0], max_image_len=-1)
    expected = model.infer(batch, image_embeds=embeds, image_masks=masks)
    vilt_fast.accelerate(model)
    assert_same(model.infer(batch, image_embeds=embeds, image_masks=masks), expected, batch)


def test_gradients_and_forward():
    model, batch = build(), make_batch()
    fast = vilt_fast.accelerate(copy.deepcopy(model), patch_order="reference")
    for m in (model, fast):
        torch.manual_seed(3)
        out = m(batch)
        (out["cls_feats"].sum() + (out["text_feats"] * batch["text_masks"][..., None]).square().sum()).backward()
    for (name, p), q in zip(model.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)


def test_each_norms_own_eps_is_used():
    model, batch = build(), make_batch()
    with torch.no_grad():
        model.transformer.blocks[1].norm2.eps = 0.3
        torch.manual_seed(3)
        expected = model.infer(batch)
        vilt_fast.accelerate(model, patch_order="reference")
        torch.manual_seed(3)
        assert_same(model.infer(batch), expected, batch)


def test_hooks_and_stochastic_depth_take_the_modules_path():
    model, batch = build(), make_batch()
    vilt_fast.accelerate(model, patch_order="reference")
    shapes = []
    model.transformer.blocks[1].mlp.fc1.register_forward_hook(lambda m, i, o: shapes.append(o.shape))
    model.text_embeddings.register_forward_hook(lambda m, i, o: shapes.append(o.shape))
    model.infer(batch)
    assert shapes == [(4, 9, 32), (4, 9 + 16, 64)]


def test_restore_and_bad_input():
    model, batch = build(), make_batch()
    torch.manual_seed(3)
    expected = model.infer(batch)
    vilt_fast.restore(vilt_fast.accelerate(model))
    assert "infer" not in model.__dict__
    torch.manual_seed(3)
    again = model.infer(batch)
    assert all(torch.equal(again[k], expected[k]) for k in ("text_feats", "image_feats", "cls_feats"))
    vilt_fast.accelerate(model)
    with pytest.raises(InputError, match="as many images"):
        model.infer(batch | {"image": [batch["image"][0][:2]]})
    with pytest.raises(InputError, match=r"image must be \[B, C, H, W\], got \[3, 48, 80\].*unsqueeze"):
        model.infer(batch | {"image": [batch["image"][0][0]]})
    with pytest.raises(TypeError, match="text_ids must be a tensor, got list of 4 list"):
        model.infer(batch | {"text_ids": batch["text_ids"].tolist()})
    with pytest.raises(InputError, match="truncate"):
        model.infer(batch | {"text_ids": torch.ones(4, 13, dtype=torch.long)})
    holed = batch["image"][0].clone()
    holed[0, :, 16, 16] = 0
    with pytest.raises(InputError, match="rectangle"):
        model.infer(batch | {"image": [holed]})

"""Masked patch prediction: its three forms written out sample by sample, with every gradient."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support import objectives as written
from support.models import assert_close
from torch import nn
from transformers import ViltForMaskedLM

from vilt_fast import InputError
from vilt_fast.objectives import MaskedPatchHead, mpp_loss
from vilt_fast.objectives.mpp import masked_patches
from vilt_fast.testing import random_weights

FORMS = ("classes", "pixels", "features")


def build(form, dtype=torch.float64):
    model = written.build(ViltForMaskedLM, dtype)
    model.mpp_score = random_weights(MaskedPatchHead(model.config, form), seed=1).to(dtype)
    return model


def draw(seed=5):
    return torch.Generator().manual_seed(seed)


def expected(model, given, form):
    """Image tokens made by hand, and HuggingFace's trunk on them, a sample at a time."""
    masked, replaced = masked_patches(sum(h * w for h, w in written.GRIDS), draw())
    trunk, head, losses, start = model.vilt, model.mpp_score, [], 0
    table = trunk.embeddings.position_embeddings[0]
    projection = trunk.embeddings.patch_embeddings.projection
    for b, (h, w) in enumerate(written.GRIDS):
        image = given["pixel_values"][b : b + 1, :, : h * written.PATCH, : w * written.PATCH]
        features = projection(image)[0].flatten(1).T
        grid = table[1:].T.view(1, -1, 4, 4)
        places = F.interpolate(grid, size=(h, w), mode="bilinear", align_corners=True)[0].flatten(1).T
        own, other = (m[start : start + h * w] for m in (masked, replaced))
        start += h * w
        shown = torch.stack([head.mask_token if r else f for f, r in zip(features, other, strict=True)])
        cls = trunk.embeddings.cls_token[0] + table[:1]
        real = given["attention_mask"][b].bool()
        hidden = trunk(
            input_ids=given["input_ids"][b][real][None], token_type_ids=given["token_type_ids"][b][real][None],
            image_embeds=torch.cat([cls, shown + places])[None], pixel_mask=torch.ones(1, 1 + h * w),
        ).last_hidden_state[0, -h * w :]  # fmt: skip
        for place in own.nonzero()[:, 0].tolist():
            y, x = place // w * written.PATCH, place % w * written.PATCH
            patch = image[0, :, y : y + written.PATCH, x : x + written.PATCH]
            out = head(hidden[place])
            if form == "classes":
                levels = ((patch * 0.5 + 0.5).mean((1, 2)) * 255).long().clamp(0, 255)
                losses += [-out[256 * c : 256 * c + 256].log_softmax(0)[level] for c, level in enumerate(levels)]
            else:
                losses.append((out - (patch.flatten() if form == "pixels" else features[place].detach())).square())
    return torch.cat([loss.reshape(-1) for loss in losses]).mean()


@pytest.mark.parametrize("form", FORMS)
def test_values_and_every_gradient(form):
    model, given = build(form), written.batch()
    loss = expected(model, given, form)
    gradients = written.gradients(model, loss)
    for how in ("plain", "accelerated"):
        ours = copy.deepcopy(model) if how == "plain" else written.accelerated(model)
        got = mpp_loss(ours.train(), given, generator=draw())
        assert_close(got, loss, how)
        for name, gradient in written.gradients(ours, got).items():
            assert_close(gradient, gradients[name], f"{how} {name}")
        assert gradients["mpp_score.mask_token"].any()


def test_how_many_are_masked_and_replaced():
    masked, replaced = masked_patches(60000, draw(0))
    assert not (replaced & ~masked).any()
    assert abs(masked.double().mean() - 0.15) < 0.005  # 3.5 deviations
    assert abs(replaced.sum() / masked.sum() - 0.8) < 0.015
    again = masked_patches(60000, draw(0))
    assert torch.equal(masked, again[0]) and torch.equal(replaced, again[1])


@pytest.mark.parametrize("form", FORMS)
def test_no_masked_patch_is_loss_0_with_gradient_0(form):
    given = {k: v[3:4] for k, v in written.batch().items()}  # an image of one patch
    seed = next(s for s in range(9) if not masked_patches(1, draw(s))[0].any())
    model = written.accelerated(build(form))
    loss = mpp_loss(model, given, generator=draw(seed))
    loss.backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert loss == 0 and found and not any(g.isnan().any() or g.any() for g in found)


def test_sampled_patches_dropout_and_bfloat16():
    model, given = build("pixels"), written.batch()
    model.vilt.embeddings.config.max_image_length = 4
    ours = written.accelerated(model)
    assert mpp_loss(ours, given, generator=draw()) == mpp_loss(ours, given, generator=draw())
    dropping = written.accelerated(build("classes")).train()
    dropping.vilt.embeddings.dropout.p = 0.5
    assert mpp_loss(dropping, given, generator=draw()) != mpp_loss(dropping, given, generator=draw())
    half = written.accelerated(build("features", torch.bfloat16))
    assert mpp_loss(half, written.batch(torch.bfloat16), generator=draw()).dtype == torch.float32


def test_bad_input():
    model, given = build("classes"), written.batch()
    with pytest.raises(ValueError, match="form must be 'classes', 'pixels', 'features', got 'colours'"):
        MaskedPatchHead(model.config, "colours")
    with pytest.raises(TypeError, match="ViltForMaskedLM has no mpp_score"):
        mpp_loss(written.build(ViltForMaskedLM), given)
    with pytest.raises(InputError, match="has no pixel_values"):
        mpp_loss(model, given | {"pixel_values": None})
    with pytest.raises(InputError, match="pixel_mask of sample 0 is empty"):
        mpp_loss(model, given | {"pixel_mask": torch.zeros_like(given["pixel_mask"])})
    model.vilt.embeddings.patch_embeddings = nn.Sequential(model.vilt.embeddings.patch_embeddings)
    with pytest.raises(TypeError, match="own embedding of them, and it has a Sequential"):
        mpp_loss(model, given)

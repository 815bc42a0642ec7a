"""Masked patch prediction in the original's three forms: of a masked patch, predict its colour, pixels or embedding.

Of the real patches each is chosen with probability 0.15; of these 80 % are embedded as a learned token in place of
their projection (their place is kept), the others as they are. The original has the names of all three forms and runs
none: `visual_embed` has no `mask_token`, and nobody makes the labels of the last two. Its paper (ViLT, Kim et al. 2021,
sec. 4.6) found no gain in it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.vilt import modeling_vilt as hf

from .. import functional
from ..engine.listeners import live
from ..models.vilt.inputs import Inputs
from ..models.vilt.known import patch_size, tables, why_not_known
from ..models.vilt.options import ViltOptions
from ..models.vilt.patches import cells
from ..models.vilt.reads import Reads
from ..models.vilt.states import states, trunk_of
from ._batch import of_forward, tensor, wide

FORMS = ("classes", "pixels", "features")
LEVELS, MASKED, REPLACED = 256, 0.15, 0.8


class MaskedPatchHead(nn.Module):
    """What predicts masked patches from their final hidden states: dense, activation, LayerNorm, decoder.

    Put it on a model as `model.mpp_score = MaskedPatchHead(model.config, form)`; it trains and is saved with it.

    Args:
        config: the model's `ViltConfig`.
        form: "classes", 256 levels of the mean of each colour channel; "pixels", the patch's pixels as the model is
            given them; "features", the patch's projection, which counts as a constant.
    """

    def __init__(self, config, form: str = "classes"):
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"form must be {', '.join(map(repr, FORMS))}, got {form!r}.")
        self.form, channels = form, config.num_channels
        sizes = {
            "classes": LEVELS * channels,
            "pixels": channels * config.patch_size**2,
            "features": config.hidden_size,
        }
        self.mask_token = nn.Parameter(torch.zeros(config.hidden_size))
        self.transform = hf.ViltPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, sizes[form])
        for parameter in (self.mask_token, self.transform.dense.weight, self.decoder.weight):
            nn.init.normal_(parameter, std=config.initializer_range)
        for linear in (self.transform.dense, self.decoder):
            nn.init.zeros_(linear.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., 256 * channels], [..., channels * patch * patch] or [..., D]."""
        return self.decoder(self.transform(hidden))


def mpp_loss(model: nn.Module, batch: Mapping, *, generator: torch.Generator | None = None) -> torch.Tensor:
    """Of masked patches, the mean cross entropy of a channel's level, or the mean square error.

    Args:
        model: has a `vilt`, with HuggingFace's own embedding, and a :class:`MaskedPatchHead` as its `mpp_score`;
            accelerated or not.
        batch: input_ids, attention_mask, token_type_ids; pixel_values normalised with mean and deviation 0.5, as ViLT's
            processor does, and pixel_mask.
        generator: draws which patches are masked and which of these replaced; torch's own by default. What a
            generator of a GPU draws is waited for.

    Returns:
        A scalar in at least float32; 0 with gradient 0 where no patch is masked.

    Raises:
        InputError: missing or misshapen tensors. TypeError: a model without these parts, or with another embedding.
    """
    trunk, head = trunk_of(model, "mpp_score"), model.mpp_score
    if why := why_not_known(trunk.embeddings):
        raise TypeError(f"masked patches need HuggingFace's own embedding of them, and {why}.")
    tensor(batch, "input_ids", (None, None))
    pixels = tensor(batch, "pixel_values", (len(batch["input_ids"]), None, None, None))
    given = of_forward(batch)
    checked = Inputs.checked(trunk, **dict.fromkeys(("attention_mask", "token_type_ids", "pixel_mask")) | given)
    plan = checked.plan(trunk, ViltOptions(generator=generator))
    masked, replaced = masked_patches(len(plan.patch_source), generator)
    # Numbers, not a mask: how many there are is known here, and picking by a mask would wait for the device.
    chosen = masked.nonzero()[:, 0].to(pixels.device, non_blocking=True)
    replaced = replaced.to(pixels.device, non_blocking=True)
    given["image_embeds"], given["pixel_mask"], places = _embedded(trunk, head, pixels, plan, replaced)
    del given["pixel_values"]
    read = states(trunk, given, Reads(0, whole=True))
    predicted = wide(head(read.image.flatten(0, 1).index_select(0, places.index_select(0, chosen))))
    patches = _cut(pixels, plan, patch_size(trunk.embeddings), chosen)
    if head.form == "classes":
        levels = ((patches.flatten(2).mean(-1) * 0.5 + 0.5) * (LEVELS - 1)).long().clamp(0, LEVELS - 1)
        losses = F.cross_entropy(predicted.view(-1, LEVELS), levels.flatten(), reduction="none")
    elif head.form == "pixels":
        losses = F.mse_loss(predicted, patches.flatten(1).to(predicted), reduction="none")
    else:
        projection = trunk.embeddings.patch_embeddings.projection
        with torch.no_grad():
            own = F.linear(patches.flatten(1).to(projection.weight), projection.weight.flatten(1), projection.bias)
        losses = F.mse_loss(predicted, own.to(predicted), reduction="none")
    return losses.sum() / max(losses.numel(), 1)


def masked_patches(count: int, generator: torch.Generator | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [count] over the patches of all images, row by row: which are masked, and which of these are replaced."""
    device = "cpu" if generator is None else generator.device
    drawn = torch.rand(2, count, generator=generator, device=device).cpu()
    masked = drawn[0] < MASKED
    return masked, masked & (drawn[1] < REPLACED)


def _cut(pixels, plan, size, chosen):
    """The pixels [m, C, ph, pw] of the patches of a plan that have these numbers [m]."""
    gh, gw = plan.patch_grid
    cell = plan.patch_source.index_select(0, chosen) % (gh * gw)
    return cells(pixels, size)[plan.patch_sample.index_select(0, chosen), cell // gw, cell % gw]


def _embedded(trunk, head, pixels, plan, replaced):
    """(image tokens [B, I, D] as `image_embeds`, [CLS] first; int64 [B, I], which are real; where each patch is)."""
    found, batch, device = tables(trunk.embeddings), plan.batch, plan.device
    weight, position = found.projection.weight, found.image_position[0]
    samples, count = torch.arange(batch, device=device), len(plan.patch_source)
    rows = functional.patch_embed(
        pixels.to(weight.dtype), weight, found.projection.bias, found.cls_token.reshape(-1), position, None, None, None,
        plan.patch_source, batch + torch.arange(count, device=device), plan.patch_sample, plan.pos_index,
        plan.pos_weight, samples, None, batch + count, out_dtype=torch.promote_types(weight.dtype, torch.float32),
    )  # fmt: skip
    cls, patches = rows.tensor_split([batch])
    corners = (position.to(rows)[plan.pos_index] * plan.pos_weight.to(rows)[..., None]).sum(1)
    patches = torch.where(replaced[:, None], head.mask_token.to(rows) + corners, patches)
    width = plan.image_length
    first = torch.searchsorted(plan.patch_sample, samples)
    places = plan.patch_sample * width + 1 + torch.arange(count, device=device) - first[plan.patch_sample]
    at = torch.cat([samples * width, places])
    tokens = F.dropout(torch.cat([cls, patches]), live(found.image_dropout)).to(weight.dtype)
    embeds = tokens.new_zeros(batch * width, tokens.shape[1]).index_copy(0, at, tokens)
    real = torch.zeros(batch * width, dtype=torch.long, device=device).index_fill(0, at, 1)
    return embeds.view(batch, width, -1), real.view(batch, width), places

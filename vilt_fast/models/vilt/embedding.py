"""Packed embeddings: the tables that every ViLT has, and the rows they make."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from torch.nn import functional as F

from ... import functional
from ...engine.listeners import is_plain, live
from ...engine.quantization import WeightCache
from ...engine.recomputed import recomputed
from .plan import SequencePlan


@dataclasses.dataclass(frozen=True, slots=True)
class Tables:
    """Where a model keeps what it embeds with. T text positions, M modalities, G*G image positions."""

    word: nn.Embedding
    position: nn.Embedding
    token_type: nn.Embedding
    norm: nn.LayerNorm
    text_dropout: nn.Dropout
    modality: nn.Embedding
    projection: nn.Conv2d
    cls_token: torch.Tensor  #: [1, 1, D]
    image_position: torch.Tensor  #: [1, 1 + G*G, D]
    image_dropout: nn.Dropout
    position_ids: torch.Tensor | None = None  #: [1, >= T] rows of `position`; None: 0, 1, 2, ...
    token_type_ids: torch.Tensor | None = None  #: [1, >= T] rows of `token_type` where none are given; None: 0

    @property
    def plain(self) -> bool:
        """Whether the parameters tell all that the modules compute."""
        lookups = (self.word, self.position, self.token_type, self.modality)
        if any(not is_plain(t, nn.Embedding) or t.max_norm or t.scale_grad_by_freq or t.sparse for t in lookups):
            return False
        if not all(is_plain(d, nn.Dropout) for d in (self.text_dropout, self.image_dropout)):
            return False
        return is_plain(self.norm, nn.LayerNorm) and is_patchwise(self.projection)


def is_patchwise(convolution: nn.Module) -> bool:
    """Whether a convolution maps each square patch on its own. Its weight tells the size that is computed with."""
    return (
        is_plain(convolution, nn.Conv2d)
        and convolution.stride == tuple(convolution.weight.shape[2:])
        and convolution.stride[0] == convolution.stride[1]
        and convolution.padding == (0, 0)
        and convolution.dilation == (1, 1)
        and convolution.groups == 1
    )


def text_rows(
    tables: Tables,
    plan: SequencePlan,
    *,
    ids: torch.Tensor | None = None,
    embeds: torch.Tensor | None = None,
    token_types: torch.Tensor | None = None,
) -> torch.Tensor:
    """Embedded text tokens [n, D] in the order of `plan.text_source`.

    Args:
        ids: [B, T], or None and
        embeds: [B, T, D] in its place.
        token_types: [B, T] or [1, T]; None for those that the tables have.
    """
    given = ids if ids is not None else embeds
    batch, length = given.shape[:2]
    source = plan.text_source
    # Images that share a text (NLVR2) share its rows; where dropout is live each copy has its own, as in the reference.
    copies = 1 if live(tables.text_dropout) else len(plan.widths)
    source = source[: len(source) // copies]
    rows = text_of(
        tables,
        source % max(length, 1),
        ids=None if ids is None else ids.reshape(-1).index_select(0, source),
        embeds=None if embeds is None else embeds.reshape(batch * length, -1).index_select(0, source),
        token_types=None
        if token_types is None
        else token_types.expand(batch, length).reshape(-1).index_select(0, source),
    )
    return rows if copies == 1 else rows.repeat(copies, 1)


def text_of(
    tables: Tables,
    place: torch.Tensor,
    *,
    ids: torch.Tensor | None = None,
    embeds: torch.Tensor | None = None,
    token_types: torch.Tensor | None = None,
) -> torch.Tensor:
    """Embedded text tokens [n, D], each given with its place in its text [n], its id [n] or embedding [n, D] and, if it
    is not the one that the tables have for this place, its type [n]."""
    if token_types is None and tables.token_type_ids is not None:
        token_types = tables.token_type_ids[0].index_select(0, place)
    return functional.text_embed(
        ids,
        embeds,
        place if tables.position_ids is None else tables.position_ids[0].index_select(0, place),
        token_types,
        tables.word.weight,
        tables.position.weight,
        tables.token_type.weight,
        tables.norm.weight,
        tables.norm.bias,
        tables.modality.weight,
        eps=tables.norm.eps,
        padding_idx=tables.word.padding_idx,
        dropout_p=live(tables.text_dropout),
    )


def with_patches(
    tables: Tables,
    plan: SequencePlan,
    text: torch.Tensor,
    pixels: torch.Tensor,
    modality: torch.Tensor,
    weights: WeightCache | None = None,
) -> torch.Tensor:
    """Packed rows [N, D] from embedded text [n, D] and pixels [images, C, H, W]; `modality` [B] is each image's row.

    With `weights`, by the int8 copy of the projection, where its weight has one.
    """
    weight, bias = tables.projection.weight, tables.projection.bias
    if not pixels.is_floating_point():
        pixels = pixels.to(weight.dtype)
    dropout_p, dtype = live(tables.image_dropout), weight.dtype
    given = (tables.cls_token.reshape(-1), tables.image_position[0], tables.modality.weight, text)

    def rows(pixels, weight, bias, cls_token, position, table, text):
        return functional.patch_embed(
            pixels, weight, bias, cls_token, position, table, text, plan.text_rows, plan.patch_source, plan.patch_rows,
            plan.patch_sample, plan.pos_index, plan.pos_weight, plan.cls_rows, modality, plan.total_rows,
            dropout_p=dropout_p, out_dtype=dtype,
        )  # fmt: skip

    floats = {t.dtype for t in (pixels, weight, *given)}
    if weights is None or pixels.is_cuda or dropout_p or not floats <= {torch.float32, torch.bfloat16}:
        return rows(pixels, weight, bias, *given)

    def fast(pixels):
        return rows(pixels, weights.blob("patches", weight), bias, *given)

    def exact(pixels, weight, *rest):
        return rows(pixels, weight, *(rest if bias is not None else (None, *rest)))

    return recomputed(fast, exact, pixels, [t for t in (weight, bias, *given) if t is not None])


def with_shared_patches(
    tables: Tables, plan: SequencePlan, text: torch.Tensor, pixels: torch.Tensor, modality: torch.Tensor
) -> torch.Tensor:
    """Packed rows [N, D] of samples that share images, as `plan` says: a patch is projected once, whoever has it.

    `pixels` is [images, C, H, W]. Dropout and the modality come after: each sample has its own, as if its image were
    nobody else's.
    """
    weight = tables.projection.weight
    if not pixels.is_floating_point():
        pixels = pixels.to(weight.dtype)
    wide, images = torch.promote_types(weight.dtype, torch.float32), len(pixels)
    area, distinct, device = plan.patch_grid[0] * plan.patch_grid[1], plan.distinct, plan.device
    embedded = functional.patch_embed(
        pixels, weight, tables.projection.bias, tables.cls_token.reshape(-1), tables.image_position[0], None, None,
        None, distinct, images + torch.arange(len(distinct), device=device), distinct // area,
        plan.pos_index.index_select(0, plan.distinct_at), plan.pos_weight.index_select(0, plan.distinct_at),
        torch.arange(images, device=device), None, images + len(distinct), out_dtype=wide,
    )  # fmt: skip
    image = embedded.index_select(0, torch.cat([plan.image_of, images + plan.distinct_of]))
    image = F.dropout(image, live(tables.image_dropout))
    row = torch.cat([modality, modality.index_select(0, plan.patch_sample)])
    image = image + tables.modality.weight.to(wide).index_select(0, row)
    rows = image.new_zeros(plan.total_rows, image.shape[1]).index_copy(0, plan.text_rows, text.to(wide))
    return rows.index_copy(0, torch.cat([plan.cls_rows, plan.patch_rows]), image).to(weight.dtype)


def with_image_embeds(
    tables: Tables, plan: SequencePlan, text: torch.Tensor, image: torch.Tensor, modality: torch.Tensor
) -> torch.Tensor:
    """Packed rows [N, D] from embedded text [n, D] and ready image tokens [images, P, D]."""
    image = image.flatten(0, 1).index_select(0, plan.patch_source)
    image = image + tables.modality.weight[modality[plan.patch_sample]]
    rows = text.new_zeros(plan.total_rows, text.shape[1], dtype=torch.promote_types(text.dtype, image.dtype))
    rows = rows.index_copy(0, plan.text_rows, text.to(rows.dtype))
    return rows.index_copy(0, plan.patch_rows, image.to(rows.dtype))

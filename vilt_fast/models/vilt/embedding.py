"""Packed embeddings: the tables that every ViLT has, and the rows they make."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from ... import functional
from ...engine.listeners import live
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

    @property
    def plain(self) -> bool:
        """Whether the parameters tell all that the modules compute."""
        lookups = (self.word, self.position, self.token_type, self.modality)
        if any(type(t) is not nn.Embedding or t.max_norm or t.scale_grad_by_freq or t.sparse for t in lookups):
            return False
        if type(self.norm) is not nn.LayerNorm or any(
            type(d) is not nn.Dropout for d in (self.text_dropout, self.image_dropout)
        ):
            return False
        conv = self.projection
        return (
            type(conv) is nn.Conv2d
            and conv.kernel_size == conv.stride
            and conv.kernel_size[0] == conv.kernel_size[1]
            and conv.padding == (0, 0)
            and conv.dilation == (1, 1)
            and conv.groups == 1
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
        token_types: [B, T] or [1, T]; None for all 0.
    """
    given = ids if ids is not None else embeds
    batch, length = given.shape[:2]
    source = plan.text_source
    # Images that share a text (NLVR2) share its rows; where dropout is live each copy has its own, as in the reference.
    copies = 1 if live(tables.text_dropout) else len(plan.widths)
    source = source[: len(source) // copies]
    rows = functional.text_embed(
        None if ids is None else ids.reshape(-1).index_select(0, source),
        None if embeds is None else embeds.reshape(batch * length, -1).index_select(0, source),
        source % max(length, 1),
        None if token_types is None else token_types.expand(batch, length).reshape(-1).index_select(0, source),
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
    return rows if copies == 1 else rows.repeat(copies, 1)


def with_patches(
    tables: Tables, plan: SequencePlan, text: torch.Tensor, pixels: torch.Tensor, modality: torch.Tensor
) -> torch.Tensor:
    """Packed rows [N, D] from embedded text [n, D] and pixels [images, C, H, W]; `modality` [B] is each image's row."""
    if not pixels.is_floating_point():
        pixels = pixels.to(tables.projection.weight.dtype)
    return functional.patch_embed(
        pixels,
        tables.projection.weight,
        tables.projection.bias,
        tables.cls_token.reshape(-1),
        tables.image_position[0],
        tables.modality.weight,
        text,
        plan.text_rows,
        plan.patch_source,
        plan.patch_rows,
        plan.patch_sample,
        plan.pos_index,
        plan.pos_weight,
        plan.cls_rows,
        modality,
        plan.total_rows,
        dropout_p=live(tables.image_dropout),
    )


def with_image_embeds(
    tables: Tables, plan: SequencePlan, text: torch.Tensor, image: torch.Tensor, modality: torch.Tensor
) -> torch.Tensor:
    """Packed rows [N, D] from embedded text [n, D] and ready image tokens [images, P, D]."""
    image = image.flatten(0, 1).index_select(0, plan.patch_source)
    image = image + tables.modality.weight[modality[plan.patch_sample]]
    rows = text.new_zeros(plan.total_rows, text.shape[1], dtype=torch.promote_types(text.dtype, image.dtype))
    rows = rows.index_copy(0, plan.text_rows, text.to(rows.dtype))
    return rows.index_copy(0, plan.patch_rows, image.to(rows.dtype))

"""The packed rows that HuggingFace's ViLT starts from: by its tables, or by its embedding module itself."""

from __future__ import annotations

import contextlib
import threading

import numpy as np
import torch
from transformers.models.vilt import modeling_vilt as hf

from ...engine.listeners import any_hooked
from ...errors import InputError
from . import embedding
from .inputs import Inputs, joined
from .options import ViltOptions
from .plan import SequencePlan


def embed(model: hf.ViltModel, images: list[Inputs], plan: SequencePlan | None, options: ViltOptions):
    """Packed rows [N, D] of the same text with each of `images`, and the plan they follow.

    That plan is the given one, except where the embedding module has hooks or replaced parts: then the module itself
    makes the rows, and draws its own patches.
    """
    if not _is_known(model.embeddings):
        return _embed_padded(model, images, options)
    tables = _tables(model.embeddings)
    first = images[0]
    if plan is None:
        plan = joined([inputs.plan(model, options) for inputs in images])
    elif plan.layout != (layout := first.layout(model, len(images))):
        raise InputError(f"sequence_plan is for {plan.layout}, the inputs are {layout}.")
    text = embedding.text_rows(
        tables, plan, ids=first.input_ids, embeds=first.inputs_embeds, token_types=first.token_type_ids
    )
    batch = first.text_shape[
        :1
    ]  # filled on the device: a tensor made from a list would be copied there, and waited for
    modality = torch.cat([torch.full(batch, i.modality, device=text.device) for i in images])
    # In the flattened images of NLVR2, image i of sample b is number b * images + i; the plan looks them up there.
    if first.pixel_values is None:
        return embedding.with_image_embeds(
            tables, plan, text, _stacked([i.image_embeds for i in images]), modality
        ), plan
    return embedding.with_patches(tables, plan, text, _stacked([i.pixel_values for i in images]), modality), plan


def _stacked(tensors):
    """`torch.stack(tensors, 1).flatten(0, 1)`, without a copy where they already lie like that."""
    if len(tensors) == 1:
        return tensors[0]
    first, step = tensors[0], tensors[0].stride(0) // len(tensors)
    adjacent = not torch.compiler.is_compiling() and all(  # a tensor that is traced has no address
        t.stride() == first.stride() and t.data_ptr() == first.data_ptr() + i * step * t.element_size()
        for i, t in enumerate(tensors)
    )
    whole = first._base
    shape = (len(first), len(tensors), *first.shape[1:])
    if adjacent and whole is not None and whole.is_contiguous() and whole.shape == shape:
        return whole.flatten(0, 1)
    return torch.stack(tensors, 1).flatten(0, 1)


def _is_known(embeddings) -> bool:
    """Whether the tables tell all that the embedding module computes."""
    if any_hooked(embeddings) or type(embeddings) is not hf.ViltEmbeddings:
        return False
    if "visual_embed" in embeddings.__dict__:
        return False
    if type(embeddings.text_embeddings) is not hf.TextEmbeddings:
        return False
    return type(embeddings.patch_embeddings) is hf.ViltPatchEmbeddings and _tables(embeddings).plain


def _tables(embeddings) -> embedding.Tables:
    text = embeddings.text_embeddings
    return embedding.Tables(
        word=text.word_embeddings,
        position=text.position_embeddings,
        token_type=text.token_type_embeddings,
        norm=text.LayerNorm,
        text_dropout=text.dropout,
        modality=embeddings.token_type_embeddings,
        projection=embeddings.patch_embeddings.projection,
        cls_token=embeddings.cls_token,
        image_position=embeddings.position_embeddings,
        image_dropout=embeddings.dropout,
    )


# --- the embedding module itself --------------------------------------------------------------------------------------

_watching = threading.RLock()
_NO_CELLS = np.zeros(0, np.int64)


@contextlib.contextmanager
def _watched_patches(embeddings):
    """Collects what `visual_embed` returns, which the module's forward keeps to itself."""
    seen = []
    with _watching:
        before = embeddings.__dict__.get("visual_embed")
        visual_embed = embeddings.visual_embed

        def watched(*args, **kwargs):
            seen.append(visual_embed(*args, **kwargs))
            return seen[-1]

        embeddings.visual_embed = watched
        try:
            yield seen
        finally:
            if before is None:
                del embeddings.visual_embed
            else:
                embeddings.visual_embed = before


def _embed_padded(model, images, options):
    rows, plans = [], []
    known = isinstance(model.embeddings, hf.ViltEmbeddings)
    for inputs in images:
        if known:  # the masks' checks, before the module sees them; no cells: nothing is drawn here
            inputs.plan(model, options, cells=[_NO_CELLS] * inputs.text_shape[0])
        attention_mask, pixel_mask = inputs.attention_mask, inputs.pixel_mask
        if attention_mask is None:
            attention_mask = torch.ones(inputs.text_shape, device=inputs.text.device)
        if pixel_mask is None:
            side = model.config.image_size
            pixel_mask = torch.ones((inputs.text_shape[0], side, side), device=inputs.text.device)
        with _watched_patches(model.embeddings) if known else contextlib.nullcontext() as seen:
            padded, mask = model.embeddings(
                inputs.input_ids,
                attention_mask,
                inputs.token_type_ids,
                inputs.pixel_values,
                pixel_mask,
                inputs.inputs_embeds,
                inputs.image_embeds,
                image_token_type_idx=inputs.modality,
            )
        if not seen:
            text, image = mask.tensor_split([inputs.text_shape[1]], dim=1)
            plans.append(SequencePlan.from_keep_mask(text, image, text_shape=inputs.text_shape))
            rows.append(plans[-1].pack(padded))
            continue
        _, image_mask, (patch_index, (_, width)) = seen[0]
        drawn = (patch_index[..., 0] * width + patch_index[..., 1]).cpu().numpy()
        kept = image_mask[:, 1:].bool().cpu().numpy()
        plan = inputs.plan(model, options, cells=[d[k] for d, k in zip(drawn, kept, strict=True)])
        packed = plan.pack(padded)
        if options.patch_order == "raster":
            plan, packed = plan.raster(packed)
        plans.append(plan)
        rows.append(packed)
    return torch.cat(rows), joined(plans)

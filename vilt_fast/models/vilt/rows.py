"""The packed rows that HuggingFace's ViLT starts from: by its tables, or by its embedding module itself."""

from __future__ import annotations

import contextlib
import threading

import numpy as np
import torch
from transformers.models.vilt import modeling_vilt as hf

from ... import record
from ...engine.quantization import WeightCache
from . import embedding
from .inputs import Inputs, check_plan, joined
from .known import draws_its_patches, is_listened_to, only_records, takes_what_is_given, why_not_known
from .options import ViltOptions
from .plan import SequencePlan


def planned(
    model: hf.ViltModel, images: list[Inputs], plan: SequencePlan | None, options: ViltOptions, known: bool = False
) -> SequencePlan | None:
    """The plan of a call: the given one, or one made for these inputs; None where the embedding module, which has hooks
    or replaced parts, is to find its tokens itself. `known`: that it has none has been looked at."""
    if not known and (images[0].tables is None or is_listened_to(model.embeddings)):
        return None
    if plan is None:
        return joined([inputs.plan(model, options) for inputs in images])
    check_plan(plan, images, model, options)
    return plan


def embed(
    model: hf.ViltModel,
    images: list[Inputs],
    plan: SequencePlan | None,
    options: ViltOptions,
    weights: WeightCache | None = None,
):
    """Packed rows [N, D] of the same text with each of `images`, and the plan they follow.

    That plan is the given one, as `planned` gives it. Without one, the embedding module itself makes the rows of the
    one image that there is, and draws its own patches. `weights` are int8 copies, if any.
    """
    first = images[0]
    if plan is None:
        rows, plan = _embed_padded(model, first.one_image_each(), options)
        if record.listened():
            record.say("padded", why_not_known(model.embeddings), ("embedding", model.embeddings))
        return rows, plan
    tables = first.tables
    text = embedding.text_rows(
        tables, plan, ids=first.input_ids, embeds=first.inputs_embeds, token_types=first.token_type_ids
    )
    if first.input_ids is not None and torch.is_grad_enabled() and only_records(tables.word):
        text.requires_grad_()
    record.say("packed", "", ("text embedding", model.embeddings.text_embeddings))
    # Filled on the device: a tensor made from a list would be copied there, and waited for.
    batch = first.text_shape[:1]
    modality = torch.cat([torch.full(batch, i.modality, device=text.device) for i in images])
    # In the flattened images of NLVR2, image i of sample b is number b * images + i; the plan looks them up there.
    if first.pixel_values is None:
        image = _stacked([i.image_embeds for i in images])
        rows = embedding.with_image_embeds(tables, plan, text, image, modality)
    elif first.image_of is not None:
        rows = embedding.with_shared_patches(tables, plan, text, first.pixel_values, modality)
    else:
        image = _stacked([i.pixel_values for i in images])
        rows = embedding.with_patches(tables, plan, text, image, modality, weights)
    record.say("packed", "", ("image embedding", model.embeddings.patch_embeddings))
    return rows, plan


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


# --- the embedding module itself --------------------------------------------------------------------------------------

_watching = threading.RLock()
_NO_CELLS = np.zeros(0, np.int64)


@contextlib.contextmanager
def _watched_patches(embeddings):
    """Collects the masks that `visual_embed` is given and what it returns, which the module's forward keeps to itself.

    Nothing where that method is not HuggingFace's own.
    """
    seen = []
    with _watching:
        if not draws_its_patches(embeddings):
            yield seen
            return
        visual_embed = embeddings.visual_embed

        def watched(pixel_values, pixel_mask, *args, **kwargs):
            seen.append((pixel_mask, *visual_embed(pixel_values, pixel_mask, *args, **kwargs)))
            return seen[-1][1:]

        embeddings.visual_embed = watched
        try:
            yield seen
        finally:
            del embeddings.visual_embed


def _embed_padded(model, inputs: Inputs, options):
    """Packed rows [N, D] of what the module returns, and the plan that its returned mask makes.

    What came of which patch is known where `visual_embed` is HuggingFace's own and the mask is the one that follows
    from it. Else the first T tokens count as text and the others as image, in the order in which they came.
    """
    attention_mask, pixel_mask = inputs.attention_mask, inputs.pixel_mask
    batch, length = inputs.text_shape
    if attention_mask is None:
        attention_mask = torch.ones((batch, length), device=inputs.text.device)
    if pixel_mask is None:
        side = model.config.image_size
        pixel_mask = torch.ones((batch, side, side), device=inputs.text.device)
    if takes_what_is_given(model.embeddings, inputs.tables):
        # The masks' checks, before the module sees them; nothing is drawn here.
        inputs.plan(model, options, cells=([_NO_CELLS] * batch,) * 2)
    with _watched_patches(model.embeddings) as seen:
        returned = model.embeddings(
            inputs.input_ids,
            attention_mask,
            inputs.token_type_ids,
            inputs.pixel_values,
            pixel_mask,
            inputs.inputs_embeds,
            inputs.image_embeds,
            image_token_type_idx=inputs.modality,
        )
    padded, mask = returned
    if mask is None:
        mask = torch.ones(padded.shape[:2], device=padded.device)
    if padded.ndim != 3 or mask.shape != padded.shape[:2]:
        raise TypeError(
            f"{type(model.embeddings).__name__} returned tokens {list(padded.shape)} with a mask {list(mask.shape)}: "
            "accelerate follows a mask [B, L] for tokens [B, L, D]. vilt_fast.restore the model to use another."
        )
    if len(seen) == 1:
        plan = _drawn(inputs, options.padding, *seen[0])
        if plan.width == mask.shape[1] and torch.equal(plan.key_mask(), mask != 0):
            packed = plan.pack(padded, model.embeddings)
            return (packed, plan) if options.patch_order != "raster" else plan.raster(packed)[::-1]
    text, image = mask.tensor_split([length], dim=1)
    plan = SequencePlan.from_keep_mask(text, image, text_shape=text.shape, padding=options.padding)
    return plan.pack(padded, model.embeddings), plan


def _drawn(inputs: Inputs, padding, pixel_mask, _, image_mask, patches) -> SequencePlan:
    """The plan of what `visual_embed` said of the patches that it drew."""
    index, (height, width) = patches
    cells = (index[..., 0] * width + index[..., 1]).cpu().numpy()
    kept = image_mask[:, 1:].bool().cpu().numpy()
    beside = ~kept & (padding == "reference")
    return SequencePlan.from_masks(
        inputs.attention_mask,
        pixel_mask,
        text_shape=inputs.text_shape,
        pixel_shape=(len(cells), 0, height, width),
        patch_size=(1, 1),
        position_grid=1,  # positions are in the rows already
        padding=padding,
        cells=tuple([c[k] for c, k in zip(cells, of, strict=True)] for of in (kept, beside)),
    )

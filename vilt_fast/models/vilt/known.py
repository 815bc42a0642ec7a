"""HuggingFace's embedding module: whether its tables tell all that it computes, and which they are."""

from __future__ import annotations

from torch import nn
from transformers.models.vilt import modeling_vilt as hf

from ...engine.genuine import is_own, own_methods
from ...engine.listeners import any_hooked, inside, is_plain, why_hooked, why_not_plain
from . import embedding


def is_known(embeddings) -> bool:
    """Whether the tables tell all that the embedding module computes, but for what `only_records` says."""
    return not is_listened_to(embeddings) and known_tables(embeddings) is not None


def is_listened_to(embeddings) -> bool:
    """Whether the module has to be called itself because somebody listens to it, but for what `only_records` says."""
    return any_hooked(embeddings, only_records)


def only_records(table) -> bool:
    """Whether all that listens to a table of words is what transformers puts there for gradient checkpointing.

    That is `enable_input_require_grads`: what the table gives requires a gradient from then on, be it frozen or not.
    """
    own = table.__dict__
    if own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return False
    hooks = list(own["_forward_hooks"].values())
    return is_plain(table, nn.Embedding) and bool(hooks) and all(is_own(hook, _RECORDS) for hook in hooks)


_RECORDS = "PreTrainedModel.enable_input_require_grads.<locals>.make_inputs_require_grads"


def why_not_known(embeddings) -> str:
    """Why `is_known` does not hold, or ""."""
    if is_known(embeddings):
        return ""
    if reason := why_hooked(embeddings) or why_not_plain(embeddings, hf.ViltEmbeddings):
        return reason
    for part, kind in (("text_embeddings", hf.TextEmbeddings), ("patch_embeddings", hf.ViltPatchEmbeddings)):
        if reason := why_not_plain(getattr(embeddings, part), kind):
            return reason
    return "its tables, or what makes its patches, are of another make or size than ViLT's"


def takes_what_is_given(embeddings, known: embedding.Tables | None) -> bool:
    """Whether the tables tell which inputs the module can take: what hooks put in their place, they alone know."""
    return known is not None and not any(m.__dict__["_forward_pre_hooks"] for m in inside([embeddings]))


def known_tables(embeddings) -> embedding.Tables | None:
    """The tables, where they tell what the module computes unless somebody listens; else None."""
    if not is_plain(embeddings, hf.ViltEmbeddings):
        return None
    text, patches = embeddings.text_embeddings, embeddings.patch_embeddings
    if not is_plain(text, hf.TextEmbeddings) or not is_plain(patches, hf.ViltPatchEmbeddings):
        return None
    if getattr(text, "position_embedding_type", "absolute") != "absolute":  # transformers 4: none are added then
        return None
    if not _is_row(text.position_ids) or not _is_row(getattr(text, "token_type_ids", None)):
        return None
    found = tables(embeddings)
    return found if _fits(embeddings, found) else None


def _is_row(ids) -> bool:
    return ids is None or (ids.ndim == 2 and len(ids) == 1)


def _fits(embeddings, found: embedding.Tables) -> bool:
    """Whether the tables are plain, and of the sizes that the module's own arithmetic needs."""
    if not found.plain:
        return False
    grid, width = position_grid(embeddings), found.cls_token.shape[-1]
    channels = embeddings.patch_embeddings.num_channels
    return (*found.image_position.shape, *found.projection.weight.shape[:2]) == (1, 1 + grid**2, width, width, channels)


def tables(embeddings) -> embedding.Tables:
    """Where a `ViltEmbeddings` of known parts keeps what it embeds with."""
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
        position_ids=text.position_ids,
        token_type_ids=getattr(text, "token_type_ids", None),
    )


def position_grid(embeddings) -> int:
    """Side of the square table of image positions, as the module reads it; 0 where it could not."""
    sides = embeddings.config.image_size, embeddings.config.patch_size
    return sides[0] // sides[1] if all(isinstance(side, int) for side in sides) else 0


def patch_size(embeddings) -> tuple[int, int]:
    """(height, width) of a patch, by the convolution that makes them; the `patch_size` beside it may be stale.

    Raises:
        TypeError: no known convolution makes the patches.
    """
    patches = getattr(embeddings, "patch_embeddings", None)
    if not is_plain(patches, hf.ViltPatchEmbeddings) or not embedding.is_patchwise(patches.projection):
        raise TypeError(
            f"{type(embeddings).__name__} with {type(patches).__name__} makes its image tokens in a way that is not "
            "known ahead of a call: there is no sequence_plan for it, and its patches cannot be aligned."
        )
    return tuple(patches.projection.weight.shape[2:])


def draws_its_patches(embeddings) -> bool:
    """Whether `visual_embed` is HuggingFace's own, so that the patches it says it drew are those that it drew."""
    own = getattr(type(embeddings), "visual_embed", None) is hf.ViltEmbeddings.visual_embed
    return own and "visual_embed" not in embeddings.__dict__ and bool(own_methods(hf.ViltEmbeddings))

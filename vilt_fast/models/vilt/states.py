"""Final hidden states for an objective: by the packed trunk, or by the module as its own class computes it."""

from __future__ import annotations

import dataclasses

import torch
from torch.nn import functional as F
from transformers.models.vilt import modeling_vilt as hf

from ... import record
from ...engine.genuine import own_methods, why_not_own
from ...engine.listeners import has_hooks, why_hooked
from ...errors import InputError
from ...ops._check import readable
from . import patches
from .given import check_tensors, repeated
from .inputs import Inputs
from .known import draws_its_patches, patch_size
from .reads import Reads
from .trunk import TRACED, TrunkForward, is_known, traced

_NAMES = ("input_ids", "attention_mask", "token_type_ids", "pixel_values", "pixel_mask", "image_embeds")


@dataclasses.dataclass(slots=True)
class States:
    """What was asked for of S samples; T text positions, I image tokens."""

    texts: torch.Tensor  #: [m, D] text tokens of the first samples
    places: torch.Tensor  #: [m] where they lie in the flattened text of these
    pooled: torch.Tensor | None  #: [S', D] of the other samples
    text: torch.Tensor | None = None  #: [S', T, D] of these, if they were asked for whole
    image: torch.Tensor | None = None  #: [S', I, D], [CLS] first
    text_real: torch.Tensor | None = None  #: bool [S', T]
    image_real: torch.Tensor | None = None  #: bool [S', I]


def trunk_of(model, *parts: str) -> hf.ViltModel:
    """The `ViltModel` of a task's model, which has to have these parts too.

    Raises:
        TypeError: it has not, or it is wrapped.
    """
    missing = [name for name in ("vilt", *parts) if not isinstance(getattr(model, name, None), torch.nn.Module)]
    if not missing and isinstance(model.vilt, hf.ViltModel):
        return model.vilt
    if isinstance(getattr(model, "module", None), torch.nn.Module):
        raise TypeError(
            f"{type(model).__name__} wraps a model, and what wraps a model has to see its calls: let the model compute "
            "its loss itself, ViltForPreTraining(**batch).loss, or pass `.module`."
        )
    named = " and ".join(missing) or "a ViltModel as its vilt"
    raise TypeError(f"{type(model).__name__} has no {named}, which this objective reads.")


def why_own(trunk: hf.ViltModel, given: dict) -> str:
    """Why the trunk itself has to be called with these tensors, or ""."""
    swapped = trunk.__dict__.get("forward")
    if not isinstance(swapped, TrunkForward):
        return "the trunk is not accelerated, or something is wrapped around its forward"
    if record.disabled():
        return record.DISABLED
    if has_hooks(trunk):  # it is called past its hooks, so there must be none
        return f"of {type(trunk).__name__}: {why_hooked(trunk, inside=False)}"
    if not own_methods(type(trunk)):
        return why_not_own(type(trunk))
    return swapped.why_transformed(given) or (TRACED if traced(trunk) else "")


def why_apart(trunk: hf.ViltModel, given: dict) -> str:
    """Why two batches may not be computed as one, or ""."""
    if why := why_own(trunk, given):
        return why
    if not is_known(trunk):
        return "which tokens a part of the trunk looks at is not known"
    if trunk.forward.options.patch_order != "raster":
        return "patch_order='reference' draws the patches of each batch by itself"
    return ""


def states(trunk: hf.ViltModel, given: dict, reads: Reads, image_of: tuple[int, ...] | None = None) -> States:
    """Final hidden states of `given`, by the names of `ViltModel.forward`.

    Args:
        given: input_ids [S, T], pixel_values [images, C, H, W], and optionally attention_mask, token_type_ids,
            pixel_mask; or image_embeds [S, I, D] with a pixel_mask [S, I].
        image_of: which image each sample has; None for one each.

    Raises:
        InputError: inputs that the model cannot be computed on. TypeError: they are no tensors.
    """
    given = {name: given.get(name) for name in _NAMES}
    check_tensors(**given)
    image = "pixel_values" if given["image_embeds"] is None else "image_embeds"
    missing = [name for name in ("input_ids", image) if given[name] is None]
    if missing:
        raise InputError(f"the batch has no {' and no '.join(missing)}.")
    if why := why_own(trunk, given):
        record.say("own", why, ("whole trunk", trunk))
        return _by_the_module(trunk, given, reads, image_of)
    computed = trunk.forward.run([Inputs.checked(trunk, **given, image_of=image_of)], reads=reads)
    found = States(computed.texts, computed.places, computed.pooled)
    if reads.whole:
        plan = computed.plan
        padded, real = reads.unpack(plan, computed.others)
        found.text, found.image = padded.tensor_split([plan.text_length], dim=1)
        found.text_real, found.image_real = real.tensor_split([plan.text_length], dim=1)
    return found


def _by_the_module(trunk, given, reads, image_of) -> States:
    if image_of is not None:
        given |= repeated(given, image_of)
    ids, pixels = given["input_ids"], given["pixel_values"]
    if given["pixel_mask"] is None and pixels is not None:  # the module would take it for one of its own image_size
        given["pixel_mask"] = torch.ones((len(pixels), *pixels.shape[2:]), dtype=torch.long, device=pixels.device)
    outputs = trunk(**given, return_dict=True)
    hidden, length = outputs.last_hidden_state, ids.shape[1]
    places = torch.arange(reads.texts * length, device=hidden.device)
    if reads.labelled is not None:
        places = places[reads.labelled.flatten()]
    texts = hidden[: reads.texts, :length].flatten(0, 1).index_select(0, places)
    pooled = None if outputs.pooler_output is None else outputs.pooler_output[reads.texts :]
    found = States(texts, places, pooled)
    if reads.whole:
        found.text, found.image = hidden[reads.texts :].tensor_split([length], dim=1)
        attention = given["attention_mask"]
        real = torch.ones_like(ids) if attention is None else attention
        found.text_real = real[reads.texts :].bool()
        if pixels is None:
            found.image_real = given["pixel_mask"][reads.texts :].bool()
        else:
            found.image_real = _real_patches(trunk, given, found.image.shape[1])[reads.texts :]
    return found


def _real_patches(trunk, given, tokens) -> torch.Tensor:
    """bool [S, I]: the module gives the real patches of an image first, and does not say how many they are."""
    if not draws_its_patches(trunk.embeddings):
        raise TypeError(
            f"which image tokens of a {type(trunk.embeddings).__name__} are real is not known: word-patch alignment "
            "needs ViltEmbeddings, or the model accelerated."
        )
    pixels = given["pixel_values"]
    grid = tuple(side // patch for side, patch in zip(pixels.shape[2:], patch_size(trunk.embeddings), strict=True))
    counts = [h * w for h, w in patches.patch_grids(given["pixel_mask"], len(pixels), grid)]
    real = torch.arange(tokens - 1) < torch.tensor(counts)[:, None]
    return F.pad(real, (1, 0), value=True).to(pixels.device)


def compact(labels: torch.Tensor) -> bool:
    """Whether rows may be picked by the values of `labels`: elsewhere that would wait for the device."""
    return labels.device.type == "cpu" and readable(labels)

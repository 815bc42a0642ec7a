"""`align`: which patches of an image each word of a text is transported to, as in the figures of the ViLT paper.

    C_ij = 1 - cosine(word i, patch j) of the final hidden states;   plan T = IPOT(C), beta 0.1, 1000 iterations

The text's [CLS] and [SEP] and the image's [CLS] take no part. `vilt_fast.alignment.draw` draws what `align` returns.
Source: ViLT (Kim et al. 2021), its figure of transport plans; the original `demo.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import overload

import torch
from torch import nn

from .. import functional
from ..errors import InputError
from ..models import find
from ..models.base import SwappedTrunk, swap_of, wrapper_of
from .picture import rgb


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Alignment:
    """The words of one text and the patches of one image, and what is transported from each to each."""

    plan: torch.Tensor  #: float32 [words, h * w] on the CPU, patches in raster order; every row of k pieces sums to k/M
    tokens: tuple[str, ...]  #: the words, or word pieces (M of them), as the tokenizer names them
    grid: tuple[int, int]  #: (h, w) patches of the image
    image_size: tuple[int, int]  #: (height, width) in pixels of what the grid covers: the image as it was given
    distance: float  #: <C, T>, 0 for hidden states that coincide, at most 2; NaN where the model computed NaN
    image: object = None  #: the photograph as a PIL image in RGB; None where processed inputs were given

    def __repr__(self) -> str:
        some = " ".join(self.tokens[:12]) + (" ..." if len(self.tokens) > 12 else "")
        h, w = self.grid
        return f"Alignment({len(self.tokens)} tokens, {h} x {w} patches, distance {self.distance:.3f}: {some})"

    def save(self, path, *, image=None, text: str = "", note: str = "", dpi: int = 150) -> None:
        """Write a picture: the photograph, then a panel a word with its heat over the grey. Needs matplotlib.

        Args:
            path: where to; the suffix decides the format (png, pdf, svg, jpg).
            image: the photograph, as `align` takes it; by default the one that was aligned.
            text: written above the panels. note: written small below them. dpi: pixels an inch.

        Raises:
            ImportError: matplotlib is missing. ValueError: no photograph, an unknown suffix, or a plan that holds NaN.
        """
        from .draw import draw

        photograph = self.image if image is None else image
        if photograph is None:
            raise ValueError("Alignment.save: processed inputs hold no photograph to draw over: pass image=.")
        draw(self, photograph, path, text=text, note=note, dpi=dpi)

    def heatmaps(self) -> torch.Tensor:
        """float32 [words, h, w]: each word's row of the plan on the patch grid, its largest value scaled to 1."""
        peak = self.plan.amax(1, keepdim=True).clamp_min(torch.finfo(self.plan.dtype).tiny)
        return (self.plan / peak).unflatten(1, self.grid)


@overload  # a string is a sequence of strings too
def align(  # pyright: ignore[reportOverlappingOverload]
    model: nn.Module, image, text: str, *, processor=None, beta: float = 0.1, iterations: int = 1000,
    whole_words: bool = False, backend: str | None = None,
) -> Alignment: ...  # fmt: skip


@overload
def align(
    model: nn.Module, image, text: Sequence[str] | None = None, *, processor=None, beta: float = 0.1,
    iterations: int = 1000, whole_words: bool = False, backend: str | None = None,
) -> list[Alignment]: ...  # fmt: skip


@torch.no_grad()
def align(
    model: nn.Module,
    image,
    text: str | Sequence[str] | None = None,
    *,
    processor=None,
    beta: float = 0.1,
    iterations: int = 1000,
    whole_words: bool = False,
    backend: str | None = None,
) -> Alignment | list[Alignment]:
    """Align the words of texts with the patches of images: one forward and one transport problem a pair, batched.

    `model` is neither accelerated nor changed: the packed forward runs on its parameters, in raster order, without
    gradients and in evaluation mode (a model that trains is put there for the call). Hooks on the ViLT trunk as a whole
    are not called, hooks inside it are. A model accelerated in int8 is computed in int8.

    Args:
        model: any of HuggingFace's `Vilt*` models, the original `ViLTransformerSS`, or a module around one of them;
            accelerated or not, on any device.
        image: a PIL image of any mode or an array [height, width, 3], or [height, width] in grey, of uint8, uint16 or
            floats from 0 to 1 or 0 to 255; or a list of them, one a text; or processed inputs (a mapping, `text` is
            None then): `input_ids` and `pixel_values`, with `attention_mask`, `pixel_mask`, `token_type_ids` and
            `image_token_type_idx` if there are any, as HuggingFace's processor makes them. The original takes its own
            batch there: `text_ids`, `text_masks` and `image` (a list that holds the pixels [B, 3, H, W], zero where
            padded), or `image_0`. Of NLVR2's pairs of images, pass one at a time.
        text: a string, or a list of them.
        processor: what has `image_processor` and `tokenizer`, such as `transformers.ViltProcessor`. By default the one
            saved with the model, read again at every call; the original has none. With processed inputs only the
            tokenizer is used, and without one the tokens are named by their ids.
        beta, iterations: see :func:`vilt_fast.functional.ipot`.
        whole_words: add up the rows of the pieces of a word ("align", "##ment").
        backend: of the transport; see :mod:`vilt_fast.functional`.

    Returns:
        An :class:`Alignment` for one image and one string, else a list with one for each pair. A patch that a positive
        `max_image_length` did not draw gets nothing.

    Raises:
        TypeError: `model` contains no ViLT, or an argument is of the wrong kind.
        InputError: (a `ValueError`) inputs that ViLT cannot be computed on, a text without words, no tokenizer.
        ValueError: beta or iterations out of range.
    """
    swapped = _trunk(model)
    trunk = swapped.module
    single = isinstance(text, str)
    if isinstance(image, Mapping):
        if text is not None:
            raise TypeError("align: the processed inputs hold the text already: pass no text beside them.")
        inputs, sizes, images = image, None, None
    else:
        images, texts = _pairs(image, text)
        processor = _checked(processor) if processor is not None else saved_processor(trunk)
        inputs, sizes = _processed(processor, images, texts), [picture.size[::-1] for picture in images]
    tokenizer = getattr(processor, "tokenizer", None)
    if whole_words and tokenizer is None:
        raise InputError("align: whole_words needs a processor: its tokenizer knows which tokens are pieces of words.")

    device = next(trunk.parameters()).device
    with evaluating(trunk):
        features = swapped.features(inputs, device)
    words, patches = _inner(features.text_real), features.image_real.clone()
    patches[:, 0] = False
    wordless = (~words.any(1)).nonzero().flatten().tolist()
    if wordless:
        which = "the text has" if single else f"texts {wordless} have"
        raise InputError(f"align: {which} no word between [CLS] and [SEP]: there is nothing to align.")
    with torch.autocast(device.type, enabled=False):
        distance, plan = functional.word_patch_distance(
            features.text.float(), features.image.float(), ~words, ~patches, beta=beta, iterations=iterations,
            return_plan=True, backend=backend,
        )  # fmt: skip

    plan, distance, ids = plan.cpu(), distance.tolist(), features.ids.cpu()
    words, patches = words.cpu(), patches.cpu()
    aligned = []
    for b, (h, w) in enumerate(features.grids):
        rows = torch.zeros(int(words[b].sum()), h * w)
        rows[:, features.cells[b].cpu()] = plan[b][words[b]][:, patches[b]]
        numbers = ids[b][words[b]].tolist()
        tokens = list(map(str, numbers)) if tokenizer is None else tokenizer.convert_ids_to_tokens(numbers)
        if whole_words:
            rows, tokens = _joined(rows, tokens)
        size = sizes[b] if sizes else (h * features.patch_size[0], w * features.patch_size[1])
        photograph = images[b] if images else None
        aligned.append(Alignment(rows, tuple(tokens), (h, w), size, distance[b], photograph))
    return aligned[0] if single else aligned


# --- the model --------------------------------------------------------------------------------------------------------


def _trunk(model) -> SwappedTrunk:
    """What computes the ViLT trunk in `model`: the one that it was accelerated with, or a new one beside it."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"align takes a torch.nn.Module, got {type(model).__name__}.")
    found = [part for part in find(model) if issubclass(part.kind, SwappedTrunk)]
    if not found:
        raise TypeError(
            f"{type(model).__name__} contains no ViLT model: align takes transformers' Vilt* classes and the original "
            "ViLTransformerSS, or a module around one of them."
        )
    part = next((part for part in found if not part.refusal), found[0])
    if part.refusal:
        raise TypeError(part.refusal)
    trunk, kind = part.module, part.kind
    present = wrapper_of(trunk, kind.name)
    if present is not None:
        raise TypeError(
            f"{type(trunk).__name__} has a {kind.name} of its own on the instance ({type(present).__name__}), which "
            "align would pass by: remove that wrapper."
        )
    return swap_of(trunk) or kind(trunk, kind.options_type())


@contextlib.contextmanager
def evaluating(trunk):
    """Evaluation mode, and back to each module's own."""
    training = [module for module in trunk.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _inner(real):
    """bool [B, T]: the real tokens without the first and the last of each text, which are [CLS] and [SEP]."""
    order = real.cumsum(1)
    return real & (order > 1) & (order < order[:, -1:])


def _joined(rows, tokens):
    """Rows and tokens with the pieces of each word ("##...", as BERT's tokenizer marks them) added to its first."""
    starts = [i for i, token in enumerate(tokens) if i == 0 or not token.startswith("##")]
    ends = [*starts[1:], len(tokens)]
    words = [
        tokens[i] + "".join(piece.removeprefix("##") for piece in tokens[i + 1 : end])
        for i, end in zip(starts, ends, strict=True)
    ]
    return torch.stack([rows[i:end].sum(0) for i, end in zip(starts, ends, strict=True)]), words


# --- images and texts -------------------------------------------------------------------------------------------------


def _pairs(image, text) -> tuple[list, list[str]]:
    """(PIL images in RGB, texts), as many of each."""
    if text is None:
        raise TypeError("align: images need texts: pass a string for one image, or a list with one for each.")
    if isinstance(text, str):
        images, texts = [image], [text]
    else:
        images, texts = image, list(text)
        if not isinstance(images, Sequence) or isinstance(images, str):
            raise TypeError(f"align: a list of texts needs a list of images, got {type(image).__name__}.")
    odd = [type(t).__name__ for t in texts if not isinstance(t, str)]
    if odd:
        raise TypeError(f"align: texts must be strings, got {odd[0]}.")
    if not texts or len(images) != len(texts):
        raise InputError(f"align: {len(images)} images and {len(texts)} texts; expected as many of each, at least one.")
    return [rgb(i) for i in images], texts


def _checked(processor):
    if not all(callable(getattr(processor, part, None)) for part in ("image_processor", "tokenizer")):
        raise TypeError(
            f"align: processor must have image_processor and tokenizer, as transformers.ViltProcessor does; "
            f"{type(processor).__name__} has not."
        )
    return processor


def saved_processor(trunk, who="align"):
    """The processor that lies beside the weights of a HuggingFace model.

    Raises:
        InputError: there is none.
    """
    where = getattr(getattr(trunk, "config", None), "_name_or_path", None)
    advice = (
        'Pass one, for example processor=transformers.ViltProcessor.from_pretrained("dandelin/vilt-b32-mlm"), or '
        "processed inputs in place of the image."
    )
    if not where:
        raise InputError(f"{who}: {type(trunk).__name__} was not loaded from a checkpoint with a processor. {advice}")
    from transformers import ViltProcessor

    try:
        processor = ViltProcessor.from_pretrained(where)
        known = len(processor.tokenizer) > len(processor.tokenizer.all_special_tokens)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{who}: no processor can be read from {where!r}: {reason} {advice}") from error
    if not known:  # a folder without a vocabulary gives a tokenizer that knows nothing but [UNK] and the like
        raise InputError(f"{who}: {where!r} has no tokenizer with a vocabulary. {advice}")
    return processor


def _processed(processor, images, texts):
    """The keyword arguments of a forward."""
    encoded = processor.tokenizer(texts, padding=True, return_tensors="pt")
    try:
        pixels = processor.image_processor(images, return_tensors="pt")
    except (ValueError, ZeroDivisionError, RuntimeError) as error:
        longest = max(images, key=lambda image: max(image.size) / min(image.size))
        if max(longest.size) < 4 * min(longest.size):
            raise
        raise InputError(
            f"align: an image of {longest.height} x {longest.width} pixels is too long and thin: the processor shrinks "
            "its longer side to the largest that ViLT takes, which leaves less than a patch of the shorter (at 384 "
            "pixels: above 20 to 1). Crop it."
        ) from error
    return {
        "input_ids": encoded["input_ids"],
        "attention_mask": encoded["attention_mask"],
        "pixel_values": pixels["pixel_values"],
        "pixel_mask": pixels["pixel_mask"],
    }

"""The inputs of HuggingFace's ViLT: checked once, and planned."""

from __future__ import annotations

import dataclasses

import torch
from transformers.models.vilt import modeling_vilt as hf

from ...errors import InputError
from ...ops._check import limits, readable
from . import patches
from .embedding import Tables
from .given import check_tensors, repeated
from .known import known_tables, patch_size, position_grid, takes_what_is_given
from .options import ViltOptions
from .plan import SequencePlan


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """What inputs are held against, of an embedding module whose tables tell what it computes."""

    width: int  #: D
    words: int
    positions: int
    longest: int  #: text that has position ids
    types: int
    modalities: int
    channels: int
    patch: tuple[int, int]  #: (height, width)
    dtype: torch.dtype  #: of what makes the patches
    device: torch.device

    @classmethod
    def of(cls, embeddings: hf.ViltEmbeddings, found: Tables) -> Sizes:
        return cls(
            width=found.cls_token.shape[-1],
            words=len(found.word.weight),
            positions=len(found.position.weight),
            longest=found.position_ids.shape[1],
            types=len(found.token_type.weight),
            modalities=len(found.modality.weight),
            channels=embeddings.patch_embeddings.num_channels,
            patch=tuple(found.projection.weight.shape[2:]),
            dtype=found.projection.weight.dtype,
            device=found.projection.weight.device,
        )


@dataclasses.dataclass(slots=True)
class Inputs:
    """Validated inputs of one image per sample."""

    input_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    token_type_ids: torch.Tensor | None = None
    pixel_values: torch.Tensor | None = None
    pixel_mask: torch.Tensor | None = None
    inputs_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    modality: int = 1
    image_of: tuple[int, ...] | None = None  #: which image each sample has, where several share one
    tables: Tables | None = None  #: of the embedding module, where it is known and they have been looked for
    sizes: Sizes | None = None  #: where the embedding module is known, and takes what it is given

    @staticmethod
    def among(given: dict) -> dict:
        """What `given` holds for `checked`, of the keyword arguments of a model's forward."""
        return {name: value for name, value in given.items() if name in Inputs.__slots__ and name not in _FOUND}

    @property
    def text(self) -> torch.Tensor:
        """Whichever text input was given: [B, T] or [B, T, D]."""
        return self.input_ids if self.input_ids is not None else self.inputs_embeds

    @property
    def text_shape(self) -> tuple[int, int]:
        """(B, T)."""
        batch, length, *_ = self.text.shape
        return batch, length

    @staticmethod
    def checked(
        model: hf.ViltModel,
        *,
        modality: int | None = None,
        image_of: tuple[int, ...] | None = None,
        sizes: Sizes | None = None,
        **given,
    ) -> Inputs:
        """The inputs of `ViltModel.forward`, after every check that needs no plan.

        Args:
            sizes: of its embedding module, where that is known to be what it was when these were found: then its tables
                are not looked for.

        Raises:
            InputError: (a `ValueError`, `RuntimeError` and `IndexError`) naming what was given and what to do.
            TypeError: an input is no tensor.
        """
        found = None
        if sizes is None:
            found = known_tables(model.embeddings)
            if takes_what_is_given(model.embeddings, found):
                sizes = Sizes.of(model.embeddings, found)
        modality = 1 if modality is None else modality
        inputs = Inputs(**given, modality=modality, image_of=image_of, tables=found, sizes=sizes)
        if sizes is None:
            check_tensors(input_ids=inputs.input_ids, inputs_embeds=inputs.inputs_embeds)
        else:
            check_tensors(**given)
            pixels = inputs.pixel_values
            if pixels is not None and pixels.ndim == 3:
                raise InputError(
                    f"pixel_values must be [B, C, H, W], got {list(pixels.shape)}: one image is a batch of one, "
                    "pixel_values.unsqueeze(0)."
                )
        inputs._check_both(model)
        if sizes is not None:
            inputs._check_text(model)
            inputs._check_image()
        return inputs

    def with_tables(self, model: hf.ViltModel) -> Inputs:
        """The same with the tables of the embedding module, where it is known."""
        return dataclasses.replace(self, tables=known_tables(model.embeddings)) if self.tables is None else self

    def _check_both(self, model):
        """What `ViltModel.forward` itself wants of its inputs."""
        ids, embeds = self.input_ids, self.inputs_embeds
        if ids is not None and embeds is not None:
            raise InputError("You cannot specify both input_ids and inputs_embeds at the same time: pass one of them.")
        if ids is None and embeds is None:
            raise InputError("You have to specify either input_ids or inputs_embeds.")
        if self.text.ndim != (2 if ids is not None else 3):
            name, shape = ("input_ids", "[B, T]") if ids is not None else ("inputs_embeds", "[B, T, D]")
            raise InputError(f"{name} must be {shape}, got {list(self.text.shape)}.")
        if ids is not None and readable(ids) and hasattr(model, "warn_if_padding_and_no_attention_mask"):
            model.warn_if_padding_and_no_attention_mask(ids, self.attention_mask)
        pixels, embeds = self.pixel_values, self.image_embeds
        if pixels is not None and embeds is not None:
            raise InputError(
                "You cannot specify both pixel_values and image_embeds at the same time: pass one of them."
            )
        if pixels is None and embeds is None:
            raise InputError("You have to specify either pixel_values or image_embeds.")
        texts, images = self.text.shape[0], (pixels if pixels is not None else embeds).shape[0]
        if self.image_of is not None:
            images = len(self.image_of)
        if images != texts:
            raise InputError(
                f"The text inputs and image inputs need to have the same batch size: got {texts} texts and "
                f"{images} images."
            )

    def _check_text(self, model):
        ids, embeds, sizes = self.input_ids, self.inputs_embeds, self.sizes
        if ids is not None:
            if ids.dtype not in (torch.int32, torch.int64):
                raise InputError(f"input_ids must be int32 or int64 [B, T], got {ids.dtype} {list(ids.shape)}.")
            _check_range(ids, sizes.words, "input_ids")
        elif embeds.shape[2] != sizes.width:
            raise InputError(f"inputs_embeds must be [B, T, {sizes.width}], got {list(embeds.shape)}.")
        batch, length = self.text_shape
        if length > sizes.longest:
            raise InputError(f"the text has {length} tokens and the model {sizes.longest} positions: truncate it.")
        if readable(self.text):
            _check_range(model.embeddings.text_embeddings.position_ids[:, :length], sizes.positions, "position_ids")
        if self.attention_mask is not None and tuple(self.attention_mask.shape) != (batch, length):
            given = list(self.attention_mask.shape)
            raise InputError(f"attention_mask must be [{batch}, {length}] like the text, got {given}.")
        types = self.token_type_ids
        if types is not None:
            if types.ndim != 2 or types.shape[0] not in (1, batch) or types.shape[1] != length:
                raise InputError(f"token_type_ids must be [{batch}, {length}] like the text, got {list(types.shape)}.")
            _check_range(types, sizes.types, "token_type_ids")

    def _check_image(self):
        pixels, embeds, mask = self.pixel_values, self.image_embeds, self.pixel_mask
        batch, width, channels = len(self.text), self.sizes.width, self.sizes.channels
        if pixels is not None:
            if pixels.ndim != 4 or pixels.shape[1] != channels:
                raise InputError(
                    "Make sure that the channel dimension of the pixel values match with the one set in the "
                    f"configuration: expected [B, {channels}, H, W], got {list(pixels.shape)}."
                )
        elif embeds.ndim != 3 or embeds.shape[2] != width:
            raise InputError(f"image_embeds must be [B, P, {width}], got {list(embeds.shape)}.")
        elif mask is None or mask.ndim < 2 or mask.flatten(1).shape != embeds.shape[:2]:
            shape = None if mask is None else list(mask.shape)
            raise InputError(
                f"image_embeds of {embeds.shape[1]} tokens need a pixel_mask that flattens to [{batch}, "
                f"{embeds.shape[1]}] (1 where a token is real), got {shape}."
            )
        modalities = self.sizes.modalities
        if not 0 <= self.modality < modalities:
            raise InputError(f"image_token_type_idx must be in [0, {modalities}), got {self.modality}.")

    def one_image_each(self) -> Inputs:
        """The same with the shared images repeated: what a module that knows nothing of sharing is given."""
        if self.image_of is None:
            return self
        images = {"pixel_values": self.pixel_values, "pixel_mask": self.pixel_mask}
        return dataclasses.replace(self, **repeated(images, self.image_of), image_of=None)

    def layout(self, model: hf.ViltModel, images: int = 1) -> tuple:
        """What a `SequencePlan` for a sample's so many images like this one has as its `layout`."""
        batch, length = self.text_shape
        if self.pixel_values is None:
            return batch * images, length, (1, self.image_embeds.shape[1]), False
        sides = zip(self.pixel_values.shape[2:], self._patch(model), strict=True)
        return batch * images, length, tuple(pixels // patch for pixels, patch in sides), True

    def _patch(self, model):
        return patch_size(model.embeddings) if self.sizes is None else self.sizes.patch

    def plan(self, model: hf.ViltModel, options: ViltOptions, cells=None) -> SequencePlan:
        """Where the tokens go; the only device-to-host copy of a forward."""
        if self.pixel_values is None:
            return SequencePlan.from_keep_mask(
                self.attention_mask,
                self.pixel_mask.flatten(1),
                text_shape=self.text_shape,
                padding=options.padding,
                device=self.text.device,
            )
        embeddings = model.embeddings
        return SequencePlan.from_masks(
            self.attention_mask,
            self.pixel_mask,
            text_shape=self.text_shape,
            pixel_shape=tuple(self.pixel_values.shape),
            patch_size=self._patch(model),
            position_grid=position_grid(embeddings),
            max_image_length=embeddings.config.max_image_length,
            patch_order=options.patch_order,
            generator=options.generator,
            padding=options.padding,
            cells=cells,
            position_dtype=_position_dtype(embeddings.position_embeddings),
            image_of=self.image_of,
            device=self.text.device,
        )


def _position_dtype(table):
    return torch.float64 if table.dtype == torch.float64 else torch.float32


_FOUND = ("tables", "sizes")  #: what is not given


def _check_range(ids, size, name):
    """Out-of-range ids, where they may be looked at."""
    low, high = limits(ids) or (0, 0)
    if low < 0 or high >= size:
        raise InputError(f"{name} must be in [0, {size}), got values from {low} to {high}.")


def joined(plans: list[SequencePlan]) -> SequencePlan:
    """One plan for the images that share a text."""
    return plans[0] if len(plans) == 1 else SequencePlan.concatenate(plans, len(plans))


def check_plan(plan: SequencePlan, images: list[Inputs], model: hf.ViltModel, options: ViltOptions) -> None:
    """Refuse a plan that was made for other inputs: by their sizes, and by their masks where those may be looked at.

    Raises:
        TypeError: it is no plan.
        InputError: it is one for other sizes, other masks or another `padding`.
    """
    if not isinstance(plan, SequencePlan):
        raise TypeError(
            f"sequence_plan is a {type(plan).__name__}, expected what vilt_fast.sequence_plan(model, **inputs) returns."
        )
    layout = images[0].layout(model, len(images))
    reason = ""
    if plan.layout != layout:
        reason = f"{_in_words(*plan.layout)}, and the inputs are {_in_words(*layout)}"
    elif plan.padding != options.padding and not plan.dense:
        reason = f"padding={plan.padding!r}, and the model is accelerated with padding={options.padding!r}"
    else:
        size = len(images[0].text)
        for i, inputs in enumerate(images):
            reason = reason or _other_masks(plan, slice(i * size, (i + 1) * size), inputs)
    if reason:
        raise InputError(
            f"sequence_plan was made for {reason}: make one for these inputs with "
            "vilt_fast.sequence_plan(model, **inputs), or pass none."
        )


def _in_words(batch, length, grid, has_cls):
    image = f"{grid[0]}x{grid[1]} patches of pixel_values" if has_cls else f"{grid[1]} tokens of image_embeds"
    return f"{batch} samples of {length} text tokens and {image}"


def _other_masks(plan, samples, inputs) -> str:
    """What differs between the masks that are given and may be looked at, and those of these samples of a plan."""
    text, image = (
        m if m is not None and m.device == plan.device and readable(m) else None
        for m in (inputs.attention_mask, inputs.pixel_mask)
    )
    if text is None and image is None:
        return ""
    planned_text, planned_image = plan.key_mask()[samples].tensor_split([plan.text_length], dim=1)
    if text is not None and (b := _first_other(planned_text, text != 0)) is not None:
        return f"other masks: attention_mask of sample {b} says that other tokens are real"
    if image is None:
        return ""
    if inputs.pixel_values is None:
        b = _first_other(planned_image, image.flatten(1) != 0)
        return "" if b is None else f"other masks: pixel_mask of sample {b} says that other tokens are real"
    for b, (planned, given) in enumerate(
        zip(plan.grids[samples], patches.patch_grids(image, len(inputs.text), plan.patch_grid), strict=True)
    ):
        if planned != given:
            said = " and ".join("x".join(map(str, grid)) for grid in (planned, given))
            return f"other masks: image {b} of {said} patches, in the plan and in pixel_mask"
    return ""


def _first_other(one, other) -> int | None:
    """The first sample in which two masks [B, n] differ."""
    samples = (one != other).any(1).nonzero()
    return samples[0].item() if len(samples) else None

"""Images as the model takes them, from whatever they are given as; each is read when it is wanted."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..alignment.picture import rgb
from ..errors import InputError


class Picture:
    """One image: what it was given as, and what it is called."""

    def __init__(self, source, place: int, processor):
        """`processor()` gives what makes pixels of a PIL image, `processor()(image, return_tensors="pt")`.

        Raises:
            TypeError: no image is given like that.
        """
        self.source, self._processor = source, processor
        if isinstance(source, str | os.PathLike):
            self.name = os.fspath(source)
        else:
            self.name = f"image {place}"
            kinds = bytes | bytearray | memoryview | np.ndarray | torch.Tensor | Mapping
            if not isinstance(source, kinds) and not _is_pil(source):
                raise TypeError(
                    f"score: image {place} is a {type(source).__name__}; expected a path, the bytes of a file, a PIL "
                    "image, an array or tensor [height, width, 3], or what a processor has made, as a mapping."
                )

    def key(self):
        """Equal for images that are one: they are read once."""
        return self.name if isinstance(self.source, str | os.PathLike) else id(self.source)

    def pixels(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(pixels [1, C, H, W], mask [1, H, W], or None where all of them are real).

        A file is turned as the camera says (EXIF), a PIL image taken as it is, as the reference takes both; of an
        animation the first frame, colours as Pillow converts them to RGB.

        Raises:
            OSError, ValueError, ...: whatever the file makes Pillow and the processor raise.
        """
        if isinstance(self.source, Mapping):
            made = self.source
        else:
            processor = self._processor()
            made = processor(self._for(processor), return_tensors="pt")
        values, mask = made["pixel_values"], made.get("pixel_mask")
        values, mask = _tensor(values), None if mask is None else _tensor(mask)
        if values.ndim == 3:
            values, mask = values[None], None if mask is None else mask[None]
        if values.ndim != 4 or len(values) != 1:
            raise InputError(f"pixel_values must be of one image, [1, C, H, W], got {list(values.shape)}.")
        if mask is not None and mask.shape != (1, *values.shape[2:]):
            raise InputError(f"pixel_mask must be {[1, *values.shape[2:]]} like pixel_values, got {list(mask.shape)}.")
        if mask is not None and bool((mask != 0).all()):
            mask = None
        return values, mask

    def _for(self, processor):
        """The photograph; unread where the processor may decode a JPEG smaller than it is."""
        if _is_ours(processor) and isinstance(self.source, _ENCODED):
            from ..images import sources

            with sources.opened(self.source) as header:
                if header.format == "JPEG":
                    return self.source
        return self.opened()

    def opened(self):
        """The photograph as a PIL image in RGB."""
        from PIL import ImageOps

        source = self.source
        if isinstance(source, Mapping):
            raise InputError("processed inputs hold no photograph.")
        try:
            if isinstance(source, _ENCODED):
                from ..images import sources

                with sources.opened(source) as picture:
                    return rgb(ImageOps.exif_transpose(picture))
            return rgb(source)
        except InputError as error:
            raise InputError(str(error).removeprefix("align: ")) from None

    def digest(self) -> str:
        """Of all that `pixels` depends on but the processor; a file that cannot be read has one too."""
        source, seen = self.source, hashlib.blake2b(digest_size=16)
        if isinstance(source, str | os.PathLike):
            try:
                with open(source, "rb") as file:
                    while part := file.read(1 << 20):
                        seen.update(part)
            except OSError as error:
                return type(error).__name__
        elif isinstance(source, bytes | bytearray | memoryview):
            seen.update(source)
        elif _is_pil(source):
            seen.update(f"{source.mode} {source.size} {source.getpalette()}".encode())
            seen.update(source.tobytes())
        else:
            parts = source.items() if isinstance(source, Mapping) else [("", source)]
            for name, part in parts:
                part = part.detach().cpu() if isinstance(part, torch.Tensor) else np.asarray(part)
                seen.update(f"{name} {part.dtype} {list(part.shape)}".encode())
                if isinstance(part, torch.Tensor):
                    part = part.contiguous().reshape(-1).view(torch.uint8).numpy()
                seen.update(part.tobytes())
        return seen.hexdigest()


_ENCODED = str | os.PathLike | bytes | bytearray | memoryview


def _tensor(values) -> torch.Tensor:
    return values if isinstance(values, torch.Tensor) else torch.as_tensor(np.asarray(values))


def _is_ours(processor) -> bool:
    known = sys.modules.get("vilt_fast.images.processor")  # else nobody can have made one
    return known is not None and isinstance(processor, known.ImageProcessor)


def quick(processor):
    """`vilt_fast.ImageProcessor` in place of an image processor of transformers that it is equal to, bit for bit."""
    if not type(processor).__module__.startswith("transformers."):
        return processor
    from ..images.processor import ImageProcessor

    try:
        return ImageProcessor.from_reference(processor)
    except TypeError:  # another one, on torchvision say
        return processor


def _is_pil(source) -> bool:
    image = sys.modules.get("PIL.Image")  # else nobody can have made one
    return image is not None and isinstance(source, image.Image)


def read(images, processor) -> list[Picture]:
    """The images of a list, not opened yet.

    Raises:
        TypeError: it is no list, or holds something that is no image. InputError: it is empty.
    """
    if isinstance(images, str | bytes | os.PathLike) or _is_pil(images) or not isinstance(images, Sequence):
        raise TypeError(
            f"score: images must be a list (of paths, bytes, PIL images, arrays, tensors), got {type(images).__name__}."
        )
    if not images:
        raise InputError("score: there are no images.")
    return [Picture(source, place, processor) for place, source in enumerate(images)]

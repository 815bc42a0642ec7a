"""`vilt_fast.ImageProcessor`: HuggingFace's ViLT image processor, bit for bit and faster.

The reference goes through float64 and several copies: image -> array -> Pillow -> array -> `* 1/255` in float64 ->
float32 -> `(x - mean) / std` -> padded copy -> stacked copy -> tensor. Here pixels stay bytes to the end; rescaling and
normalisation are one look-up in a table of the reference's own results ([3, 256]), which writes into the padded batch.
Images are decoded and resized in threads (Pillow lets go of the GIL); a single large one is resized in bands, where its
size is one that float32 holds exactly, as those of cameras are (`resize.py`).
"""

from __future__ import annotations

import copy
import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BatchFeature

from ..errors import InputError
from . import sources
from .options import Options, checked, has_own_steps, understood
from .pixels import pixels
from .reference import SAVED_AS, Reference, levels


class ImageProcessor(Reference):
    """HuggingFace's `ViltImageProcessor` with the same options, arguments and result, bit for bit, only faster.

        processor.image_processor = vilt_fast.ImageProcessor.from_reference(processor)  # or .from_pretrained(name)

    It is a subclass: `from_pretrained`, `save_pretrained` and `ViltProcessor(image_processor, tokenizer)` are
    HuggingFace's, and what is saved loads without vilt_fast as the reference. What it does not compute itself (options
    that releases differ in, float arrays, modes other than RGB, subclasses with steps of their own) the reference's
    code computes. The reference is the class on Pillow (`ViltImageProcessorPil`, up to transformers 5.0
    `ViltImageProcessor`); the one on torchvision resizes otherwise and gives other pixels.

    Besides PIL images, arrays and tensors it takes paths and the bytes of files, read as transformers' `load_image`
    does: upright by their EXIF orientation, then RGB. PIL images are taken as they are, as the reference takes them:
    without orientation, and RGB alone (where the reference has `do_convert_rgb`, that converts).

    Args:
        decode: "exact", or "fast": a JPEG that nobody has decoded (a path, bytes, an unread PIL image) is decoded at
            1/2, 1/4 or 1/8 of its size, by the decoder's own scaling, which leaves no less than 1.5 times the result,
            and any image is first reduced by whole factors, to no less than twice the result. Where an image is not
            reduced, nothing changes. Else pixels of photographs differ by 0.002 to 0.006 on average and 0.14 at most
            (on -1 to 1) and the pooled output by 1e-3 to 3e-3: `python -m benchmarks.image_error`.
        **options: those of the reference, with its defaults.

    Raises:
        InputError: an image whose result would have no pixels, known from its header before anything is decoded; an
            image of a mode that the reference refuses; no images.
        OSError, PIL.Image.DecompressionBombError: what Pillow says of a file. ValueError, TypeError: what the reference
            says of its options.
    """

    def __init__(self, *args, decode: str = "exact", **options):
        super().__init__(*args, **options)
        self.decode = checked(decode)

    @classmethod
    def from_reference(cls, processor, decode: str = "exact") -> ImageProcessor:
        """One with all options of an image processor, or of the one in a `ViltProcessor`.

        Raises TypeError for one that computes something else: on torchvision, or a subclass.
        """
        processor = getattr(processor, "image_processor", processor)
        if type(processor) not in (Reference, cls):
            raise TypeError(
                f"from_reference takes {Reference.__module__}.{Reference.__name__}, whose results it can give, got "
                f"{type(processor).__module__}.{type(processor).__name__}. For its options with Pillow's resize: "
                "ImageProcessor.from_dict(processor.to_dict())."
            )
        made = cls.__new__(cls)
        made.__dict__.update(copy.deepcopy(vars(processor)), decode=checked(decode))
        return made

    @classmethod
    def from_dict(cls, image_processor_dict, **kwargs):
        decode = {"decode": kwargs.pop("decode")} if "decode" in kwargs else {}
        return super().from_dict({**image_processor_dict, **decode}, **kwargs)

    def to_dict(self):
        """The options, under the reference's name; `decode` only where it is not "exact"."""
        found = {**super().to_dict(), "image_processor_type": SAVED_AS}
        if found["decode"] == "exact":
            del found["decode"]
        return found

    def fetch_images(self, image_url_or_urls):
        """As the reference, but that files stay unread: `preprocess` opens them, in threads."""
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(one) for one in image_url_or_urls]
        return image_url_or_urls if sources.is_encoded(image_url_or_urls) else super().fetch_images(image_url_or_urls)

    def preprocess(self, images, *args, decode: str | None = None, **kwargs) -> BatchFeature:
        """Images to `pixel_values` [B, 3, H, W] and `pixel_mask` [B, H, W] (int64, 1 where the image is).

        Args:
            images: one or a list of: PIL images, uint8 arrays or tensors [height, width, 3] or [3, height, width], a
                batch of these in one array, paths, bytes of files.
            decode: for this call, in place of the processor's own.
            **kwargs: those of the reference's `preprocess`, `return_tensors` ("pt", "np" or None: lists of arrays) too.
        """
        decode = checked(self.decode if decode is None else decode)
        options = None if args or has_own_steps(self, ImageProcessor) else understood(self, decode, kwargs)
        given = None if options is None else _listed(images, options)
        found = None if given is None else self._in_bytes(given, options)
        if found is not None:
            return self._batch(found, options)
        if decode == "fast":
            warnings.warn(
                'decode="fast" does nothing for options or images that the reference computes (see ImageProcessor).',
                stacklevel=3,
            )
        images = _loaded(images)
        try:
            return super().preprocess(images, *args, **kwargs)
        except (ValueError, IndexError) as error:
            modes = _modes(images) - {"RGB"}
            if not modes or isinstance(error, InputError):
                raise
            raise InputError(
                f"images of mode {', '.join(sorted(modes))}, which the reference does not take: pass "
                f'image.convert("RGB"), or the path of the file. ({error})'
            ) from error

    def _in_bytes(self, images: list, options: Options) -> list[np.ndarray] | None:
        """uint8 [height, width, 3] of each image, read in threads; None where one is for the reference alone."""
        different = {id(image): image for image in images}  # the same image twice is read once, by one thread
        sources.read_shared([*different.values()])
        threads = torch.get_num_threads()
        each = max(1, threads // len(different))

        def read(image):
            try:
                return pixels(image, options, each)
            except Exception as error:
                if len(images) > 1 and hasattr(error, "add_note"):  # Python 3.11
                    named = f": {os.fspath(image)}" if isinstance(image, str | os.PathLike) else ""
                    error.add_note(f"This was one of {len(images)} images{named}.")
                raise

        if len(different) == 1:
            read_once = {one: read(image) for one, image in different.items()}
        else:
            with ThreadPoolExecutor(min(threads, len(different))) as pool:
                read_once = dict(zip(different, pool.map(read, different.values()), strict=True))
        if any(one is None for one in read_once.values()):
            return None
        return [read_once[id(image)] for image in images]

    def _batch(self, found: list[np.ndarray], options: Options) -> BatchFeature:
        """Rescaled, normalised and padded: the table's values straight into their place."""
        table = levels(self, options.rescale_factor, options.mean_and_std)
        sizes = [one.shape[:2] for one in found]
        height, width = (max(sides) for sides in zip(*sizes, strict=True))
        if options.pad or len(set(sizes)) == 1:
            values = np.zeros((len(found), 3, height, width), table.dtype)
        elif options.tensors is None:
            values = [np.zeros((3, *size), table.dtype) for size in sizes]
        else:
            told = ", ".join(f"{rows} x {columns}" for rows, columns in sorted(set(sizes)))
            raise InputError(f"without do_pad images of different sizes ({told}) cannot be one tensor.")
        for one, target in zip(found, values, strict=True):
            _fill(target, one, table)
        data = {"pixel_values": values}
        if options.pad:
            data["pixel_mask"] = np.zeros((len(found), height, width), np.int64)
            for mask, (rows, columns) in zip(data["pixel_mask"], sizes, strict=True):
                mask[:rows, :columns] = 1
        made = {None: list, "np": np.asarray, "pt": torch.from_numpy}[options.tensors]
        return BatchFeature({name: made(value) for name, value in data.items()})


def _fill(target, image, table):
    """The values of one image [height, width, 3], looked up in the table, into its place [3, H, W] of the batch."""
    height, width = image.shape[:2]
    for channel in range(3):
        # Bytes are never out of the table's range; any mode but the default lets NumPy write where it is told to.
        np.take(table[channel], image[..., channel], out=target[channel, :height, :width], mode="clip")


def _listed(images, options: Options) -> list | None:
    """The images of a call, each by itself; None where one is left to the reference, to take or to refuse."""
    if isinstance(images, list | tuple):
        if not images:
            raise InputError("an empty list of images was given.")
        found = list(images)
    else:
        batch = type(images) in (np.ndarray, torch.Tensor) and images.ndim == 4
        found = list(images) if batch else [images]
    layouts = set()
    for image in found:
        if isinstance(image, Image.Image):
            layouts.add(sources.is_rgb(image, options.convert) or None)
        else:
            layouts.add(sources.is_encoded(image) or sources.is_channels_last(image))
    # Up to transformers 5.0 the layout of the first image is taken for that of all.
    return found if layouts in ({True}, {False}) else None


def _loaded(images):
    """Files and bytes, in whatever lists, as PIL images for the reference."""
    if isinstance(images, list | tuple):
        return type(images)(_loaded(image) for image in images)
    return sources.upright(sources.opened(images)) if sources.is_encoded(images) else images


def _modes(images):
    """Modes of the PIL images in whatever lists."""
    if isinstance(images, list | tuple):
        return set().union(*map(_modes, images))
    return {images.mode} if isinstance(images, Image.Image) else set()

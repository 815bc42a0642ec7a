"""Images and their texts as samples: opened, augmented, resized and tokenised in whichever worker is asked."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..errors import InputError
from ..images import sources
from . import resize
from .draws import AUGMENT, NEGATIVE, generator
from .negatives import other, other_texts

_LOG = logging.getLogger("vilt_fast")
#: What Pillow raises for files that are missing, damaged, no images, or larger than any honest one.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class PairDataset(Dataset):
    """Samples of a text and its image (or images), with false ones where an objective wants them.

    A sample's draws belong to (seed, epoch, index), so it is the same in whichever worker and batch it is made; a false
    image never is the right one. An image file is opened once a sample, and only then.

    Args:
        images: paths, bytes of files, or PIL images; anything with a length and numbered elements.
        texts: a string a sample. tokenizer: as transformers' have it.
        image_of: for each text the number of its image, or a tuple of them (NLVR2); by default text i has image i.
        labels: a number or a tensor a sample.
        augment: `augment(image, generator)` before the resize, such as :class:`RandAugment`; of the false image too.
        false_image: draw one a sample. false_texts: how many to draw a sample (retrieval: 15).
        shorter, divisor: of the resize. max_length: tokens of a text, longer ones are cut off.
        seed: of all draws. strict: an image that cannot be used is an error; else its sample is left out and counted,
            and another false image is drawn in place of such a one.

    A sample is a dict: `key` (epoch, index), `input_ids` and `word_ids` [T], `pixel_values` [3, H, W] or a list of
    them, `false_pixel_values` [3, H, W], `false_input_ids` (a list of [T]), `labels`; None where its image
    cannot be used.

    Raises:
        ValueError: lengths that do not fit together, or an image number out of range.
    """

    def __init__(
        self, images: Sequence, texts: Sequence[str], tokenizer, *, image_of: Sequence | None = None,
        labels: Sequence | None = None, augment: Callable | None = None, false_image: bool = False,
        false_texts: int = 0, shorter: int = resize.SHORTER, divisor: int = resize.DIVISOR, max_length: int = 40,
        seed: int = 0, strict: bool = False,
    ):  # fmt: skip
        image_of = range(len(texts)) if image_of is None else image_of
        self.image_of = np.array(image_of, np.int64)
        counts = {"texts": len(texts), "image_of": len(image_of)} | ({} if labels is None else {"labels": len(labels)})
        if len(set(counts.values())) != 1:
            raise ValueError(f"PairDataset: as many of each are expected, got {counts}.")
        if self.image_of.size and not 0 <= self.image_of.min() <= self.image_of.max() < len(images):
            raise ValueError(
                f"PairDataset: image_of must be in [0, {len(images)}), got {self.image_of.min()} to "
                f"{self.image_of.max()}."
            )
        if self.image_of.ndim > 1 and (false_image or false_texts):
            raise ValueError("PairDataset: false images and texts are drawn for texts that have one image each.")
        self.images, self.texts, self.tokenizer, self.labels = images, texts, tokenizer, labels
        self.augment, self.false_image, self.false_texts = augment, false_image, false_texts
        self.sizes = {"shorter": shorter, "divisor": divisor}
        self.max_length, self.seed, self.strict = max_length, seed, strict
        # Shared with workers: they see the epoch, and what they could not read is seen here.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._unreadable = torch.zeros(len(images), dtype=torch.bool).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """The epoch of samples asked for by number alone; keys that hold it, as TokenBudget's, need no word."""
        self._epoch.fill_(epoch)

    @property
    def unreadable(self) -> list[int]:
        """The images that could not be used so far, by number, whichever worker met them."""
        return self._unreadable.nonzero().flatten().tolist()

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, key: int | tuple[int, int]) -> dict | None:
        epoch, index = key if isinstance(key, tuple) else (int(self._epoch), int(key))
        numbers = self.image_of[index]
        draws = generator(self.seed, epoch, index, AUGMENT)
        pixels = [self._pixels(int(number), draws) for number in np.atleast_1d(numbers)]
        if any(image is None for image in pixels):
            return None
        ids, words = self._encoded(index)
        sample = {
            "key": (epoch, index), "input_ids": ids, "word_ids": words,
            "pixel_values": pixels if numbers.ndim else pixels[0],
        }  # fmt: skip
        if self.labels is not None:
            sample["labels"] = torch.as_tensor(self.labels[index])
        negative = generator(self.seed, epoch, index, NEGATIVE)
        if self.false_image:
            sample["false_pixel_values"] = self._false(int(numbers), negative, draws)
        if self.false_texts:
            drawn = other_texts(int(numbers), self.image_of, self.false_texts, negative)
            sample["false_input_ids"] = [self._encoded(int(text))[0] for text in drawn]
        return sample

    def _false(self, number, negative, draws):
        """The pixels of another image that can be used; one that cannot costs a draw."""
        for _ in range(len(self.images)):
            pixels = self._pixels(other(number, len(self.images), negative), draws)
            if pixels is not None:
                return pixels
        bad = len(self.unreadable)
        raise InputError(f"no false image can be used: {bad} of {len(self.images)} images cannot be read.")

    def _encoded(self, index):
        """(input_ids, word_ids or None) of a text, int64 [T]."""
        encoding = self.tokenizer(self.texts[index], truncation=True, max_length=self.max_length)
        ids = torch.tensor(encoding["input_ids"])
        if not getattr(self.tokenizer, "is_fast", False):
            return ids, None
        return ids, torch.tensor([-1 if word is None else word for word in encoding.word_ids()])

    def _pixels(self, number, draws):
        """float32 [3, H, W] of an image; None if it cannot be used."""
        try:
            with _opened(self.images[number]) as image:
                upright = sources.upright(image)
        except _UNREADABLE as error:
            return self._refused(number, error)
        if self.augment is not None:
            upright = self.augment(upright, draws)
        try:
            return resize.to_pixels(upright, **self.sizes)
        except InputError as error:
            return self._refused(number, error)

    def _refused(self, number, error):
        reason = f"image {number} ({_named(self.images[number])}) cannot be used: {error}"
        if self.strict:
            raise InputError(reason) from error
        if not self._unreadable[number]:
            self._unreadable[number] = True
            _LOG.warning("%s; left out.", reason)

    def lengths(self, sizes: Sequence[tuple[int, int]] | None = None) -> np.ndarray:
        """int64 [samples]: the packed tokens of each, its text, and [CLS] and patches of its image (images).

        Args:
            sizes: (height, width) of each image, where they are known; else the header of every file is read.
        """
        rows = np.array([self._rows(i, None if sizes is None else sizes[i]) for i in range(len(self.images))])
        tokens = np.array([len(self._encoded(i)[0]) for i in range(len(self))])
        return tokens + rows[self.image_of].reshape(len(self), -1).sum(1)

    def _rows(self, number, size):
        """[CLS] and patches of an image; of one that cannot be used, as if it had none."""
        try:
            height, width = _upright_size(self.images[number]) if size is None else size
            height, width = resize.target_size(height, width, **self.sizes)
        except _UNREADABLE:
            return 1
        return 1 + height * width // self.sizes["divisor"] ** 2


def _opened(source):
    """A PIL image of which the header has been read; the source itself where it is one (as a copy, to be closed)."""
    return source.copy() if isinstance(source, Image.Image) else sources.opened(source)


def _upright_size(source):
    """(height, width) as it will be resized."""
    if isinstance(source, Image.Image):
        return source.size if sources.is_turned(source) else source.size[::-1]
    with _opened(source) as image:
        return image.size if sources.is_turned(image) else image.size[::-1]


def _named(source):
    return os.fspath(source) if isinstance(source, str | os.PathLike) else type(source).__name__

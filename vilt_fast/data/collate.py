"""Samples to a batch: the dict of tensors that `vilt_fast.objectives` and HuggingFace's models take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from ..errors import InputError
from .draws import MASK, generator
from .masking import WholeWordMasking


class Collator:
    """The `collate_fn` of a `DataLoader` over :class:`PairDataset`; samples that are None are left out.

    Texts are padded at their end to the longest, images with zeros at the bottom and the right to the largest, which
    costs memory and no time: packed models skip it.

    Args:
        tokenizer: its `pad_token_id` fills texts. masking: makes `mlm_input_ids` and `labels`.
        seed: of the masking; a text's masks belong to (seed, epoch, index).

    The batch: `input_ids`, `attention_mask`, `token_type_ids` int64 [B, T]; `pixel_values` float32 [B, 3, H, W] and
    `pixel_mask` int64 [B, H, W] (with several images a text: [B, n, 3, H, W] and [B, n, H, W]);
    and where there are any `mlm_input_ids`, `labels` [B, T]; `false_pixel_values`, `false_pixel_mask`;
    `false_input_ids`, `false_attention_mask` [B, N, T']; `labels` as the dataset has them.

    Raises (when it is called):
        InputError: no sample is left. ValueError: both the masking and the dataset have labels.
    """

    def __init__(self, tokenizer, *, masking: WholeWordMasking | None = None, seed: int = 0):
        self.pad_id, self.masking, self.seed = tokenizer.pad_token_id or 0, masking, seed

    def __call__(self, samples: Sequence[dict | None]) -> dict[str, torch.Tensor]:
        samples = [sample for sample in samples if sample is not None]
        if not samples:
            raise InputError("no image of this batch could be used: there is nothing to collate.")
        batch = self._texts([sample["input_ids"] for sample in samples])
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        if isinstance(samples[0]["pixel_values"], list):
            several = len(samples[0]["pixel_values"])
            flat = _images([image for sample in samples for image in sample["pixel_values"]])
            pixels, mask = (tensor.unflatten(0, (len(samples), several)) for tensor in flat)
        else:
            pixels, mask = _images([sample["pixel_values"] for sample in samples])
        batch |= {"pixel_values": pixels, "pixel_mask": mask}
        if "labels" in samples[0]:
            batch["labels"] = torch.stack([sample["labels"] for sample in samples])
        if self.masking is not None:
            if "labels" in batch:
                raise ValueError("Collator: masking makes labels, and the dataset has some of its own: leave out one.")
            batch |= self._masked(samples, batch)
        if "false_pixel_values" in samples[0]:
            pixels, mask = _images([sample["false_pixel_values"] for sample in samples])
            batch |= {"false_pixel_values": pixels, "false_pixel_mask": mask}
        if "false_input_ids" in samples[0]:
            texts = self._texts([text for sample in samples for text in sample["false_input_ids"]])
            batch |= {f"false_{name}": tensor.unflatten(0, (len(samples), -1)) for name, tensor in texts.items()}
        return batch

    def _texts(self, texts):
        ids = pad_sequence(texts, batch_first=True, padding_value=self.pad_id)
        sizes = torch.tensor([len(text) for text in texts])
        return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < sizes[:, None]).long()}

    def _masked(self, samples, batch):
        draws = [generator(self.seed, *sample["key"], MASK) for sample in samples]
        words = None
        if all(sample["word_ids"] is not None for sample in samples):
            words = pad_sequence([sample["word_ids"] for sample in samples], batch_first=True, padding_value=-1)
        masked, labels = self.masking(batch["input_ids"], batch["attention_mask"], draws, words)
        return {"mlm_input_ids": masked, "labels": labels}


def _images(images):
    """(pixels [n, 3, H, W], mask [n, H, W]): zeros beside what is real."""
    height, width = (max(image.shape[i] for image in images) for i in (1, 2))
    pixels = images[0].new_zeros(len(images), 3, height, width)
    mask = torch.zeros(len(images), height, width, dtype=torch.int64)
    for i, image in enumerate(images):
        pixels[i, :, : image.shape[1], : image.shape[2]] = image
        mask[i, : image.shape[1], : image.shape[2]] = 1
    return pixels, mask

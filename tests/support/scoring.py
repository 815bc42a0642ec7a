"""Texts, photographs and a processor for tests of scoring: tiny, of many sizes, drawn the same each time."""

import numpy as np
import torch
from PIL import Image

from vilt_fast.commands import samples

LENGTHS = (5, 12, 2, 9, 7, 3)  #: tokens of each text
SIZES = ((70, 64), (64, 130), (100, 64), (64, 64), (64, 90))  #: height, width of each image


def texts(lengths=LENGTHS, vocabulary=50):
    draw = np.random.default_rng(1)
    return [draw.integers(0, vocabulary, n).tolist() for n in lengths]


def photographs(sizes=SIZES):
    draw = np.random.default_rng(2)
    return [draw.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def files(folder, sizes=SIZES):
    """Paths of the same, as PNG."""
    paths = []
    for number, image in enumerate(photographs(sizes)):
        paths.append(folder / f"{number}.png")
        Image.fromarray(image).save(paths[-1])
    return paths


def processor(model):
    return samples.image_processor(model.config)


@torch.no_grad()
def by_hand(model, ids, images, process):
    """Logits [N, M, classes] of the model's own forward, pair by pair."""
    rows = []
    for text in ids:
        for image in images:
            made = process(image, return_tensors="pt")
            pixels = made["pixel_values"].to(next(model.parameters()).dtype)
            text_ids = torch.as_tensor(text)[None]
            rows.append(model(input_ids=text_ids, pixel_values=pixels, pixel_mask=made["pixel_mask"]).logits[0])
    return torch.stack(rows).unflatten(0, (len(ids), len(images)))

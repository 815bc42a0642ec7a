"""Whole models of ViLT's own sizes but for the number of blocks, at batches of 1 to 256 and as a server meets them."""

import random

import torch
from transformers import ViltConfig, ViltForQuestionAnswering

import vilt_fast

from . import driver

BATCHES = (1, 8, 64, 256)
#: COCO-like, in pixels. 22 of these and more have above 4096 patches, and no partial sums then.
SIZES = ((384, 640), (640, 384), (384, 576), (384, 512), (512, 384), (384, 448), (384, 384))


def build(dtype, **options):
    """ViLT-B/32 of one block with a small head, accelerated as on a GPU."""
    torch.manual_seed(0)
    config = ViltConfig(num_hidden_layers=1, num_labels=8, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    model = ViltForQuestionAnswering(config).to(dtype)
    return vilt_fast.accelerate(model.eval(), **options)


def inputs(sizes, texts, dtype, dense=False):
    """A batch of images of these sizes and texts of so many tokens, padded; `dense`: no masks."""
    count, height, width = len(sizes), max(h for h, _ in sizes), max(w for _, w in sizes)
    found = {
        "input_ids": torch.zeros(count, max(texts), dtype=torch.int64),
        "pixel_values": torch.zeros(count, 3, height, width, dtype=dtype),
    }
    if not dense:
        found["attention_mask"] = torch.arange(max(texts)) < torch.tensor(texts)[:, None]
        found["pixel_mask"] = torch.zeros(count, height, width, dtype=torch.int64)
        for mask, (h, w) in zip(found["pixel_mask"], sizes, strict=True):
            mask[:h, :w] = 1
    return found


def mixed(batch, dtype):
    """As many samples, of sizes and texts in turn."""
    sizes = [SIZES[i % len(SIZES)] for i in range(batch)]
    return inputs(sizes, [10 + 7 * i % 31 for i in range(batch)], dtype)


def forward(dtype, batches=BATCHES, **options) -> None:
    """Inference, of images and texts of many sizes and of one size."""
    model = build(dtype, **options)
    with torch.no_grad():
        for batch in batches:
            model(**mixed(batch, dtype))
            model(**inputs([(384, 384)] * batch, [40] * batch, dtype, dense=True))


def training(dtype, batches=BATCHES) -> None:
    """Steps with dropout."""
    model = build(dtype).train()
    for batch in batches:
        model(**mixed(batch, dtype), labels=torch.zeros(batch, 8, dtype=dtype)).loss.backward()


#: Longest sequences, one of each number of keys that attention has tiles for, and above.
LENGTHS = (48, 64, 96, 128, 160, 192, 256, 288, 300)


def serving(dtype, count=50, **options) -> list[str]:
    """The kernels that random batches compile after each tile configuration has been met once: there should be none."""
    draw, largest, text = random.Random(0), 32, 40
    model = build(dtype, **options)
    with torch.no_grad():
        for batch in (1, 2, 3, 5, 8, 12, 16, 20, 24, 28, largest):
            for longest in LENGTHS:
                strip = 32, 32 * (longest - text - 1)
                model(**inputs([strip] * batch, [text - i % 2 for i in range(batch)], dtype))
        before = len(driver.COMPILED)
        for _ in range(count):
            batch = draw.randint(1, largest)
            sizes = [(32 * draw.randint(1, 12), 32 * draw.randint(1, 20)) for _ in range(batch)]
            model(**inputs(sizes, [draw.randint(1, text) for _ in range(batch)], dtype))
    return [str(made) for made in driver.COMPILED[before:]]

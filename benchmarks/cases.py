"""The inputs that are timed: image sizes, text lengths, and the work they imply, counted.

B = samples, T = text tokens, P = patches; N = sum over samples of T + 1 + P (the image [CLS] counts); D = hidden size.
"""

import re
from typing import NamedTuple

import torch


class Case(NamedTuple):
    """A batch: `sizes` are (height, width) in pixels, `texts` the number of text tokens of each sample."""

    name: str
    sizes: tuple
    texts: tuple

    @property
    def batch(self):
        return len(self.sizes)

    @property
    def shape(self):
        """A name for the CSV: `b8 max 40 text + 640x640`."""
        height, width = (max(side) for side in zip(*self.sizes, strict=True))
        return f"b{self.batch} {max(self.texts)} text + {height}x{width}"

    def lengths(self, patch=32):
        """Real tokens of each sample, [CLS] included."""
        return [t + 1 + (h // patch) * (w // patch) for (h, w), t in zip(self.sizes, self.texts, strict=True)]

    def padded_length(self, patch=32):
        """Rows the reference gives every sample: longest text + 1 + most patches."""
        return max(self.texts) + 1 + max((h // patch) * (w // patch) for h, w in self.sizes)


CASES = {
    "b1": Case("b1", ((384, 384),), (40,)),
    "b1wide": Case("b1wide", ((384, 640),), (40,)),
    # COCO-like: eight aspect ratios, questions of 10 to 40 tokens; 1724 real tokens, padded to 2248 rows.
    "b8": Case(
        "b8",
        ((384, 640), (640, 384), (384, 576), (384, 512), (512, 384), (384, 512), (384, 448), (384, 384)),
        (40, 12, 8, 16, 10, 22, 14, 10),
    ),
}


class BadShape(ValueError):
    """A shape that is none, or that the model cannot take."""


def own(given, config):
    """The case of samples written as HEIGHTxWIDTH+TEXT ("384x640+40"): pixels, text tokens. BadShape if one cannot be
    computed by a model of this configuration."""
    sizes, texts = [], []
    for text in given:
        match = re.fullmatch(r"(\d{1,5})x(\d{1,5})\+(\d{1,5})", text)
        height, width, words = map(int, match.groups()) if match else (0, 0, 0)
        if min(height, width) < config.patch_size or not 1 <= words <= config.max_position_embeddings:
            raise BadShape(
                f"{text}: expected HEIGHTxWIDTH+TEXT, such as 384x640+40: pixels, at least {config.patch_size}, and "
                f"text tokens, 1 to {config.max_position_embeddings}."
            )
        sizes.append((height, width))
        texts.append(words)
    return Case("own", tuple(sizes), tuple(texts))


def inputs(case, config, seed=0):
    """Keyword arguments of a ViLT forward: seeded noise pixels, ids, and the masks that say what is real."""
    generator = torch.Generator().manual_seed(seed)
    height, width = (max(side) for side in zip(*case.sizes, strict=True))
    pixels = torch.zeros(case.batch, config.num_channels, height, width)
    pixel_mask = torch.zeros(case.batch, height, width, dtype=torch.long)
    ids = torch.zeros(case.batch, max(case.texts), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, ((h, w), text) in enumerate(zip(case.sizes, case.texts, strict=True)):
        pixels[i, :, :h, :w] = torch.randn(config.num_channels, h, w, generator=generator)
        pixel_mask[i, :h, :w] = 1
        ids[i, :text] = torch.randint(1, config.vocab_size, (text,), generator=generator)
        mask[i, :text] = 1
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "pixel_mask": pixel_mask}


def flops(lengths, patches, config, read=None):
    """Multiply-adds times two of one forward of the trunk over sequences of these lengths.

    Linear layers N (8 D^2 + 4 D F) a layer, attention 4 L^2 D a sequence and layer, patch projection 2 P (3 p^2) D.
    With `read`, the last layer computes no more than so many rows, one a sample, and keys and values of all.
    Norms, softmax, embeddings and heads are left out (below 1 %).
    """
    d, f, tokens = config.hidden_size, config.intermediate_size, sum(lengths)
    layer = tokens * (8 * d * d + 4 * d * f) + sum(4 * n * n * d for n in lengths)
    last = layer if read is None else tokens * 4 * d * d + read * (4 * d * d + 4 * d * f) + 4 * tokens * d
    projection = 2 * sum(patches) * config.num_channels * config.patch_size**2 * d
    return (config.num_hidden_layers - 1) * layer + last + projection


def traffic(lengths, config, weight_bytes, activation_bytes):
    """Bytes one forward must move: each weight read once, each activation written once and read once.

    Activations a token and layer: input, Q, K, V, context, projection, two norms, and F features: 8 D + F values.
    """
    d, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    weights = layers * (4 * d * d + 2 * d * f) + config.num_channels * config.patch_size**2 * d
    return weights * weight_bytes + 2 * layers * sum(lengths) * (8 * d + f) * activation_bytes


def work(case, config, padded):
    """(lengths, patches) that a provider computes: every sample padded to the longest, or only what is real."""
    p = config.patch_size
    height, width = (max(side) for side in zip(*case.sizes, strict=True))
    if padded:
        # The reference projects every cell of the padded canvas, then keeps the most any sample needs.
        return [case.padded_length(p)] * case.batch, [(height // p) * (width // p)] * case.batch
    return case.lengths(p), [(h // p) * (w // p) for h, w in case.sizes]

"""FLOPs and bytes that an op cannot do without: each input read once, each output written once, nothing else.

The same counts as in `cases.py` (a whole forward), `ops.py` and `transport.py` (what is timed on a CPU), for every op
and any batch. Matrix products and other arithmetic are counted apart: different units of a GPU compute them.
"""

from types import SimpleNamespace
from typing import NamedTuple

from . import cases
from .cases import Case

D, F, HEADS, LAYERS, PATCH, VOCABULARY, ITERATIONS = 768, 3072, 12, 12, 32, 30522, 50

#: The part of ViLT-B/32's configuration that `cases.py` counts by.
TRUNK = SimpleNamespace(hidden_size=D, intermediate_size=F, num_hidden_layers=LAYERS, num_channels=3, patch_size=PATCH)


class Work(NamedTuple):
    """What one call costs at least: FLOPs of matrix products, of everything else, bytes."""

    products: int
    scalar: int
    bytes: int

    @property
    def flops(self):
        return self.products + self.scalar


def batch(size):
    """`size` samples with the sizes and texts of the mixed case b8, over and over; one sample is the case b1."""
    if size == 1:
        return cases.CASES["b1"]
    mixed = cases.CASES["b8"]
    return Case(f"b{size}", (mixed.sizes * size)[:size], (mixed.texts * size)[:size])


def linear(rows, inputs, outputs, size=2, residual=0):
    """x W^T + b (or its GELU): x and W read, y written; a residual of `residual` bytes a value is read too."""
    moved = (rows * inputs + inputs * outputs + rows * outputs) * size + rows * outputs * residual
    return Work(2 * rows * inputs * outputs, 0, moved)


def attention(lengths, heads=HEADS, head_dim=64, size=2):
    """Scores and their product with V of every sequence; q, k, v read, output written."""
    values = sum(lengths) * heads * head_dim
    return Work(sum(4 * n * n * heads * head_dim for n in lengths), 0, 4 * values * size)


def attention_bwd(lengths, heads=HEADS, head_dim=64, size=2):
    """Five products instead of two; q, k, v, out, dout read, dq, dk, dv written."""
    values = sum(lengths) * heads * head_dim
    return Work(sum(10 * n * n * heads * head_dim for n in lengths), 0, 8 * values * size)


def add_layer_norm(rows, width=D, size=2):
    """x and residual read, sum and normalised rows written; some ten operations a value."""
    return Work(0, 10 * rows * width, 4 * rows * width * size)


def patch_embed(patches, text_rows, images, width=D, channels=3, patch=PATCH, size=2):
    """Pixels of real patches, the projection, text rows read; all rows written."""
    features = channels * patch * patch
    rows = text_rows + images + patches
    moved = (patches * features + features * width + text_rows * width + rows * width) * size
    return Work(2 * patches * features * width, 0, moved)


def text_embed(rows, width=D, size=2):
    """A word, a position and a segment read a row (the last two from a cache), one row written."""
    return Work(0, 12 * rows * width, 2 * rows * width * size)


def linear_cross_entropy(rows, width=D, vocabulary=VOCABULARY, size=2):
    """Logits of labelled rows, never stored; x and the embedding table read."""
    return Work(2 * rows * width * vocabulary, 0, (rows * width + vocabulary * width) * size)


def ipot(words, patches, iterations=ITERATIONS):
    """As in `transport.py`: one product and two multiply-adds an entry and iteration; costs read, plan written."""
    cells = sum(m * n for m, n in zip(words, patches, strict=True))
    return Work(0, 5 * cells * iterations, 8 * cells)


def word_patch_distance(words, patches, iterations=ITERATIONS, width=D, size=4):
    """Hidden states read, a distance a pair written; cosines, and IPOT without its memory traffic."""
    cells = sum(m * n for m, n in zip(words, patches, strict=True))
    states = (sum(words) + sum(patches)) * width
    return Work(2 * cells * width, 5 * cells * iterations, states * size)


def ops(case, size=2):
    """{op: (calls a forward, Work of one call)} of what runs over a case; 0 calls: not part of a forward."""
    lengths, texts = case.lengths(PATCH), list(case.texts)
    rows, words = sum(lengths), sum(texts)
    patches = [n - 1 - t for n, t in zip(lengths, texts, strict=True)]
    # Of the words, 15 % are masked and labelled (BERT); the distance leaves out [CLS], [SEP] and the image's [CLS].
    labelled, aligned = max(round(0.15 * words), 1), [max(t - 2, 1) for t in texts]
    return {
        "text_embed": (1, text_embed(words, size=size)),
        "patch_embed": (1, patch_embed(sum(patches), words, case.batch, size=size)),
        "add_layer_norm": (2 * LAYERS + 1, add_layer_norm(rows, size=size)),
        "linear qkv": (LAYERS, linear(rows, D, 3 * D, size)),
        "attention": (LAYERS, attention(lengths, size=size)),
        "linear out": (LAYERS, linear(rows, D, D, size)),
        "linear_gelu": (LAYERS, linear(rows, D, F, size)),
        "linear fc2": (LAYERS, linear(rows, F, D, size)),
        "attention_bwd": (0, attention_bwd(lengths, size=size)),
        "linear_cross_entropy": (0, linear_cross_entropy(labelled, size=size)),
        "ipot": (0, ipot(aligned, patches)),
        "word_patch_distance": (0, word_patch_distance(aligned, patches)),
    }


def forward(case, size=2):
    """The whole trunk with all activations kept on the chip: its FLOPs as `cases.py` counts them, each weight once."""
    lengths, patches = cases.work(case, TRUNK, padded=False)
    return Work(cases.flops(lengths, patches, TRUNK), 0, cases.traffic([], TRUNK, size, size))

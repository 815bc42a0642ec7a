"""Each op that has a backward of its own, as a function of what it is differentiated in, and the shapes of that."""

import functools

import torch

from vilt_fast import functional
from vilt_fast.testing import offsets, packing_indices


def drawn(shapes, dtypes=()):
    dtypes = dtypes or [torch.float32] * len(shapes)
    return [torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]


def attention(q, k, v, *, backend, **options):
    cu, used = offsets([5, 1, 6]), torch.tensor([4, 0, 6], dtype=torch.int32)
    return functional.attention(q, k, v, cu, cu, 6, 6, seqused_k=used, backend=backend, **options)


def patch_embed(pixels, weight, bias, cls_token, position, modality, text, *, backend, **options):
    places = packing_indices([3, 2], [(2, 2), (1, 2)], canvas=(2, 2))
    return functional.patch_embed(
        pixels, weight, bias, cls_token, position, modality, text, **places, backend=backend, **options
    )


def text_embed(word, position, token_type, weight, bias, modality, *, backend, **options):
    ids, places, types = torch.tensor([1, 4, 4, 0]), torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 0, 0])
    tables = (word, position, token_type, weight, bias, modality)
    return functional.text_embed(ids, None, places, types, *tables, eps=1e-5, padding_idx=1, backend=backend, **options)


def linear_cross_entropy(x, weight, bias, *, backend, ignore_index=-100):
    labels = torch.tensor([3, ignore_index, 0, 6, 1])
    return functional.linear_cross_entropy(x, weight, bias, labels, ignore_index=ignore_index, backend=backend)


def add_layer_norm(x, residual, weight, bias, *, backend, **options):
    return functional.add_layer_norm(x, residual, weight, bias, 1e-2, backend=backend, **options)


HEADS, ROW = (12, 2, 4), (5, 6)
HALF, FLOAT = torch.float16, torch.float32
CASES = {  #: an op, and the shapes (and dtypes) of what it is differentiated in
    "attention": (attention, [HEADS] * 3),
    "attention, with its sums": (functools.partial(attention, return_lse=True), [HEADS] * 3),
    "add_layer_norm": (add_layer_norm, [ROW, ROW, (6,), (6,)]),
    "add_layer_norm, of two dtypes": (add_layer_norm, [ROW, ROW, (6,), (6,)], [HALF, FLOAT, HALF, HALF]),
    "linear": (functional.linear, [ROW, (7, 6), (7,), (5, 7)]),
    "linear_gelu": (functional.linear_gelu, [ROW, (7, 6), (7,)]),
    "linear_qkv": (functional.linear_qkv, [ROW, *[(7, 6)] * 3, *[(7,)] * 3]),
    "linear_cross_entropy": (functools.partial(linear_cross_entropy, ignore_index=-3), [ROW, (7, 6), (7,)]),
    "text_embed": (text_embed, [(5, 8), (3, 8), (2, 8), (8,), (8,), (2, 8)]),
    "patch_embed": (patch_embed, [(2, 3, 8, 8), (8, 3, 4, 4), (8,), (8,), (10, 8), (2, 8), (5, 8)]),
}

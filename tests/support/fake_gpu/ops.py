"""Calls of every op that has Triton kernels, so that all of what ships is compiled from real arguments.

`CALLS[op](dtype)` yields (at home?, call): each at ViLT's own shapes, through every tile configuration, and at odd
ones, with every optional argument absent and present. A call is run without and with a gradient.
"""

import itertools
from functools import partial

import torch

from vilt_fast import functional
from vilt_fast.testing import offsets, packing_indices, padding_masks, sliced

ROWS = (185, 1720, 13880)  # batches of 1, 8 and 64
WIDTH, INNER, HEADS, VOCABULARY = 768, 3072, 12, 30522
SHAPES = ((WIDTH, WIDTH), (3 * WIDTH, WIDTH), (WIDTH, INNER), (INNER, WIDTH))  # outputs, inputs
FLOAT = torch.float32


def _empty(dtype, *shapes):
    return [torch.empty(shape, dtype=dtype) for shape in shapes]


def run(call, inputs) -> None:
    """Call without a gradient, then forward and backward."""
    with torch.no_grad():
        call(*inputs)
    given = [t.detach().requires_grad_() if torch.is_tensor(t) and t.is_floating_point() else t for t in inputs]
    outputs = call(*given)
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else [outputs]) if o.requires_grad]
    if outputs:
        wanted = [t for t in given if torch.is_tensor(t) and t.requires_grad]
        torch.autograd.grad(outputs, wanted, [torch.empty_like(o) for o in outputs], allow_unused=True)


def add_layer_norm(dtype):
    from .tried import DEPENDENT, tried

    def call(dropout_p, *given):
        return functional.add_layer_norm(*given, 1e-12, dropout_p=dropout_p)

    for rows, stream, dropout_p, affine in itertools.product(
        (ROWS[0], ROWS[2]), {dtype, FLOAT}, (0.0, 0.1), ((True, True), (False, False), (True, False))
    ):
        x, weight, bias = _empty(dtype, (rows, WIDTH), WIDTH, WIDTH)
        given = x, torch.empty(rows, WIDTH, dtype=stream), weight if affine[0] else None, bias if affine[1] else None
        yield True, partial(run, partial(call, dropout_p), given)
        yield True, partial(tried, "add_layer_norm", DEPENDENT, partial(run, partial(call, dropout_p), given))
    quantized = torch.no_grad()(lambda *given: functional.add_layer_norm_fp8(*given, 1e-12))
    for rows, stream, affine in itertools.product(
        (ROWS[0], ROWS[2]), {dtype, FLOAT}, ((True, True), (False, False), (True, False))
    ):
        x, weight, bias = _empty(dtype, (rows, WIDTH), WIDTH, WIDTH)
        residual = torch.empty(rows, WIDTH, dtype=stream)
        yield True, partial(quantized, x, residual, weight if affine[0] else None, bias if affine[1] else None)
    for rows, width in ((1, 1), (3, 100), (5, 8192)):
        yield False, partial(run, partial(call, 0.1), _empty(dtype, (rows, width), (rows, width), width, width))
        yield False, partial(quantized, *_empty(dtype, (rows, width), (rows, width), width, width))
    yield False, partial(run, partial(call, 0.0), [sliced(t) for t in _empty(dtype, (4, 33), (4, 33), 33, 33)])


def attention(dtype):
    def call(lengths, used, start, options, q, k, v):
        cu, longest = offsets(lengths), max(lengths)
        count = torch.tensor(lengths, dtype=torch.int32)
        return functional.attention(
            q, k, v, cu, cu, longest, longest, seqused_k=count - 1 if used else None,
            causal_start=count // 2 if start else None, **options,
        )  # fmt: skip

    def given(lengths, heads, head_dim):
        return [t.unflatten(1, (heads, head_dim)) for t in _empty(dtype, *[(sum(lengths), heads * head_dim)] * 3)]

    plain = {}, {"return_lse": True}, {"dropout_p": 0.1}
    for longest, batch in itertools.product((40, 90, 128, 150, 185, 240, 281, 320), (64, 8, 1)):
        lengths = [longest] * batch
        yield True, partial(run, partial(call, lengths, True, False, {}), given(lengths, HEADS, 64))
    for batch, (used, start), options in itertools.product((64, 1), itertools.product((True, False), repeat=2), plain):
        lengths = [281, *[185] * (batch - 1)]
        yield not start, partial(run, partial(call, lengths, used, start, options), given(lengths, HEADS, 64))
    away = (64, 1024, 64), (128, 281, 64), (128, 281, 1), (256, 50, 2), (80, 33, 1), (1, 1, 1)
    for head_dim, longest, batch in away:
        for options in plain:
            lengths = [longest] * batch
            yield False, partial(run, partial(call, lengths, False, False, options), given(lengths, 2, head_dim))
    fused = torch.empty(185, 3 * WIDTH, dtype=dtype).chunk(3, 1)
    slices = [t.unflatten(1, (HEADS, 64)) for t in fused]
    yield True, partial(run, partial(call, [185], True, False, {}), slices)


def linear(dtype):
    from vilt_fast.kernels import linear_split

    from .tried import DEPENDENT, tried

    for rows, (outputs, inputs), bias in itertools.product(ROWS, SHAPES, (True, False)):
        x, weight, added = _empty(dtype, (rows, inputs), (outputs, inputs), outputs)
        for residual in (None, *(torch.empty(rows, outputs, dtype=kind) for kind in {dtype, FLOAT})):
            yield True, partial(run, functional.linear, (x, weight, added if bias else None, residual))
        yield True, partial(tried, "linear", DEPENDENT, partial(run, functional.linear, (x, weight, added)))
    for x, weight in _odd(dtype):
        for residual in (None, torch.empty(len(x), len(weight))):
            yield False, partial(run, functional.linear, (x, weight, None, residual))
    for residual, bias, split in itertools.product(
        (None, *{dtype, FLOAT}), (True, False), (linear_split.BATCH_1, linear_split.BATCH_1 | DEPENDENT)
    ):
        x, weight, added = _empty(dtype, (ROWS[0], INNER), (WIDTH, INNER), WIDTH)
        stream = residual and torch.empty(ROWS[0], WIDTH, dtype=residual)
        inner = partial(run, functional.linear, (x, weight, added if bias else None, stream))
        yield True, partial(tried, "linear", split, inner)


def linear_qkv(dtype):
    from .tried import DEPENDENT, tried

    for rows, given in itertools.product(ROWS, ((True, True, True), (False, False, False), (True, False, True))):
        x, *weights = _empty(dtype, (rows, WIDTH), *[(WIDTH, WIDTH)] * 3)
        biases = [torch.empty(WIDTH, dtype=dtype) if one else None for one in given]
        yield True, partial(run, functional.linear_qkv, (x, *weights, *biases))
        yield True, partial(tried, "linear_qkv", DEPENDENT, partial(run, functional.linear_qkv, (x, *weights, *biases)))
    for x, weight in _odd(dtype):
        yield False, partial(run, functional.linear_qkv, (x, weight, weight.clone(), weight, None, None, None))


def linear_gelu(dtype):
    from .tried import DEPENDENT, tried

    for rows, bias in itertools.product(ROWS, (True, False)):
        x, weight, added = _empty(dtype, (rows, WIDTH), (INNER, WIDTH), INNER)
        given = x, weight, added if bias else None
        yield True, partial(run, functional.linear_gelu, given)
        yield True, partial(tried, "linear_gelu", DEPENDENT, partial(run, functional.linear_gelu, given))
    for x, weight in _odd(dtype):
        yield False, partial(run, functional.linear_gelu, (x, weight, None))


def _odd(dtype):
    """(x, weight) of sizes and places that no descriptor describes, from one row up to the largest tiles."""
    for rows, outputs, inputs in ((1, 1, 1), (3, 7, 5), (600, 1000, 100), (5000, 3001, 64)):
        yield _empty(dtype, (rows, inputs), (outputs, inputs))
    yield [torch.empty(9000, 65, dtype=dtype)[:, 1:], torch.empty(1024, 65, dtype=dtype)[:, 1:]]
    for rows, (outputs, inputs) in itertools.product(ROWS, SHAPES):  # a place in memory off by one element
        yield _empty(dtype, (rows, inputs)) + [torch.empty(outputs * inputs + 1, dtype=dtype)[1:].view(outputs, inputs)]


def linear_fp8(dtype):
    for rows, (outputs, inputs), gelu, bias in itertools.product(ROWS, SHAPES, (False, True), (True, False)):
        x, weight, added = _empty(dtype, (rows, inputs), (outputs, inputs), outputs)
        yield True, partial(_fp8, x, weight, added if bias else None, gelu)

    @torch.no_grad()
    def handed_on(rows, inner, width, bias, by_rows):
        x, added = _empty(dtype, (rows, width), inner)
        weights = [functional.quantize_fp8(torch.empty(shape)) for shape in ((inner, width), (width, inner))]
        x, scale = functional.quantize_fp8(x) if by_rows else (x, None)
        given = added if bias else None
        x, scale = functional.linear_gelu_fp8(x, *weights[0], given, x_scale=scale)
        functional.linear_fp8(x, *weights[1], None, x_scale=scale, dtype=dtype)

    for rows, bias, by_rows in itertools.product(ROWS, (True, False), (True, False)):
        yield True, partial(handed_on, rows, INNER, WIDTH, bias, by_rows)
    for rows, inner, width in ((1, 1, 1), (3, 7, 5), (600, 1000, 100), (5000, 3001, 64), (9000, 264, 1024)):
        yield False, partial(handed_on, rows, inner, width, False, True)
    for x, weight in _odd(dtype):
        for gelu in (False, True):
            yield False, partial(_fp8, x, weight, None, gelu)


@torch.no_grad()
def _fp8(x, weight, bias, gelu):
    copy, scale = functional.quantize_fp8(weight)
    if weight.data_ptr() % 16:
        copy = torch.empty(copy.numel() + 1, dtype=copy.dtype)[1:].view(copy.shape)
    functional.linear_fp8(x, copy, scale, bias, gelu=gelu)


def linear_cross_entropy(dtype):
    def call(labels, reduction, *given):
        return functional.linear_cross_entropy(*given, labels, reduction=reduction)

    for rows, bias, reduction in itertools.product((40, 320, 2560), (True, False), ("mean", "none")):
        x, weight, added = _empty(dtype, (rows, WIDTH), (VOCABULARY, WIDTH), VOCABULARY)
        labels = torch.zeros(rows, dtype=torch.int64)
        yield True, partial(run, partial(call, labels, reduction), (x, weight, added if bias else None))
    for rows, classes, width in ((1, 1, 1), (3, 5, 100)):
        labels = torch.zeros(rows, dtype=torch.int64)
        yield False, partial(run, partial(call, labels, "sum"), (*_empty(dtype, (rows, width), (classes, width)), None))


def text_embed(dtype):
    def call(ids, places, types, options, embeds, *tables):
        return functional.text_embed(ids, embeds, places, types, *tables, eps=1e-12, padding_idx=0, **options)

    for rows, whole, types, modality, options in itertools.product(
        (40, 1500), (True, False), (True, False), (True, False),
        ({}, {"dropout_p": 0.1}, {"deterministic": False}, {"dropout_p": 0.1, "deterministic": False}),
    ):  # fmt: skip
        zeros = torch.zeros(rows, dtype=torch.int64)
        embeds, *tables, rest = _empty(
            dtype, (rows, WIDTH), (VOCABULARY, WIDTH), (40, WIDTH), (2, WIDTH), WIDTH, WIDTH, (2, WIDTH)
        )
        given = [None if whole else embeds, *tables, rest if modality else None]
        inner = partial(call, zeros if whole else None, zeros, zeros if types else None, options)
        yield True, partial(run, inner, given)
    one = torch.zeros(1, dtype=torch.int64)
    tables = _empty(dtype, (1, 1), (1, 1), (1, 1), 1, 1)
    yield False, partial(run, partial(call, one, one, None, {}), [None, *tables, None])


def patch_embed(dtype):
    def call(indices, options, *given):
        names = ("pixels", "weight", "bias", "cls_token", "position", "modality", "text")
        given = dict(zip(names, given, strict=True))
        indices = dict(indices)
        if given["text"] is None:
            indices["text_rows"] = None
        if given["modality"] is None:
            indices["modality_index"] = None
        return functional.patch_embed(**given, **indices, **options)

    def inputs(batch, grid, patch, width, pixel_dtype, bias=True, modality=True, text=True):
        words = 40 if text else 0
        indices = packing_indices([words] * batch, [grid] * batch, canvas=grid, table=(12, 12))
        pixels = torch.empty(batch, 3, grid[0] * patch, grid[1] * patch, dtype=pixel_dtype)
        given = _empty(dtype, (width, 3, patch, patch), width, width, (145, width), (3, width), (batch * words, width))
        for place, there in ((1, bias), (4, modality), (5, text)):
            given[place] = given[place] if there else None
        return indices, [pixels, *given]

    for batch, dropout_p in itertools.product((1, 8, 64), (0.0, 0.1)):  # 144, 1152, 9216 patches
        indices, given = inputs(batch, (12, 12), 32, WIDTH, dtype)
        yield True, partial(run, partial(call, indices, {"dropout_p": dropout_p}), given)
    for batch, (name, present) in itertools.product(
        (1, 64), (("all", {}), ("no bias", {"bias": False}), ("alone", {"modality": False, "text": False}))
    ):
        for pixel_dtype in (FLOAT, torch.uint8) if name == "all" else (dtype,):
            indices, given = inputs(batch, (12, 12), 32, WIDTH, pixel_dtype, **present)
            options = {}
            if pixel_dtype == torch.uint8:
                options = dict(zip(("pixel_scale", "pixel_shift"), _empty(FLOAT, 3, 3), strict=True))
            for dropout_p in (0.0, 0.1):
                yield True, partial(run, partial(call, indices, options | {"dropout_p": dropout_p}), given)
    for grid, patch, width in (((1, 1), 1, 1), ((2, 3), 14, 100)):
        indices, given = inputs(2, grid, patch, width, FLOAT)
        yield False, partial(run, partial(call, indices, {"dropout_p": 0.1}), given)


PAIRS = ((40, 240), (32, 240), (24, 240), (16, 100), (64, 500), (128, 1024), (1, 1))


def _pads(words, patches, batch=4):
    return [padding_masks([n] * batch) for n in (words, patches)]


def ipot(dtype):
    for words, patches in PAIRS:
        for options in ({}, {"beta": 0.02, "inner": 2}):
            cost = torch.empty(4, words, patches, dtype=dtype)
            yield True, partial(_planned, functional.ipot, cost, _pads(words, patches), options)


def sinkhorn(dtype):
    for words, patches in PAIRS:
        marginals = dict(text_marginal=torch.empty(4, words), image_marginal=torch.empty(4, patches))
        for options in ({}, {"tolerance": 1e-3}, marginals):
            cost = torch.empty(4, words, patches, dtype=dtype)
            yield True, partial(_planned, functional.sinkhorn, cost, _pads(words, patches), options)
    cost = torch.zeros(2, 5, 7, dtype=dtype)  # it is looked at
    yield False, partial(run, lambda cost: functional.sinkhorn(cost, *_pads(5, 7, 2)).value, [cost])


@torch.no_grad()
def _planned(function, cost, pads, options):
    function(cost.zero_(), *pads, **{k: v.fill_(1) if torch.is_tensor(v) else v for k, v in options.items()})


def word_patch_distance(dtype):
    def call(pads, options, text, image):
        return functional.word_patch_distance(text, image, *pads, **options)

    for (words, patches), options in itertools.product(PAIRS, ({}, {"return_plan": True}, {"beta": 0.02})):
        states = _empty(dtype, (4, words, WIDTH), (4, patches, WIDTH))
        yield True, partial(run, partial(call, _pads(words, patches), options), states)


CALLS = {
    function.__name__: function
    for function in (
        add_layer_norm, attention, linear, linear_qkv, linear_gelu, linear_fp8, linear_cross_entropy, text_embed,
        patch_embed, ipot, sinkhorn, word_patch_distance,
    )
}  # fmt: skip

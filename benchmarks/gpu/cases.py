"""The ops that a campaign checks: of each, inputs on the device and `call(backend, *inputs)`."""

from functools import partial

import torch

from vilt_fast import functional, testing


def _random(context, *shape, scale=1.0):
    """Values that float16 and bfloat16 hold exactly enough to start from the same numbers everywhere."""
    return (torch.randn(shape) * scale).to(torch.bfloat16).float().to(context.device)


def _size(context, small, large):
    return small if context.tiny else large


def _attention(context):
    lengths = _size(context, [5, 9], [185, 281, 17, 64])
    rows, heads = sum(lengths), _size(context, 1, 12)
    offsets, longest = testing.offsets(lengths).to(context.device), max(lengths)
    used = torch.tensor([n - 1 for n in lengths], dtype=torch.int32, device=context.device)

    def call(backend, q, k, v):
        return functional.attention(q, k, v, offsets, offsets, longest, longest, seqused_k=used, backend=backend)

    return [_random(context, rows, heads, 64) for _ in range(3)], call


def _add_layer_norm(context):
    rows, width = _size(context, (5, 64), (1001, 768))
    inputs = [
        _random(context, rows, width),
        _random(context, rows, width),
        *(_random(context, width) for _ in range(2)),
    ]
    return inputs, lambda backend, *given: functional.add_layer_norm(*given, 1e-6, backend=backend)


def _linear(context):
    rows, inputs, outputs = _size(context, (5, 32, 16), (1001, 768, 2304))
    given = _random(context, rows, inputs), _random(context, outputs, inputs, scale=inputs**-0.5)
    given = [*given, _random(context, outputs), _random(context, rows, outputs)]
    return given, lambda backend, *tensors: functional.linear(*tensors, backend=backend)


def _linear_gelu(context):
    rows, inputs, outputs = _size(context, (5, 32, 16), (1001, 768, 3072))
    given = (
        _random(context, rows, inputs),
        _random(context, outputs, inputs, scale=inputs**-0.5),
        _random(context, outputs),
    )
    return list(given), lambda backend, *tensors: functional.linear_gelu(*tensors, backend=backend)


def _linear_qkv(context):
    rows, inputs, outputs = _size(context, (5, 32, 16), (1001, 768, 768))
    weights = [_random(context, outputs, inputs, scale=inputs**-0.5) for _ in range(3)]
    given = [_random(context, rows, inputs), *weights, *(_random(context, outputs) for _ in range(3))]
    return given, lambda backend, *tensors: functional.linear_qkv(*tensors, backend=backend)


def _linear_fp8(context):
    rows, inputs, outputs = _size(context, (5, 32, 16), (1001, 768, 3072))
    x = torch.randint(-14, 15, (rows, inputs)).to(context.device, torch.float32)
    x[:, 0] = 14  # rows that e4m3 holds exactly: how it rounds is a test's business, and the interpreter gets it wrong
    weight = functional.quantize_fp8(_random(context, outputs, inputs), backend="reference")
    given = [x, _random(context, outputs)]
    return given, lambda backend, x, bias: functional.linear_fp8(x, *weight, bias, gelu=True, backend=backend)


def _add_layer_norm_fp8(context):
    inputs, _ = _add_layer_norm(context)

    def call(backend, *given):
        s, q, scale = functional.add_layer_norm_fp8(*given, 1e-6, backend=backend)
        exact = functional.add_layer_norm(*given, 1e-6, backend="reference")[1] if s.dtype == torch.float64 else None
        return s, *_decoded(context, q, scale, scale[:, None], exact)

    return inputs, call


def _linear_gelu_fp8(context):
    given, _ = _linear_fp8(context)
    weight = functional.quantize_fp8(_random(context, *_size(context, (256, 32), (3072, 768))), backend="reference")
    given[1] = _random(context, len(weight[0]))

    def call(backend, x, bias):
        q, scale = functional.linear_gelu_fp8(x, *weight, bias, backend=backend)
        plain = partial(functional.linear_fp8, x, *weight, bias, gelu=True, backend="reference")
        exact = plain() if x.dtype == torch.float64 else None
        return _decoded(context, q, scale, scale.repeat_interleave(q.shape[-1] // scale.shape[-1], -1), exact)

    return given, call


def _decoded(context, q, scale, factors, exact):
    """(scales, the rows that they and e4m3 say); the truth is not rounded to 8 bits. The interpreter rounds wrongly."""
    rows = (q.float() * factors,) if exact is None else (exact,)
    return (scale if exact is None else scale.double(), *(() if context.dry else rows))


def _linear_cross_entropy(context):
    rows, width, vocabulary = _size(context, (5, 32, 50), (640, 768, 30522))
    labels = torch.randint(vocabulary, (rows,))
    labels[::3] = -100
    given = [
        _random(context, rows, width),
        _random(context, vocabulary, width, scale=0.05),
        _random(context, vocabulary),
    ]
    labels = labels.to(context.device)
    return given, lambda backend, *x: functional.linear_cross_entropy(*x, labels, backend=backend)


def _text_embed(context):
    rows, width, vocabulary = _size(context, (6, 32, 20), (1500, 768, 30522))
    ids = torch.randint(vocabulary, (rows,)).to(context.device)
    places, kinds = (torch.arange(rows) % 40).to(context.device), (torch.arange(rows) % 2).to(context.device)
    tables = [
        _random(context, *shape)
        for shape in ((vocabulary, width), (40, width), (2, width), (width,), (width,), (2, width))
    ]

    def call(backend, *tables):
        return functional.text_embed(ids, None, places, kinds, *tables, eps=1e-12, padding_idx=0, backend=backend)

    return tables, call


def _patch_embed(context):
    grids, texts, patch, width = _size(
        context, ([(2, 2), (1, 2)], [2, 1], 8, 32), ([(12, 20), (20, 12), (12, 12)], [40, 8, 22], 32, 768)
    )
    canvas = tuple(max(side) for side in zip(*grids, strict=True))
    indices = testing.packing_indices(texts, grids, canvas=canvas, table=(12, 12))
    indices = {name: value.to(context.device) if torch.is_tensor(value) else value for name, value in indices.items()}
    shapes = (
        (len(grids), 3, canvas[0] * patch, canvas[1] * patch), (width, 3, patch, patch), (width,), (width,),
        (145, width), (3, width), (sum(texts), width),
    )  # fmt: skip
    names = ("pixels", "weight", "bias", "cls_token", "position", "modality", "text")
    inputs = [_random(context, *shape, scale=0.02 if i == 1 else 1.0) for i, shape in enumerate(shapes)]

    def call(backend, *tensors):
        return functional.patch_embed(**dict(zip(names, tensors, strict=True)), **indices, backend=backend)

    return inputs, call


def _pairs(context):
    words, patches = _size(context, ([10, 6], [20, 30]), ([40, 12, 1, 0] * 4, [240, 144, 7, 30] * 4))
    pads = [testing.padding_masks(sizes).to(context.device) for sizes in (words, patches)]
    return words, patches, pads


def _word_patch_distance(context):
    words, patches, pads = _pairs(context)
    width = _size(context, 32, 768)
    states = [_random(context, len(sizes), max(sizes), width) for sizes in (words, patches)]
    # Iterations magnify how costs were rounded, which the interpreter's products do by shape and a GPU's do not.
    options = {"iterations": context.iterations}
    return states, lambda backend, *given: functional.word_patch_distance(*given, *pads, **options, backend=backend)


def _plan(context, function, pads, backend, cost):
    more = {"iterations": 2} if context.tiny else {}
    found = function(cost.detach(), *pads, backend=backend, **more)
    return found if isinstance(found, torch.Tensor) else found.plan


def _ipot(context):
    words, patches, pads = _pairs(context)
    cost = [_random(context, len(words), max(words), max(patches)).sigmoid()]
    return cost, partial(_plan, context, functional.ipot, pads)


def _sinkhorn(context):
    words, patches, pads = _pairs(context)
    cost = [_random(context, len(words), max(words), max(patches)).sigmoid()]
    return cost, partial(_plan, context, functional.sinkhorn, pads)


OPS = {
    "attention": _attention,
    "patch_embed": _patch_embed,
    "text_embed": _text_embed,
    "add_layer_norm": _add_layer_norm,
    "linear": _linear,
    "linear_gelu": _linear_gelu,
    "linear_qkv": _linear_qkv,
    "linear_fp8": _linear_fp8,
    "linear_gelu_fp8": _linear_gelu_fp8,
    "add_layer_norm_fp8": _add_layer_norm_fp8,
    "linear_cross_entropy": _linear_cross_entropy,
    "word_patch_distance": _word_patch_distance,
    "ipot": _ipot,
    "sinkhorn": _sinkhorn,
}

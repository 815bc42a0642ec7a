"""A block's products and norms of ours, in 16 bits and on e4m3, beside eager and torch.compile."""

from functools import partial

import torch
import torch.nn.functional as F

from vilt_fast import functional, order
from vilt_fast.ops import registry

from .. import counts
from . import variants
from .groups import compiled, double, group, lengths, random, with_each


def _gelu(x, weight, bias):
    return F.gelu(F.linear(x, weight, bias))


def _products(context, case, op, inputs, outputs, plain, ours):
    """One of the block's matrices."""
    rows = sum(lengths(context, case))
    given = (
        random(context, rows, inputs),
        random(context, outputs, inputs, scale=inputs**-0.5),
        random(context, outputs),
    )
    own = partial(ours, *given, backend="triton")
    calls = {"eager": partial(plain, *given), **with_each(compiled(context, case, plain), *given), "ours": own}
    calls |= variants.of(context, case, op, own)
    work = counts.linear(rows, inputs, outputs, given[0].element_size())
    group(context, op, case, calls, lambda: plain(*map(double, given)), work)


def linear_gelu(context, case):
    d, f = context.config.hidden_size, context.config.intermediate_size
    _products(context, case, "linear_gelu", d, f, _gelu, functional.linear_gelu)


def linear_out(context, case):
    d = context.config.hidden_size
    _products(context, case, "linear out", d, d, F.linear, functional.linear)


def linear_fc2(context, case):
    d, f = context.config.hidden_size, context.config.intermediate_size
    _products(context, case, "linear fc2", f, d, F.linear, functional.linear)


def linear_qkv(context, case):
    """Queries, keys and values: of three weights, in one launch or in three; and one product of three times the width,
    as if somebody had laid the weights together."""
    d, rows = context.config.hidden_size, sum(lengths(context, case))
    x = random(context, rows, d)
    weights = [random(context, d + i, d, scale=d**-0.5)[:d] for i in range(3)]
    biases = [random(context, d + i)[:d] for i in range(3)]
    one = torch.cat(weights), torch.cat(biases)

    def three(linear, x, weights, biases):
        return [linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]

    def together(linear):
        return linear(x, *one).split(d, 1)

    plain = partial(three, F.linear)
    own = partial(functional.linear, backend="triton")
    calls = {"eager": partial(plain, x, weights, biases)}
    calls |= with_each(compiled(context, case, plain), x, weights, biases)
    one_launch = partial(functional.linear_qkv, x, *weights, *biases, backend="triton")
    calls |= {"eager one_product": partial(together, F.linear), "ours": one_launch}
    calls |= {
        "ours three_launches": partial(three, own, x, weights, biases),
        "ours one_product": partial(together, own),
    }
    calls |= variants.of(context, case, "linear qkv", one_launch)
    work = counts.linear(rows, d, 3 * d, x.element_size())
    exact = partial(plain, x.double(), [w.double() for w in weights], [b.double() for b in biases])
    group(context, "linear qkv", case, calls, exact, work)


def _into_norm(context, case, op, inputs):
    """A linear layer, the residual stream and the norm behind: who adds the stream, and whose product it is."""
    d, rows = context.config.hidden_size, sum(lengths(context, case))
    x, stream = random(context, rows, inputs), random(context, rows + 1, d)[1:]
    weight, bias = random(context, d, inputs, scale=inputs**-0.5), random(context, d)
    norm = random(context, d), random(context, d), 1e-12

    def plain(x, stream, weight, bias, scale, shift):
        total = F.linear(x, weight, bias) + stream
        return total, F.layer_norm(total, (d,), scale, shift, norm[2])

    def norm_adds(linear):
        return functional.add_layer_norm(linear(x, weight, bias), stream, *norm, backend="triton")

    def linear_adds():
        total = own(x, weight, bias, stream)
        return total, F.layer_norm(total, (d,), *norm)

    own, given = partial(functional.linear, backend="triton"), (x, stream, weight, bias, *norm[:2])
    calls = {"eager": partial(plain, *given), **with_each(compiled(context, case, plain), *given)}
    calls |= {
        "ours": partial(norm_adds, F.linear),
        "ours own_product": partial(norm_adds, own),
        "ours linear_adds": linear_adds,
    }
    size = x.element_size()
    product, added = counts.linear(rows, inputs, d, size, residual=size), counts.add_layer_norm(rows, d, size)
    work = product._replace(scalar=added.scalar, bytes=product.bytes + added.bytes // 4)  # of the norm, what it writes
    group(context, op, case, calls, lambda: plain(*map(double, given)), work)


def linear_out_norm(context, case):
    _into_norm(context, case, "linear out norm", context.config.hidden_size)


def linear_fc2_norm(context, case):
    _into_norm(context, case, "linear fc2 norm", context.config.intermediate_size)


def add_layer_norm(context, case):
    d, rows = context.config.hidden_size, sum(lengths(context, case))
    given = [random(context, rows, d), random(context, rows + 1, d)[1:], random(context, d), random(context, d)]

    def plain(x, residual, weight, bias):
        total = x + residual
        return total, F.layer_norm(total, (d,), weight, bias, 1e-12)

    calls = {"eager": partial(plain, *given), **with_each(compiled(context, case, plain), *given)}
    own = partial(functional.add_layer_norm, *given, 1e-12, backend="triton")
    calls |= {"ours": own, **variants.of(context, case, "add_layer_norm", own)}
    work = counts.add_layer_norm(rows, d, given[0].element_size())
    group(context, "add_layer_norm", case, calls, lambda: plain(*map(double, given)), work)


def _quantized(context, outputs, inputs):
    """(weight in the dtype of the campaign, the same as e4m3 with its scales)."""
    weight = random(context, outputs, inputs, scale=inputs**-0.5)
    return weight, functional.quantize_fp8(weight, backend="reference")


def _why_no_fp8(context):
    return registry.why_unavailable("linear_fp8", "triton", device=context.device.type, dtype=context.dtype)


def add_layer_norm_fp8(context, case):
    """A norm and the product of queries, keys and values on e4m3: what ships hands on e4m3, `apart` makes a pass."""
    if reason := _why_no_fp8(context):
        context.note(f"add_layer_norm_fp8: {reason}")
        return
    d, rows = context.config.hidden_size, sum(lengths(context, case))
    given = [random(context, rows, d), random(context, rows + 1, d)[1:], random(context, d), random(context, d)]
    weight, copy = _quantized(context, 3 * d, d)

    def ours():
        if order.chosen("add_layer_norm_fp8").get("FUSED", True):
            _, x, scale = functional.add_layer_norm_fp8(*given, 1e-12, backend="triton")
        else:
            x, scale = functional.quantize_fp8(
                functional.add_layer_norm(*given, 1e-12, backend="triton")[1], backend="triton"
            )
        return functional.linear_fp8(x, *copy, None, x_scale=scale, dtype=context.dtype, backend="triton")

    def plain(x, residual, scale, bias, weight):
        return F.linear(F.layer_norm(x + residual, (d,), scale, bias, 1e-12), weight)

    calls = {"eager bfloat16": partial(plain, *given, weight), "ours": ours}
    calls |= variants.of(context, case, "add_layer_norm_fp8", ours)
    group(
        context, "add_layer_norm_fp8", case, calls, lambda: plain(*map(double, (*given, weight))),
        counts.linear(rows, d, 3 * d, 1), "float8",
    )  # fmt: skip


def linear_gelu_fp8(context, case):
    """A feed-forward sublayer on e4m3: what ships hands on e4m3 by groups of columns, `apart` by rows, in a pass."""
    if reason := _why_no_fp8(context):
        context.note(f"linear_gelu_fp8: {reason}")
        return
    d, f, rows = context.config.hidden_size, context.config.intermediate_size, sum(lengths(context, case))
    x, (first, one), (second, two) = (
        random(context, rows, d), _quantized(context, f, d), _quantized(context, d, f)
    )  # fmt: skip
    rounded = functional.quantize_fp8(x, backend="triton")

    def ours():
        q, scale = rounded
        if order.chosen("linear_gelu_fp8").get("FUSED", True):
            inner, scale = functional.linear_gelu_fp8(q, *one, None, x_scale=scale, backend="triton")
            return functional.linear_fp8(inner, *two, None, x_scale=scale, dtype=context.dtype, backend="triton")
        more = dict(x_scale=scale, dtype=context.dtype, backend="triton")
        return functional.linear_fp8(
            functional.linear_fp8(q, *one, None, gelu=True, **more), *two, None, backend="triton"
        )

    def plain(x, first, second):
        return F.linear(F.gelu(F.linear(x, first)), second)

    calls = {"eager bfloat16": partial(plain, x, first, second), "ours": ours}
    calls |= variants.of(context, case, "linear_gelu_fp8", ours)
    one_way, back = counts.linear(rows, d, f, 1), counts.linear(rows, f, d, 1)
    work = counts.Work(one_way.products + back.products, 0, one_way.bytes + back.bytes)
    group(context, "linear_gelu_fp8", case, calls, lambda: plain(*map(double, (x, first, second))), work, "float8")

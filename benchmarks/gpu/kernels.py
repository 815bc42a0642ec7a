"""Every op of ours beside what a user would call instead, on a GPU: eager, torch.compile, SDPA, other libraries.

The arguments of `attention`, `patch_embed` and `text_embed` are those of a forward of the model itself, written down as
it makes them. Who computes padding gets padded inputs of the same samples, and hands back real rows only; the counts
are those of the real rows for all, so the floor is the same for all. `_bwd` groups are forward and backward together.
Nobody waits for the host while he is timed: which rows are real is known beforehand.

Providers called `ours <variant>` are the same kernels in configurations that may win elsewhere (`variants.py`).
"""

import contextlib
import importlib.util
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F

import vilt_fast
from vilt_fast import functional, order, testing
from vilt_fast.ops import registry

from .. import counts, ops
from . import timing, variants


def kernels(context):
    """Groups from the largest batch down, so that a cut loses the small ones."""
    for batch in (context.batches[:3])[::-1]:
        case = context.case(batch)
        for group in (
            _attention, _attention_gradients, _linear_gelu, _linear_qkv, _linear_out, _linear_fc2, _linear_out_norm,
            _linear_fc2_norm, _add_layer_norm, _text_embed, _patch_embed, _linear_cross_entropy, _add_layer_norm_fp8,
            _linear_gelu_fp8,
        ):  # fmt: skip
            context.item(f"{group.__name__[1:]}, batch {batch}", partial(group, context, case))
        context.kept.pop(("calls", case.name), None)
        context.free()


def lengths(context, case):
    """Real rows of each sample."""
    return case.lengths(context.config.patch_size)


def recorded(context, case):
    """{op: (arguments, keyword arguments)} of the first call of each op in a forward of the accelerated model."""
    return context.once(("calls", case.name), partial(_record, context, case))


def _record(context, case):
    model = vilt_fast.accelerate(context.model().to(context.dtype))
    calls = {}

    def note(op, function, *arguments, **keywords):
        calls.setdefault(op, (arguments, keywords))
        return function(*arguments, **keywords)

    with contextlib.ExitStack() as stack, torch.no_grad():
        for op in ("attention", "patch_embed", "text_embed"):
            own = getattr(functional, op)
            stack.enter_context(mock.patch.object(functional, op, partial(note, op, own)))
        model(**context.inputs(case))
    missing = {"attention", "patch_embed", "text_embed"} - set(calls)
    if missing:
        raise RuntimeError(f"the accelerated model did not call {', '.join(sorted(missing))}")
    return calls


def _rows_of(real):
    """Numbers of the real rows of a padded batch, so that they can be taken without looking for them."""
    return real.flatten().nonzero().flatten()


def _double(value):
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.detach().double() if floating else value


def _detached(value):
    return value.detach() if isinstance(value, torch.Tensor) else value


def _compiled(context, case, function):
    """{"compiled": ...} at the largest batch: compiling takes seconds, at every shape anew."""
    if case.batch < max(context.batches[:3]):
        return {}
    return {"compiled": torch.compile(function, backend=context.compiler, dynamic=False)}


def _with(functions, *arguments):
    return {name: partial(function, *arguments) for name, function in functions.items()}


def _dtype(context):
    return str(context.dtype).removeprefix("torch.")


@torch.no_grad()
def _group(context, op, case, calls, truth, work, dtype=None, **options):
    name = f"{op} {case.name}"
    timing.group(context, "kernels", name, case.shape, dtype or _dtype(context), calls, truth, work, **options)


def _group_with_gradients(context, op, case, calls, truth, work):
    timing.group(context, "kernels", f"{op}_bwd {case.name}", case.shape, _dtype(context), calls, truth, work)


# --- attention --------------------------------------------------------------------------------------------------------


class _Attention:
    """The inputs of both groups: packed, as the engine has them, and [B, H, L, d] with a mask."""

    def __init__(self, context, case):
        arguments, keywords = recorded(context, case)["attention"]
        self.sizes = lengths(context, case)
        self.packed = [t.detach().contiguous() for t in arguments[:3]]
        self.offsets, self.rest = arguments[3], arguments[3:]
        self.ours = partial(
            functional.attention, backend="triton", **{k: v for k, v in keywords.items() if k != "backend"}
        )
        real = ~testing.padding_masks(self.sizes).to(context.device)
        mask = torch.zeros(real.shape, dtype=context.dtype, device=context.device).masked_fill(~real, -torch.inf)
        self.mask, self.rows = mask[:, None, None], _rows_of(real)
        self.padded = [ops._pad(t, real).transpose(1, 2).contiguous() for t in self.packed]
        self.exact = partial(_softmax_attention, mask=self.mask.double(), rows=self.rows)
        self.work = counts.attention(self.sizes, *self.packed[0].shape[1:], self.packed[0].element_size())


def _attention(context, case):
    """Packed, as the engine calls it; the peers get [B, H, L, d] and a mask, or a nested tensor without padding."""
    given = _Attention(context, case)
    padded, mask, rows = given.padded, given.mask, given.rows
    ours = partial(given.ours, *given.packed, *given.rest)
    calls = {
        "eager_padded": partial(_softmax_attention, *padded, mask, rows),
        "sdpa_padded": partial(_sdpa, *padded, mask, rows),
        **_with(_compiled(context, case, _softmax_attention), *padded, mask, rows),
        **_sdpa_backends(context, padded, mask, rows),
        **_unpadded(given.packed, given.offsets, min(given.sizes), max(given.sizes)),
        "ours": ours,
        **variants.of(context, case, "attention", ours),
    }
    _group(context, "attention", case, calls, lambda: given.exact(*map(_double, padded)), given.work)


def _attention_gradients(context, case):
    given = _Attention(context, case)
    padded, mask, rows = given.padded, given.mask, given.rows

    def gradients(function, inputs):
        leaves = [t.detach().requires_grad_() for t in inputs]

        def call():
            out = function(*leaves)
            return torch.autograd.grad(out, leaves, torch.ones_like(out))

        return call

    def of_real(call):
        return lambda: [_of_rows(g, rows) for g in call()]

    # Both directions: what the forward needs and two and a half times that.
    both = counts.attention_bwd(given.sizes, *given.packed[0].shape[1:], given.packed[0].element_size())
    both = both._replace(products=both.products + given.work.products, bytes=both.bytes + given.work.bytes)
    ours = gradients(lambda *qkv: given.ours(*qkv, *given.rest), given.packed)
    calls = {
        "eager_padded": of_real(gradients(lambda *qkv: _softmax_attention(*qkv, mask, rows), padded)),
        "sdpa_padded": of_real(gradients(lambda *qkv: _sdpa(*qkv, mask, rows), padded)),
        "ours": ours,
        **variants.of(context, case, "attention_bwd", ours),
    }
    truth = of_real(gradients(given.exact, [_double(t) for t in padded]))
    _group_with_gradients(context, "attention", case, calls, truth, both)


def _of_rows(padded, rows):
    """[B, H, L, d] to [N, H, d]."""
    return padded.transpose(1, 2).flatten(0, 1).index_select(0, rows)


def _softmax_attention(q, k, v, mask, rows):
    """As HuggingFace's model computes it."""
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + mask).softmax(-1)
    return _of_rows(weights @ v, rows)


def _sdpa(q, k, v, mask, rows):
    return _of_rows(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), rows)


def _sdpa_backends(context, padded, mask, rows):
    """SDPA's own kernels one by one, where there is a choice."""
    if context.dry:
        return {}
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def only(backend):
        with sdpa_kernel([backend]):
            return _sdpa(*padded, mask.expand(-1, -1, padded[0].shape[2], -1), rows)

    return {
        "sdpa_efficient_padded": partial(only, SDPBackend.EFFICIENT_ATTENTION),
        "sdpa_cudnn_padded": partial(only, SDPBackend.CUDNN_ATTENTION),
    }


def _unpadded(packed, offsets, shortest, longest):
    """Peers that take packed rows as they are."""
    spread = {"min_seqlen": shortest, "max_seqlen": longest}
    nested = [torch.nested.nested_tensor_from_jagged(t, offsets.long(), **spread).transpose(1, 2) for t in packed]
    calls = {"sdpa_nested": lambda: F.scaled_dot_product_attention(*nested).transpose(1, 2).values()}
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_varlen_func

        calls["flash_attn"] = lambda: flash_attn_varlen_func(*packed, offsets, offsets, longest, longest)
    return calls


# --- rows -------------------------------------------------------------------------------------------------------------


def _random(context, *shape, scale=1.0):
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(context.device, context.dtype)


def _gelu(x, weight, bias):
    return F.gelu(F.linear(x, weight, bias))


def _products(context, case, op, inputs, outputs, plain, ours):
    """One of the block's matrices."""
    rows = sum(lengths(context, case))
    given = (
        _random(context, rows, inputs),
        _random(context, outputs, inputs, scale=inputs**-0.5),
        _random(context, outputs),
    )
    own = partial(ours, *given, backend="triton")
    calls = {"eager": partial(plain, *given), **_with(_compiled(context, case, plain), *given), "ours": own}
    calls |= variants.of(context, case, op, own)
    work = counts.linear(rows, inputs, outputs, given[0].element_size())
    _group(context, op, case, calls, lambda: plain(*map(_double, given)), work)


def _linear_gelu(context, case):
    d, f = context.config.hidden_size, context.config.intermediate_size
    _products(context, case, "linear_gelu", d, f, _gelu, functional.linear_gelu)


def _linear_out(context, case):
    d = context.config.hidden_size
    _products(context, case, "linear out", d, d, F.linear, functional.linear)


def _linear_fc2(context, case):
    d, f = context.config.hidden_size, context.config.intermediate_size
    _products(context, case, "linear fc2", f, d, F.linear, functional.linear)


def _linear_qkv(context, case):
    """Queries, keys and values: of three weights, in one launch or in three; and one product of three times the width,
    as if somebody had laid the weights together."""
    d, rows = context.config.hidden_size, sum(lengths(context, case))
    x = _random(context, rows, d)
    weights = [_random(context, d + i, d, scale=d**-0.5)[:d] for i in range(3)]
    biases = [_random(context, d + i)[:d] for i in range(3)]
    one = torch.cat(weights), torch.cat(biases)

    def three(linear, x, weights, biases):
        return [linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]

    def together(linear):
        return linear(x, *one).split(d, 1)

    plain = partial(three, F.linear)
    own = partial(functional.linear, backend="triton")
    calls = {"eager": partial(plain, x, weights, biases)}
    calls |= _with(_compiled(context, case, plain), x, weights, biases)
    one_launch = partial(functional.linear_qkv, x, *weights, *biases, backend="triton")
    calls |= {"eager one_product": partial(together, F.linear), "ours": one_launch}
    calls |= {
        "ours three_launches": partial(three, own, x, weights, biases),
        "ours one_product": partial(together, own),
    }
    calls |= variants.of(context, case, "linear qkv", one_launch)
    work = counts.linear(rows, d, 3 * d, x.element_size())
    exact = partial(plain, x.double(), [w.double() for w in weights], [b.double() for b in biases])
    _group(context, "linear qkv", case, calls, exact, work)


def _into_norm(context, case, op, inputs):
    """A linear layer, the residual stream and the norm behind: who adds the stream, and whose product it is."""
    d, rows = context.config.hidden_size, sum(lengths(context, case))
    x, stream = _random(context, rows, inputs), _random(context, rows + 1, d)[1:]
    weight, bias = _random(context, d, inputs, scale=inputs**-0.5), _random(context, d)
    norm = _random(context, d), _random(context, d), 1e-12

    def plain(x, stream, weight, bias, scale, shift):
        total = F.linear(x, weight, bias) + stream
        return total, F.layer_norm(total, (d,), scale, shift, norm[2])

    def norm_adds(linear):
        return functional.add_layer_norm(linear(x, weight, bias), stream, *norm, backend="triton")

    def linear_adds():
        total = own(x, weight, bias, stream)
        return total, F.layer_norm(total, (d,), *norm)

    own, given = partial(functional.linear, backend="triton"), (x, stream, weight, bias, *norm[:2])
    calls = {"eager": partial(plain, *given), **_with(_compiled(context, case, plain), *given)}
    calls |= {
        "ours": partial(norm_adds, F.linear),
        "ours own_product": partial(norm_adds, own),
        "ours linear_adds": linear_adds,
    }
    size = x.element_size()
    product, added = counts.linear(rows, inputs, d, size, residual=size), counts.add_layer_norm(rows, d, size)
    work = product._replace(scalar=added.scalar, bytes=product.bytes + added.bytes // 4)  # of the norm, what it writes
    _group(context, op, case, calls, lambda: plain(*map(_double, given)), work)


def _linear_out_norm(context, case):
    _into_norm(context, case, "linear out norm", context.config.hidden_size)


def _linear_fc2_norm(context, case):
    _into_norm(context, case, "linear fc2 norm", context.config.intermediate_size)


def _add_layer_norm(context, case):
    d, rows = context.config.hidden_size, sum(lengths(context, case))
    given = [_random(context, rows, d), _random(context, rows + 1, d)[1:], _random(context, d), _random(context, d)]

    def plain(x, residual, weight, bias):
        total = x + residual
        return total, F.layer_norm(total, (d,), weight, bias, 1e-12)

    calls = {"eager": partial(plain, *given), **_with(_compiled(context, case, plain), *given)}
    own = partial(functional.add_layer_norm, *given, 1e-12, backend="triton")
    calls |= {"ours": own, **variants.of(context, case, "add_layer_norm", own)}
    work = counts.add_layer_norm(rows, d, given[0].element_size())
    _group(context, "add_layer_norm", case, calls, lambda: plain(*map(_double, given)), work)


def _quantized(context, outputs, inputs):
    """(weight in the dtype of the campaign, the same as e4m3 with its scales)."""
    weight = _random(context, outputs, inputs, scale=inputs**-0.5)
    return weight, functional.quantize_fp8(weight, backend="reference")


def _why_no_fp8(context):
    return registry.why_unavailable("linear_fp8", "triton", device=context.device.type, dtype=context.dtype)


def _add_layer_norm_fp8(context, case):
    """A norm and the product of queries, keys and values on e4m3: what ships hands on e4m3, `apart` makes a pass."""
    if reason := _why_no_fp8(context):
        context.note(f"add_layer_norm_fp8: {reason}")
        return
    d, rows = context.config.hidden_size, sum(lengths(context, case))
    given = [_random(context, rows, d), _random(context, rows + 1, d)[1:], _random(context, d), _random(context, d)]
    weight, copy = _quantized(context, 3 * d, d)

    def ours():
        _, x, scale = functional.add_layer_norm_fp8(*given, 1e-12, backend="triton")
        return functional.linear_fp8(x, *copy, None, x_scale=scale, dtype=context.dtype, backend="triton")

    def plain(x, residual, scale, bias, weight):
        return F.linear(F.layer_norm(x + residual, (d,), scale, bias, 1e-12), weight)

    calls = {"eager bfloat16": partial(plain, *given, weight), "ours": ours}
    calls |= variants.of(context, case, "add_layer_norm_fp8", ours)
    _group(
        context, "add_layer_norm_fp8", case, calls, lambda: plain(*map(_double, (*given, weight))),
        counts.linear(rows, d, 3 * d, 1), "float8",
    )  # fmt: skip


def _linear_gelu_fp8(context, case):
    """A feed-forward sublayer on e4m3: what ships hands on e4m3 by groups of columns, `apart` by rows, in a pass."""
    if reason := _why_no_fp8(context):
        context.note(f"linear_gelu_fp8: {reason}")
        return
    d, f, rows = context.config.hidden_size, context.config.intermediate_size, sum(lengths(context, case))
    x, (first, one), (second, two) = (
        _random(context, rows, d), _quantized(context, f, d), _quantized(context, d, f)
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
    _group(context, "linear_gelu_fp8", case, calls, lambda: plain(*map(_double, (x, first, second))), work, "float8")


def _text_embed(context, case):
    words, width = sum(case.texts), context.config.hidden_size
    _embedding(context, case, "text_embed", counts.text_embed(words, width, context.dtype.itemsize))


def _patch_embed(context, case):
    """`conv2d` is only HuggingFace's projection, of the padded canvas, without positions."""
    words, width, patch = sum(case.texts), context.config.hidden_size, context.config.patch_size
    patches = sum(n - 1 - t for n, t in zip(lengths(context, case), case.texts, strict=True))
    work = counts.patch_embed(patches, words, case.batch, width, 3, patch, context.dtype.itemsize)
    arguments = [_detached(a) for a in recorded(context, case)["patch_embed"][0]]
    pixels, weight, bias = arguments[0].to(arguments[1].dtype), *arguments[1:3]
    peers = {"conv2d": partial(F.conv2d, pixels, weight, bias, stride=patch)}
    _embedding(context, case, "patch_embed", work, peers)


def _embedding(context, case, op, work, peers=None):
    """Text rows or image rows, beside the reference and what else there is, which computes less."""
    peers = peers or {}
    arguments, keywords = recorded(context, case)[op]
    arguments = [_detached(a) for a in arguments]
    function = partial(getattr(functional, op), **{key: v for key, v in keywords.items() if key != "backend"})
    own = partial(function, *arguments, backend="triton")
    calls = {"reference": partial(function, *arguments, backend="reference"), **peers, "ours": own}
    calls |= variants.of(context, case, op, own)
    exact = partial(function, *map(_double, arguments), backend="reference")
    _group(context, op, case, calls, exact, work, uncompared=tuple(peers))


def _linear_cross_entropy(context, case):
    """The MLM loss and its gradients over all text positions, padded as HuggingFace hands them over; 15 % labelled."""
    vocabulary, width = context.config.vocab_size, context.config.hidden_size
    rows = case.batch * max(case.texts)
    given = _random(context, rows, width), _random(context, vocabulary, width, scale=0.02), _random(context, vocabulary)
    draw = torch.Generator().manual_seed(1)
    labels = torch.randint(vocabulary, (rows,), generator=draw)
    labels[torch.rand(rows, generator=draw) > 0.15] = -100
    labels[0] = 1
    labels, labelled = labels.to(context.device), int((labels != -100).sum())

    def plain(x, weight, bias):
        return F.cross_entropy(F.linear(x, weight, bias).float(), labels)

    def exact(x, weight, bias):
        return F.cross_entropy(F.linear(x, weight, bias), labels)

    def with_gradients(function, tensors=given):
        leaves = [t.detach().requires_grad_() for t in tensors]

        def call():
            loss = function(*leaves)
            return [loss, *torch.autograd.grad(loss, leaves)]

        return call

    calls = {"eager": with_gradients(plain)}
    calls |= {name: with_gradients(function) for name, function in _compiled(context, case, plain).items()}
    if importlib.util.find_spec("liger_kernel") and not context.dry:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        calls["liger"] = with_gradients(lambda x, w, b: LigerFusedLinearCrossEntropyFunction.apply(x, w, labels, b)[0])
    calls["ours"] = with_gradients(lambda *tensors: functional.linear_cross_entropy(*tensors, labels, backend="triton"))
    work = counts.linear_cross_entropy(labelled, width, vocabulary, given[0].element_size())
    # Logits, and the gradients of both factors; the table is read twice and its gradient written.
    work = work._replace(products=3 * work.products, bytes=3 * work.bytes)
    truth = with_gradients(exact, [t.double() for t in given])
    _group_with_gradients(context, "linear_cross_entropy", case, calls, truth, work)

"""Every op of ours beside what a user would call instead, on a GPU: eager, torch.compile, SDPA, other libraries.

The arguments of `attention`, `patch_embed` and `text_embed` are those of a forward of the model itself, written down as
it makes them. Who computes padding gets padded inputs of the same samples, and hands back real rows only; the counts
are those of the real rows for all, so the floor is the same for all. `_bwd` groups are forward and backward together.
"""

import contextlib
import importlib.util
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F

import vilt_fast
from vilt_fast import functional, testing

from .. import counts, ops
from . import timing


def kernels(context):
    """Groups from the largest batch down, so that a cut loses the small ones."""
    for batch in (context.batches[:3])[::-1]:
        case = context.case(batch)
        if context.enough(f"kernels at batch {batch}"):
            calls = recorded(context, case)
            sizes = lengths(context, case)
            for group in (
                partial(_attention, *calls["attention"], sizes),
                partial(_linears, sum(sizes)),
                partial(_add_layer_norm, sum(sizes)),
                partial(_embeddings, calls, case),
                partial(_linear_cross_entropy, case),
            ):
                if context.enough(f"{getattr(group, 'func', group).__name__[1:]} at batch {batch}"):
                    group(context, case)
            context.free()


def lengths(context, case):
    """Real rows of each sample."""
    return case.lengths(context.config.patch_size)


def recorded(context, case):
    """{op: (arguments, keyword arguments)} of the first call of each op in a forward of the accelerated model."""
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
def _group(context, op, case, calls, truth, work, **options):
    name = f"{op} {case.name}"
    timing.group(context, "kernels", name, case.shape, _dtype(context), calls, truth, work, **options)


def _group_with_gradients(context, op, case, calls, truth, work):
    timing.group(context, "kernels", f"{op}_bwd {case.name}", case.shape, _dtype(context), calls, truth, work)


# --- attention --------------------------------------------------------------------------------------------------------


def _attention(arguments, keywords, sizes, context, case):
    """Packed, as the engine calls it; the peers get [B, H, L, d] and a mask, or a nested tensor without padding."""
    packed, heads, width = [t.detach().contiguous() for t in arguments[:3]], *arguments[0].shape[1:]
    rest, longest = arguments[3:], max(sizes)
    ours = partial(functional.attention, backend="triton", **{k: v for k, v in keywords.items() if k != "backend"})
    real = ~testing.padding_masks(sizes).to(context.device)
    mask = torch.zeros(real.shape, dtype=context.dtype, device=context.device).masked_fill(~real, -torch.inf)
    mask = mask[:, None, None]
    padded = [ops._pad(t, real).transpose(1, 2).contiguous() for t in packed]
    exact = partial(_softmax_attention, mask=mask.double(), real=real)
    calls = {
        "eager_padded": partial(_softmax_attention, *padded, mask, real),
        "sdpa_padded": partial(ops._sdpa, *padded, mask, real),
        **_with(_compiled(context, case, _softmax_attention), *padded, mask, real),
        **_sdpa_backends(context, padded, mask, real),
        **_unpadded(packed, arguments[3], min(sizes), longest),
        "ours": partial(ours, *packed, *rest),
    }
    work = counts.attention(sizes, heads, width, packed[0].element_size())
    _group(context, "attention", case, calls, exact(*map(_double, padded)), work)

    def gradients(function, given):
        leaves = [t.detach().requires_grad_() for t in given]

        def call():
            out = function(*leaves)
            return torch.autograd.grad(out, leaves, torch.ones_like(out))

        return call

    def of_real(call):
        return lambda: [g.transpose(1, 2)[real] for g in call()]

    # Both directions: what the forward needs and two and a half times that.
    both = counts.attention_bwd(sizes, heads, width, packed[0].element_size())
    both = both._replace(products=both.products + work.products, bytes=both.bytes + work.bytes)
    calls = {
        "eager_padded": of_real(gradients(lambda *qkv: _softmax_attention(*qkv, mask, real), padded)),
        "sdpa_padded": of_real(gradients(lambda *qkv: ops._sdpa(*qkv, mask, real), padded)),
        "ours": gradients(lambda *qkv: ours(*qkv, *rest), packed),
    }
    truth = of_real(gradients(exact, [_double(t) for t in padded]))()
    _group_with_gradients(context, "attention", case, calls, truth, both)


def _softmax_attention(q, k, v, mask, real):
    """As HuggingFace's model computes it."""
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + mask).softmax(-1)
    return (weights @ v).transpose(1, 2)[real]


def _sdpa_backends(context, padded, mask, real):
    """SDPA's own kernels one by one, where there is a choice."""
    if context.dry:
        return {}
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def only(backend):
        with sdpa_kernel([backend]):
            return ops._sdpa(*padded, mask.expand(-1, -1, padded[0].shape[2], -1), real)

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


def _linears(rows, context, case):
    """The block's four matrices: queries, keys and values; output; fc1 with its GELU; fc2."""
    d, f = context.config.hidden_size, context.config.intermediate_size

    def gelu(x, weight, bias):
        return F.gelu(F.linear(x, weight, bias))

    for op, inputs, outputs in (
        ("linear_gelu", d, f),
        ("linear qkv", d, 3 * d),
        ("linear out", d, d),
        ("linear fc2", f, d),
    ):
        plain, ours = (gelu, functional.linear_gelu) if op == "linear_gelu" else (F.linear, functional.linear)
        given = (
            _random(context, rows, inputs),
            _random(context, outputs, inputs, scale=inputs**-0.5),
            _random(context, outputs),
        )
        calls = {"eager": partial(plain, *given), **_with(_compiled(context, case, plain), *given)}
        calls["ours"] = partial(ours, *given, backend="triton")
        work = counts.linear(rows, inputs, outputs, given[0].element_size())
        _group(context, op, case, calls, plain(*map(_double, given)), work)


def _add_layer_norm(rows, context, case):
    d = context.config.hidden_size
    given = [_random(context, rows, d), _random(context, rows + 1, d)[1:], _random(context, d), _random(context, d)]

    def plain(x, residual, weight, bias):
        total = x + residual
        return total, F.layer_norm(total, (d,), weight, bias, 1e-12)

    calls = {"eager": partial(plain, *given), **_with(_compiled(context, case, plain), *given)}
    calls["ours"] = partial(functional.add_layer_norm, *given, 1e-12, backend="triton")
    work = counts.add_layer_norm(rows, d, given[0].element_size())
    _group(context, "add_layer_norm", case, calls, plain(*map(_double, given)), work)


def _embeddings(recorded_calls, case, context, _):
    """Text rows and image rows; `conv2d` is only HuggingFace's projection, of the padded canvas, without positions."""
    sizes, words = lengths(context, case), sum(case.texts)
    size, width, patch = context.dtype.itemsize, context.config.hidden_size, context.config.patch_size
    patches = sum(n - 1 - t for n, t in zip(sizes, case.texts, strict=True))
    works = {
        "text_embed": counts.text_embed(words, width, size),
        "patch_embed": counts.patch_embed(patches, words, case.batch, width, 3, patch, size),
    }
    for op, work in works.items():
        arguments, keywords = recorded_calls[op]
        arguments = [_detached(a) for a in arguments]
        keywords = {key: value for key, value in keywords.items() if key != "backend"}
        function = partial(getattr(functional, op), **keywords)
        calls = {"reference": partial(function, *arguments, backend="reference")}
        if op == "patch_embed":
            pixels, weight, bias = arguments[0].to(arguments[1].dtype), *arguments[1:3]
            calls["conv2d"] = partial(F.conv2d, pixels, weight, bias, stride=patch)
        calls["ours"] = partial(function, *arguments, backend="triton")
        truth = function(*map(_double, arguments), backend="reference")
        _group(context, op, case, calls, truth, work, uncompared=("conv2d",))


def _linear_cross_entropy(case, context, _):
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
    truth = with_gradients(exact, [t.double() for t in given])()
    _group_with_gradients(context, "linear_cross_entropy", case, calls, truth, work)

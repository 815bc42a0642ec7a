"""Every op of ours beside what a user would call instead, on a GPU: eager, torch.compile, SDPA, other libraries.

The arguments of `attention`, `patch_embed` and `text_embed` are those of a forward of the model itself, written down as
it makes them. Who computes padding gets padded inputs of the same samples, and hands back real rows only; the counts
are those of the real rows for all, so the floor is the same for all. `_bwd` groups are forward and backward together.
Nobody waits for the host while he is timed: which rows are real is known beforehand.

Providers called `ours <variant>` are the same kernels in configurations that may win elsewhere (`variants.py`).
"""

import importlib.util
from functools import partial

import torch
import torch.nn.functional as F

from vilt_fast import functional

from .. import counts
from . import variants
from .attention import attention, attention_gradients
from .groups import compiled, detached, double, group, group_with_gradients, lengths, random, recorded
from .products import (
    add_layer_norm,
    add_layer_norm_fp8,
    linear_fc2,
    linear_fc2_norm,
    linear_gelu,
    linear_gelu_fp8,
    linear_out,
    linear_out_norm,
    linear_qkv,
)  # fmt: skip


def kernels(context):
    """Groups from the largest batch down, so that a cut loses the small ones."""
    for batch in (context.batches[:3])[::-1]:
        case = context.case(batch)
        for timed in (
            attention, attention_gradients, linear_gelu, linear_qkv, linear_out, linear_fc2, linear_out_norm,
            linear_fc2_norm, add_layer_norm, text_embed, patch_embed, linear_cross_entropy, add_layer_norm_fp8,
            linear_gelu_fp8,
        ):  # fmt: skip
            context.item(f"{timed.__name__}, batch {batch}", partial(timed, context, case))
        context.kept.pop(("calls", case.name), None)
        context.free()


def text_embed(context, case):
    words, width = sum(case.texts), context.config.hidden_size
    _embedding(context, case, "text_embed", counts.text_embed(words, width, context.dtype.itemsize))


def patch_embed(context, case):
    """`conv2d` is only HuggingFace's projection, of the padded canvas, without positions."""
    words, width, patch = sum(case.texts), context.config.hidden_size, context.config.patch_size
    patches = sum(n - 1 - t for n, t in zip(lengths(context, case), case.texts, strict=True))
    work = counts.patch_embed(patches, words, case.batch, width, 3, patch, context.dtype.itemsize)
    arguments = [detached(a) for a in recorded(context, case)["patch_embed"][0]]
    pixels, weight, bias = arguments[0].to(arguments[1].dtype), *arguments[1:3]
    peers = {"conv2d": partial(F.conv2d, pixels, weight, bias, stride=patch)}
    _embedding(context, case, "patch_embed", work, peers)


def _embedding(context, case, op, work, peers=None):
    """Text rows or image rows, beside the reference and what else there is, which computes less."""
    peers = peers or {}
    arguments, keywords = recorded(context, case)[op]
    arguments = [detached(a) for a in arguments]
    function = partial(getattr(functional, op), **{key: v for key, v in keywords.items() if key != "backend"})
    own = partial(function, *arguments, backend="triton")
    calls = {"reference": partial(function, *arguments, backend="reference"), **peers, "ours": own}
    calls |= variants.of(context, case, op, own)
    exact = partial(function, *map(double, arguments), backend="reference")
    group(context, op, case, calls, exact, work, uncompared=tuple(peers))


def linear_cross_entropy(context, case):
    """The MLM loss and its gradients over all text positions, padded as HuggingFace hands them over; 15 % labelled."""
    vocabulary, width = context.config.vocab_size, context.config.hidden_size
    rows = case.batch * max(case.texts)
    given = random(context, rows, width), random(context, vocabulary, width, scale=0.02), random(context, vocabulary)
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
    calls |= {name: with_gradients(function) for name, function in compiled(context, case, plain).items()}
    if importlib.util.find_spec("liger_kernel") and not context.dry:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        calls["liger"] = with_gradients(lambda x, w, b: LigerFusedLinearCrossEntropyFunction.apply(x, w, labels, b)[0])
    calls["ours"] = with_gradients(lambda *tensors: functional.linear_cross_entropy(*tensors, labels, backend="triton"))
    work = counts.linear_cross_entropy(labelled, width, vocabulary, given[0].element_size())
    # Logits, and the gradients of both factors; the table is read twice and its gradient written.
    work = work._replace(products=3 * work.products, bytes=3 * work.bytes)
    truth = with_gradients(exact, [t.double() for t in given])
    group_with_gradients(context, "linear_cross_entropy", case, calls, truth, work)

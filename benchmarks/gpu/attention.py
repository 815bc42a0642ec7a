"""Attention of ours, forward and backward, beside eager, each backend of SDPA, nested tensors and flash-attention."""

import importlib.util
from functools import partial

import torch
import torch.nn.functional as F

from vilt_fast import functional, testing

from .. import counts, ops
from . import variants
from .groups import compiled, double, group, group_with_gradients, lengths, recorded, rows_of, with_each


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
        self.mask, self.rows = mask[:, None, None], rows_of(real)
        self.padded = [ops._pad(t, real).transpose(1, 2).contiguous() for t in self.packed]
        self.exact = partial(_softmax_attention, mask=self.mask.double(), rows=self.rows)
        self.work = counts.attention(self.sizes, *self.packed[0].shape[1:], self.packed[0].element_size())


def attention(context, case):
    """Packed, as the engine calls it; the peers get [B, H, L, d] and a mask, or a nested tensor without padding."""
    given = _Attention(context, case)
    padded, mask, rows = given.padded, given.mask, given.rows
    ours = partial(given.ours, *given.packed, *given.rest)
    calls = {
        "eager_padded": partial(_softmax_attention, *padded, mask, rows),
        "sdpa_padded": partial(_sdpa, *padded, mask, rows),
        **with_each(compiled(context, case, _softmax_attention), *padded, mask, rows),
        **_sdpa_backends(context, padded, mask, rows),
        **_unpadded(given.packed, given.offsets, min(given.sizes), max(given.sizes)),
        "ours": ours,
        **variants.of(context, case, "attention", ours),
    }
    group(context, "attention", case, calls, lambda: given.exact(*map(double, padded)), given.work)


def attention_gradients(context, case):
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
    truth = of_real(gradients(given.exact, [double(t) for t in padded]))
    group_with_gradients(context, "attention", case, calls, truth, both)


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

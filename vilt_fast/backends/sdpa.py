"""attention through PyTorch's `scaled_dot_product_attention`: samples of equal lengths go through together.

A packed batch has few distinct (query length, key length) pairs; each pair is one dense SDPA call without any padding
or mask. Differentiable, also twice: a gradient that is itself recorded is that of the reference, as the fused kernels
of SDPA have none. The lengths are read on the host, once a call.
"""

import torch
import torch.nn.functional as F

from ..reference import attention as plain
from ..reference.attention import visible


def supports(
    *, device=None, dtype=None, head_dim=64, requires_grad=False, dropout=False, causal=False, return_lse=False,
    generator=False, apart=False,
):  # fmt: skip
    if return_lse:
        return "SDPA does not return the log-sum-exp; use backend='reference' or return_lse=False."
    if generator:
        return "SDPA takes no generator; use backend='reference' or torch.manual_seed."
    return ""


def _starts_and_lengths(cu_seqlens):
    ends = cu_seqlens.tolist()
    return ends[:-1], [end - start for start, end in zip(ends[:-1], ends[1:], strict=True)]


def _take(rows, starts, length):
    """Rows [G, H, length, d] of G samples: a view when they lie end to end, else a gathered copy."""
    whole = all(after - before == length for before, after in zip(starts[:-1], starts[1:], strict=True))
    if whole:
        block = rows[starts[0] : starts[0] + len(starts) * length]
    else:
        block = torch.cat([rows[start : start + length] for start in starts])
    return block.unflatten(0, (len(starts), length)).transpose(1, 2)


class _Recorded(torch.autograd.Function):
    """The identity on what `attend(q, k, v)` has given, which takes the gradient's way only where it is recorded."""

    @staticmethod
    def forward(out, q, k, v, attend):
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *tensors, ctx.attend = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        if not torch.is_grad_enabled():
            return grad, None, None, None, None
        needed = ctx.needs_input_grad[1:4]
        tensors = [t.view_as(t) for t in ctx.saved_tensors]
        wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
        found = iter(torch.autograd.grad(ctx.attend(*tensors), wanted, grad, create_graph=True))
        return None, *(next(found) if need else None for need in needed), None


def attention(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *,
    seqused_k=None, causal_start=None, dropout_p=0.0, scale=None, return_lse=False, generator=None,
):  # fmt: skip
    """What a kernel drops it tells nobody, so with dropout the gradient is SDPA's own, come what may."""
    given = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = dict(seqused_k=seqused_k, causal_start=causal_start, scale=scale)
    out = _attend(q, k, v, *given, **options, dropout_p=dropout_p)
    if dropout_p > 0 or not out.requires_grad or torch.compiler.is_compiling():
        return out
    return _Recorded.apply(out, q, k, v, lambda q, k, v: plain.attention(q, k, v, *given, **options))


def _attend(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, seqused_k, causal_start, scale, dropout_p
):
    q_starts, q_lengths = _starts_and_lengths(cu_seqlens_q)
    k_starts, k_lengths = _starts_and_lengths(cu_seqlens_k)
    if seqused_k is not None:
        k_lengths = seqused_k.tolist()
    groups = {}
    for b, lengths in enumerate(zip(q_lengths, k_lengths, strict=True)):
        groups.setdefault(lengths, []).append(b)

    pieces = [None] * len(q_lengths)
    for (q_len, k_len), members in groups.items():
        qs = _take(q, [q_starts[b] for b in members], q_len)
        ks, vs = (_take(t, [k_starts[b] for b in members], k_len) for t in (k, v))
        if q_len == 0 or k_len == 0:  # SDPA gives NaN without keys
            out = qs @ ks.transpose(2, 3) @ vs
        else:
            seen = None
            if causal_start is not None:
                seen = visible(causal_start[members], q_len, k_len, q.device).unsqueeze(1)
            out = F.scaled_dot_product_attention(qs, ks, vs, attn_mask=seen, dropout_p=dropout_p, scale=scale)
        out = out.transpose(1, 2)  # [G, q_len, H, d]
        if len(groups) == 1:
            return out.flatten(0, 1)
        for b, piece in zip(members, out.unbind(0), strict=True):
            pieces[b] = piece
    return torch.cat(pieces)

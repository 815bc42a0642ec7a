"""attention on the CPU: csrc/cpu/attention.cpp, attention_bwd.cpp."""

import torch

from . import _native


def supports(
    *, device=None, dtype=None, head_dim=64, requires_grad=False, dropout=False, causal=False, return_lse=False,
    generator=False, apart=False,
):  # fmt: skip
    if causal:
        return "it has no causal attention."
    if head_dim > 256:
        return f"head dim is {head_dim}, at most 256."
    return _native.problem(device, dropout=dropout, dtype=dtype)


def attention_fwd(
    *, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, causal_start, dropout_p, scale, seed,
    keep,
):  # fmt: skip
    from vilt_fast import _C

    _native.check_on_cpu(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k)
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    seqused_k = None if seqused_k is None else seqused_k.contiguous()
    q, k, v = map(_native.dense_rows, (q, k, v))
    rows, heads, width = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty(heads, rows, dtype=torch.float32)
    stats = lse.new_empty(2, heads, rows) if keep else None
    if out.numel():
        _C.attention(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), _native.NAMES[q.dtype], heads, width,
            len(cu_seqlens_q) - 1, q.stride(0), k.stride(0), v.stride(0), out.stride(0), cu_seqlens_q.data_ptr(),
            cu_seqlens_k.data_ptr(), _native.address(seqused_k), scale, lse.data_ptr(), torch.get_num_threads(),
            _native.address(stats),
        )  # fmt: skip
    return (out, lse), (stats,) if keep else ()


def attention_bwd(
    *, needs, grad_out, grad_lse, q, k, v, out, stats, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    seqused_k, causal_start, dropout_p, scale, seed,
):  # fmt: skip
    from vilt_fast import _C

    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    cu_seqlens_q, cu_seqlens_k, seqused_k, stats, grad_lse = (
        None if t is None else t.contiguous() for t in (cu_seqlens_q, cu_seqlens_k, seqused_k, stats, grad_lse)
    )
    gradients = tuple(t.new_empty(t.shape) for t in (q, k, v))
    q, k, v, out, grad_out = map(_native.dense_rows, (q, k, v, out, grad_out))
    if any(t.numel() for t in gradients):
        _C.attention_bwd(
            *map(_native.address, (q, k, v, out, grad_out, *gradients)), _native.NAMES[q.dtype], *q.shape[1:],
            len(cu_seqlens_q) - 1, *(t.stride(0) for t in (q, k, v, out, grad_out)), cu_seqlens_q.data_ptr(),
            cu_seqlens_k.data_ptr(), _native.address(seqused_k), scale, _native.address(stats),
            _native.address(grad_lse), torch.get_num_threads(),
        )  # fmt: skip
    return gradients, ()

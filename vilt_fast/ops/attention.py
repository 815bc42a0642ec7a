"""attention: validation, choice of backend, torch.ops.vilt_fast.attention.

Facts for `supports`: dtype, head_dim, requires_grad; dropout, causal, return_lse, generator (bool).
"""

import torch

from .. import registry
from . import _check

torch.library.define(
    "vilt_fast::attention",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, Tensor? seqused_k, Tensor? causal_start, float dropout_p, float scale, str backend) "
    "-> (Tensor, Tensor)",
)


@torch.library.impl("vilt_fast::attention", "CompositeExplicitAutograd")
def _run(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, causal_start, dropout_p, scale, backend
):
    return registry.launcher("attention", backend)(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        seqused_k=seqused_k, causal_start=causal_start, dropout_p=dropout_p, scale=scale, return_lse=True,
    )  # fmt: skip


@torch.library.register_fake("vilt_fast::attention")
def _fake(q, k, v, *rest):
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


def attention(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, causal_start, dropout_p, scale,
    return_lse, generator, backend,
):  # fmt: skip
    q, k, v = _check.autocast(q, k, v)
    sizes = _check.shapes(
        "attention",
        q=(q, "Nq H d"), k=(k, "Nk H d"), v=(v, "Nk H d"),
        cu_seqlens_q=(cu_seqlens_q, "B+1"), cu_seqlens_k=(cu_seqlens_k, "B+1"),
        seqused_k=(seqused_k, "B"), causal_start=(causal_start, "B"),
    )  # fmt: skip
    if sizes["B"] < 1:
        raise ValueError("attention: cu_seqlens_q has one entry, so there is no sample; expected B + 1 >= 2 entries.")
    _check.dtypes("attention", _check.FLOATS, q=q)
    _check.same_dtype("attention", q=q, k=k, v=v)
    _check.dtypes(
        "attention", (torch.int32,), cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k,
        causal_start=causal_start,
    )  # fmt: skip
    _check.same_device("attention", q=q, k=k, v=v)
    _check.probability("attention", dropout_p)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    name = registry.resolve(
        "attention", backend, q.device.type, dtype=q.dtype, head_dim=sizes["d"],
        requires_grad=_check.needs_grad(q, k, v), dropout=dropout_p > 0, causal=causal_start is not None,
        return_lse=return_lse, generator=generator is not None,
    )  # fmt: skip
    if name in registry.PLAIN:
        return registry.launcher("attention", name)(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k=seqused_k,
            causal_start=causal_start, dropout_p=dropout_p, scale=scale, return_lse=return_lse, generator=generator,
        )  # fmt: skip
    out, lse = torch.ops.vilt_fast.attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, causal_start, dropout_p, scale, name
    )
    return (out, lse) if return_lse else out

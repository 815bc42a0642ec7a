"""attention: softmax(QK^T / sqrt(d)) V within each sample of a packed batch."""

import dataclasses

import torch
from torch import Generator, Tensor

from . import _check, registry
from ._define import Op


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts(registry.Facts):
    head_dim: int
    requires_grad: bool = False
    dropout: bool = False
    causal: bool = False
    return_lse: bool = False
    generator: bool = False
    apart: bool = False  #: offsets are not on the device of q


def _fake(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    seqused_k: Tensor | None, causal_start: Tensor | None, dropout_p: float, scale: float, seed: Tensor | None,
):  # fmt: skip
    """Kept are stats: what the backward wants to know of each row."""
    rows, heads, _ = q.shape
    lse = q.new_empty(heads, rows, dtype=torch.float32)
    return (q.new_empty(q.shape), lse), (lse.new_empty(2, heads, rows),)


def _fake_backward(
    needs: list[bool], grad_out: Tensor | None, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    stats: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    seqused_k: Tensor | None, causal_start: Tensor | None, dropout_p: float, scale: float, seed: Tensor | None,
):  # fmt: skip
    return tuple(t.new_empty(t.shape) for t in (q, k, v)), ()


def _validate_forms(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, causal_start, dropout_p):
    sizes = _check.shapes(
        "attention",
        q=(q, "Nq H d"), k=(k, "Nk H d"), v=(v, "Nk H d"),
        cu_seqlens_q=(cu_seqlens_q, "B+1"), cu_seqlens_k=(cu_seqlens_k, "B+1"),
        seqused_k=(seqused_k, "B"), causal_start=(causal_start, "B"),
    )  # fmt: skip
    if sizes["B"] < 1:
        raise ValueError("attention: cu_seqlens_q has one entry, so there is no sample; expected B + 1 >= 2 entries.")
    if max(sizes["Nq"], sizes["Nk"]) >= 2**31:
        raise ValueError(
            f"attention: {max(sizes['Nq'], sizes['Nk'])} rows; int32 cu_seqlens reach 2^31 - 1: split the batch."
        )
    _check.dtypes("attention", _check.FLOATS, q=q)
    _check.same_dtype("attention", q=q, k=k, v=v)
    _check.dtypes(
        "attention", (torch.int32,), cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k,
        causal_start=causal_start,
    )  # fmt: skip
    _check.same_device("attention", q=q, k=k, v=v)
    _check.probability("attention", dropout_p)


def _validate(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, causal_start, dropout_p):
    _validate_forms(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, causal_start, dropout_p)
    _validate_values(q, k, cu_seqlens_q, cu_seqlens_k, seqused_k)


def _validate_values(q, k, cu_seqlens_q, cu_seqlens_k, seqused_k):
    _check.offsets("attention", "cu_seqlens_q", cu_seqlens_q, q.shape[0])
    if cu_seqlens_k is not cu_seqlens_q or k.shape[0] != q.shape[0]:
        _check.offsets("attention", "cu_seqlens_k", cu_seqlens_k, k.shape[0])
    _check.used("attention", seqused_k, cu_seqlens_k)


def _validate_backward(
    grad_out, grad_lse, q, k, v, out, stats, cu_seqlens_q, cu_seqlens_k, seqused_k, causal_start, dropout_p
):  # fmt: skip
    _validate(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, causal_start, dropout_p)
    rows, heads, _ = q.shape
    _check.like("attention_bwd", q.shape, q.dtype, grad_out=grad_out, out=out)
    _check.like("attention_bwd", (heads, rows), torch.float32, grad_lse=grad_lse)
    _check.like("attention_bwd", (2, heads, rows), torch.float32, stats=stats)


def _facts(
    q, cu_seqlens_q, cu_seqlens_k, seqused_k, causal_start, dropout_p, requires_grad, return_lse=False,
    generator=False,
):  # fmt: skip
    bounds = (cu_seqlens_q, cu_seqlens_k, seqused_k, causal_start)
    return Facts(
        device=q.device.type, dtype=q.dtype, head_dim=q.shape[2], requires_grad=requires_grad, dropout=dropout_p > 0,
        causal=causal_start is not None, return_lse=return_lse, generator=generator,
        apart=any(t is not None and t.device != q.device for t in bounds), size=registry.size_of(q, dims=2),
    )  # fmt: skip


_known = _check.both(_validate_forms, _facts)


_OP = Op(
    "attention", _fake, _fake_backward,
    outputs=("out", "lse"), kept=("stats",), differentiable=("q", "k", "v"), validate=_validate, facts=_facts,
    validate_backward=_validate_backward, again=lambda **_: {"return_lse": True},
)  # fmt: skip


def _seed(device, generator):
    """int64 [1] on the device, drawn there or, from a generator of the CPU, carried over without a synchronisation."""
    if generator is None or generator.device.type == device.type:
        return torch.randint(2**62, (1,), device=device, generator=generator)
    return torch.full((1,), torch.randint(2**62, (1,), generator=generator).item(), device=device)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    seqused_k: Tensor | None = None,
    causal_start: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
    generator: Generator | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``dropout(softmax(scale * q k^T)) v`` within each sample of a packed batch.

    Args:
        q: [Nq, H, d]; k, v: [Nk, H, d], one floating dtype, any strides.
        cu_seqlens_q, cu_seqlens_k: [B + 1] int32, first row of each sample and the total; query and key lengths of a
            sample may differ. max_seqlen_q, max_seqlen_k: upper bounds of those lengths. On a GPU, where it cannot be
            looked at, the total may be less than the rows there are; the rest of the result is undefined then.
        seqused_k: [B] int32, only that many leading rows of each sample are keys (default: all).
        causal_start: [B] int32, prefix language modelling: key rows at index >= start are visible only to query rows
            with index >= theirs (indices within the sample).
        dropout_p: on the probabilities. scale: 1/sqrt(d) by default.
        return_lse: also return the log-sum-exp of the scaled scores.
        generator: for dropout.

    Returns:
        out [Nq, H, d], and with ``return_lse`` lse [H, Nq] float32 (float64 for float64 inputs). A sample without keys
        gives zeros and -inf.

    Source: Vaswani et al. 2017, eq. 1; argument names as in flash-attn.
    """
    q, k, v = _check.autocast(q, k, v)
    facts = _check.of_forms(
        _known, q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k,
        causal_start=causal_start, dropout_p=dropout_p, requires_grad=_check.needs_grad(q, k, v),
        return_lse=return_lse, generator=generator is not None,
    )  # fmt: skip
    _validate_values(q, k, cu_seqlens_q, cu_seqlens_k, seqused_k)
    name = _OP.resolve(backend, facts)
    arguments = dict(
        q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k, seqused_k=seqused_k, causal_start=causal_start, dropout_p=dropout_p,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
    )  # fmt: skip
    if name in registry.PLAIN:
        return _OP.plain(name, **arguments, return_lse=return_lse, generator=generator)
    out, lse = _OP(name, **arguments, seed=_seed(q.device, generator) if dropout_p > 0 else None)
    return (out, lse) if return_lse else out

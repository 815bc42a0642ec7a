"""attention: validation, choice of backend, torch.ops.vilt_fast.attention and its gradient, attention_bwd.

Facts for `supports`: dtype, head_dim, requires_grad; dropout, causal, return_lse, generator (bool); together (bool: the
offsets and bounds are on the device of q).
"""

import torch

from . import _check, registry

_SHARED = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? seqused_k, "
    "Tensor? causal_start, float dropout_p, float scale, str backend, Tensor? seed=None)"
)
torch.library.define("vilt_fast::attention", f"(Tensor q, Tensor k, Tensor v, {_SHARED} -> (Tensor, Tensor, Tensor)")
torch.library.define(
    "vilt_fast::attention_bwd",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor stats, "
    f"{_SHARED} -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("vilt_fast::attention", "CompositeExplicitAutograd")
def _run(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, causal_start, dropout_p, scale,
    backend, seed=None,
):  # fmt: skip
    """out, lse and stats: what the backward of this backend wants to know of each row, empty if it has none."""
    options = {} if seed is None else {"seed": seed}
    out, lse, *stats = registry.launcher("attention", backend)(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k=seqused_k,
        causal_start=causal_start, dropout_p=dropout_p, scale=scale, return_lse=True, **options,
    )  # fmt: skip
    return out, lse, stats[0] if stats else lse.new_empty(0)


@torch.library.register_fake("vilt_fast::attention")
def _fake(q, *rest):
    rows, heads, _ = q.shape
    lse = q.new_empty(heads, rows, dtype=torch.float32)
    stats = lse.new_empty(2, heads, rows) if rest[10] in registry.backends("attention_bwd") else lse.new_empty(0)
    return q.new_empty(q.shape), lse, stats


@torch.library.impl("vilt_fast::attention_bwd", "CompositeExplicitAutograd")
def _run_backward(
    dout, dlse, q, k, v, out, stats, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, causal_start,
    dropout_p, scale, backend, seed=None,
):  # fmt: skip
    return registry.launcher("attention_bwd", backend)(
        dout, dlse, q, k, v, out, stats, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k=seqused_k,
        causal_start=causal_start, seed=seed, dropout_p=dropout_p, scale=scale,
    )  # fmt: skip


@torch.library.register_fake("vilt_fast::attention_bwd")
def _fake_backward(dout, dlse, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.longest, ctx.numbers = inputs[5:7], inputs[9:12]
    out, _, stats = output
    ctx.save_for_backward(*inputs[:3], out, stats, *inputs[3:5], *inputs[7:9], inputs[12])


def _differentiate(ctx, dout, dlse, _):
    saved = ctx.saved_tensors  # q, k, v, out, stats, cu_seqlens_q, cu_seqlens_k, seqused_k, causal_start, seed
    if dout is None:
        dout = torch.zeros_like(saved[3])
    gradients = torch.ops.vilt_fast.attention_bwd(
        dout, dlse, *saved[:7], *ctx.longest, *saved[7:9], *ctx.numbers, saved[9]
    )
    return (*gradients, *[None] * 10)


torch.library.register_autograd("vilt_fast::attention", _differentiate, setup_context=_keep)


def _seed(device, generator):
    """int64 [1] on the device, drawn there or, from a generator of the CPU, carried over without a synchronisation."""
    if generator is None or generator.device.type == device.type:
        return torch.randint(2**62, (1,), device=device, generator=generator)
    return torch.full((1,), torch.randint(2**62, (1,), generator=generator).item(), device=device)


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
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bounds = (cu_seqlens_q, cu_seqlens_k, seqused_k, causal_start)
    name = registry.resolve(
        "attention", backend, q.device.type, dtype=q.dtype, head_dim=sizes["d"],
        requires_grad=_check.needs_grad(q, k, v), dropout=dropout_p > 0, causal=causal_start is not None,
        return_lse=return_lse, generator=generator is not None,
        together=all(t is None or t.device == q.device for t in bounds),
    )  # fmt: skip
    if name in registry.PLAIN:
        return registry.launcher("attention", name)(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k=seqused_k,
            causal_start=causal_start, dropout_p=dropout_p, scale=scale, return_lse=return_lse, generator=generator,
        )  # fmt: skip
    seed = _seed(q.device, generator) if dropout_p > 0 else None
    out, lse, _ = torch.ops.vilt_fast.attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, causal_start, dropout_p, scale,
        name, seed,
    )  # fmt: skip
    return (out, lse) if return_lse else out

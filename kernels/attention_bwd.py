"""Gradients of packed attention (attention.py has the shapes, the masks and the dropout):

    p = exp(scale * q.k - lse), dp = dropout(dout V^T), delta = sum_d dout * out - dlse, ds = p * (dp - delta)
    dq = scale * ds K, dk = scale * ds^T Q, dv = dropout(p)^T dout

Two kernels, unless a program can have a whole sample (attention_single.py). The first, by query block, gives dq and
leaves delta [H, Nq] behind; the second, by key block, gives dk and dv. Each keeps its block and its sums in registers
while the other side streams past, so scores are computed twice and nothing else is stored: no atomics, and equal runs
give equal bits. dq, dk, dv are new and dense.

p comes back from the row's largest score and its sum, kept apart (`stats`): lse alone would cost it a relative error of
eps * |lse|, more than PyTorch's own.
"""

import torch
import triton
import triton.language as tl

from . import _aot, _device, attention_single
from ._attention import (
    LOG2E,
    aot_case,
    at,
    bounds_and_numbers,
    in_place,
    keys_of,
    masked_scores,
    options,
    place,
    rows_of,
    shape,
    sight,
    store,
    tile,
)  # fmt: skip
from ._tiles import cdiv, dense, kept
from .attention import supports as supports
from .attention import tiles_of

# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _sweep_q(dq, q_tile, dout_tile, k, v, rows, begin, end, stride_k, stride_v, used, limit, scale, top, delta, seed,
             drop_below, grow, head, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
             MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """What keys begin:end add to dq, without the factor scale / (sum of weights) of the row."""
    for first in range(begin, end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        k_tile = tile(k, keys, stride_k, used, WIDTH, BLOCK_D, MASKED)
        v_tile = tile(v, keys, stride_v, used, WIDTH, BLOCK_D, MASKED)
        scores = masked_scores(q_tile, k_tile, keys, limit, scale, MASKED, PRECISION)
        weights = tl.exp2(scores - top[:, None])
        dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision=PRECISION)
        if seed is not None:
            dp = tl.where(kept(seed, drop_below, rows[:, None], keys[None, :], head), dp * grow, 0.0)
        ds = weights * (dp - delta[:, None])
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["drop_below", "heads", "total_q", "q_blocks"])
def _attention_bwd_q_kernel(
    q, k, v, out, stats, dout, dlse, dq, delta, cu_q, cu_k, used_k, start_k, seed, scale, drop_below, grow, stride_q,
    stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_do, stride_doh, heads, total_q, q_blocks,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and delta of one query block."""
    sample, head, block = place(q_blocks, heads, BLOCK_M)
    first_q, q_len = rows_of(cu_q, sample)
    if block >= q_len:
        return
    first_k, used = keys_of(cu_k, used_k, sample)
    rows = block + tl.arange(0, BLOCK_M)
    limit, all_see, some_see = sight(start_k, sample, rows, block, BLOCK_M, used)
    stride_out = heads * WIDTH
    q, dout = at(q, first_q, stride_q, head, stride_qh), at(dout, first_q, stride_do, head, stride_doh)
    k, v = at(k, first_k, stride_k, head, stride_kh), at(v, first_k, stride_v, head, stride_vh)
    out, dq = at(out, first_q, stride_out, head, WIDTH), at(dq, first_q, stride_out, head, WIDTH)
    by_row = head.to(tl.int64) * total_q + first_q + rows
    dout_tile = tile(dout, rows, stride_do, q_len, WIDTH, BLOCK_D, True)
    out_tile = tile(out, rows, stride_out, q_len, WIDTH, BLOCK_D, True)
    q_tile = tile(q, rows, stride_q, q_len, WIDTH, BLOCK_D, True)
    delta_rows = tl.sum(dout_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    if dlse is not None:
        delta_rows -= tl.load(dlse + by_row, mask=rows < q_len, other=0.0)
    tl.store(delta + by_row, delta_rows, mask=rows < q_len)
    top = tl.load(stats + by_row, mask=rows < q_len, other=float("inf"))
    share = tl.load(stats + heads.to(tl.int64) * total_q + by_row, mask=rows < q_len, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    even = all_see // BLOCK_N * BLOCK_N
    acc = _sweep_q(acc, q_tile, dout_tile, k, v, first_q + rows, 0, even, stride_k, stride_v, used, limit,
                   scale * LOG2E, top, delta_rows, seed, drop_below, grow, head, WIDTH, BLOCK_D, BLOCK_N, False,
                   PRECISION)  # fmt: skip
    acc = _sweep_q(acc, q_tile, dout_tile, k, v, first_q + rows, even, some_see, stride_k, stride_v, used, limit,
                   scale * LOG2E, top, delta_rows, seed, drop_below, grow, head, WIDTH, BLOCK_D, BLOCK_N, True,
                   PRECISION)  # fmt: skip
    store(dq, rows, stride_out, q_len, acc * (share * scale)[:, None], WIDTH, BLOCK_D)


@triton.jit(do_not_specialize=["drop_below", "heads", "total_q", "k_blocks"])
def _attention_bwd_kv_kernel(
    q, k, v, stats, dout, delta, dk, dv, cu_q, cu_k, used_k, start_k, seed, scale, drop_below, grow, stride_q,
    stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_do, stride_doh, heads, total_q, k_blocks,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one key block; everything is transposed, [keys, query rows]. Rows that are no keys get zeros."""
    sample, head, block = place(k_blocks, heads, BLOCK_N)
    first_k, k_len = rows_of(cu_k, sample)
    _, used = keys_of(cu_k, used_k, sample)
    if block >= k_len:
        return
    first_q, q_len = rows_of(cu_q, sample)
    keys = block + tl.arange(0, BLOCK_N)
    stride_out = heads * WIDTH
    q, dout = at(q, first_q, stride_q, head, stride_qh), at(dout, first_q, stride_do, head, stride_doh)
    k, v = at(k, first_k, stride_k, head, stride_kh), at(v, first_k, stride_v, head, stride_vh)
    dk, dv = at(dk, first_k, stride_out, head, WIDTH), at(dv, first_k, stride_out, head, WIDTH)
    tops = stats + head.to(tl.int64) * total_q + first_q
    shares = tops + heads.to(tl.int64) * total_q
    delta += head.to(tl.int64) * total_q + first_q
    k_tile = tile(k, keys, stride_k, used, WIDTH, BLOCK_D, True)
    v_tile = tile(v, keys, stride_v, used, WIDTH, BLOCK_D, True)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    scale2 = scale * LOG2E
    begin = 0
    end = tl.where(block < used, q_len, 0)
    if start_k is not None:
        start = tl.load(start_k + sample)
        begin = tl.where(block < start, 0, block // BLOCK_M * BLOCK_M)
    for first in range(begin, end, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        q_tile = tile(q, rows, stride_q, q_len, WIDTH, BLOCK_D, True)
        dout_tile = tile(dout, rows, stride_do, q_len, WIDTH, BLOCK_D, True)
        # past the last row top = inf, so p = 0; a key past `used` spoils only its own row, which is not stored
        top = tl.load(tops + rows, mask=rows < q_len, other=float("inf"))
        share = tl.load(shares + rows, mask=rows < q_len, other=0.0)
        delta_rows = tl.load(delta + rows, mask=rows < q_len, other=0.0)
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale2
        probs = tl.exp2(scores - top[None, :]) * share[None, :]
        if start_k is not None:
            probs = tl.where(keys[:, None] < tl.maximum(start, rows[None, :] + 1), probs, 0.0)
        dp = tl.dot(v_tile, tl.trans(dout_tile), input_precision=PRECISION)
        if seed is not None:
            stay = kept(seed, drop_below, first_q + rows[None, :], keys[:, None], head)
            dp = tl.where(stay, dp * grow, 0.0)
            weights = tl.where(stay, probs * grow, 0.0)
        else:
            weights = probs
        dv_acc = tl.dot(weights.to(dout_tile.dtype), dout_tile, dv_acc, input_precision=PRECISION)
        ds = probs * (dp - delta_rows[None, :])
        dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision=PRECISION)
    is_key = keys[:, None] < used
    store(dk, keys, stride_out, k_len, tl.where(is_key, dk_acc * scale, 0.0), WIDTH, BLOCK_D)
    store(dv, keys, stride_out, k_len, tl.where(is_key, dv_acc, 0.0), WIDTH, BLOCK_D)


# --- launchers --------------------------------------------------------------------------------------------------------


def _config(arch, itemsize, width, longest, pairs, multiprocessors, dropout=False, rows=0):
    """Of the kernel for whole samples, if it is the one, and of the two by queries and by keys."""
    _, by_query, by_key = tiles_of(arch, itemsize, width, dropout)
    whole = attention_single.fits(arch, itemsize, width, longest, pairs, multiprocessors, dropout)
    sample = attention_single.BACKWARD if whole else None
    if whole and (tried := _device.configuration("attention_bwd", arch, rows)):
        sample = tried if tried.get("SINGLE", True) else None
    return dict(sample=sample, query=options(by_query), key=options(by_key))


def attention_bwd(
    *, needs, grad_out, grad_lse, q, k, v, out, stats, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    seqused_k, causal_start, dropout_p, scale, seed,
):  # fmt: skip
    rows, heads, width = q.shape
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    dout = torch.zeros_like(out) if grad_out is None else grad_out
    dout, q = in_place(dout, max_seqlen_q), in_place(q, max_seqlen_q)
    k, v = in_place(k, max_seqlen_k), in_place(v, max_seqlen_k)
    arguments = bounds_and_numbers(
        cu_seqlens_q, cu_seqlens_k, seqused_k, causal_start, seed, scale, dropout_p, q, k, v, dout
    )
    arch = _device.arch(q)
    sizes = shape(width, arch)
    pairs = heads * (len(cu_seqlens_q) - 1)
    config = _config(
        arch, q.element_size(), width, max_seqlen_k, pairs, _device.multiprocessors(q), dropout_p > 0, rows
    )  # fmt: skip
    if config["sample"] and pairs:
        with _device.on(q):
            attention_single.backward(
                q, k, v, out, stats, dout, *dense(grad_lse), dq, dk, dv, arguments, pairs, config["sample"] | sizes
            )
        return (dq, dk, dv), ()
    config_q, config_kv, delta = config["query"], config["key"], torch.empty_like(stats[0])
    with _device.on(q):
        if dq.numel():
            q_blocks = cdiv(max_seqlen_q, config_q["BLOCK_M"])
            _attention_bwd_q_kernel[(q_blocks * pairs,)](
                q, k, v, out, stats, dout, *dense(grad_lse), dq, delta, *arguments, q_blocks, **sizes, **config_q
            )  # fmt: skip
        if dk.numel():
            k_blocks = cdiv(max_seqlen_k, config_kv["BLOCK_N"])
            _attention_bwd_kv_kernel[(k_blocks * pairs,)](
                q, k, v, stats, dout, delta, dk, dv, *arguments, k_blocks, **sizes, **config_kv
            )  # fmt: skip
    return (dq, dk, dv), ()


def aot_cases():
    """As for the forward."""
    kernels = (_attention_bwd_q_kernel, _attention_bwd_kv_kernel)
    for target in _aot.TARGETS:
        for dtype, width, mask in (
            (torch.bfloat16, 64, "plain"), (torch.bfloat16, 64, "dropout"), (torch.bfloat16, 64, "causal"),
            (torch.float16, 64, "plain"), (torch.float32, 64, "plain"), (torch.float32, 64, "dropout"),
            (torch.float32, 64, "causal"), (torch.bfloat16, 128, "plain"), (torch.float32, 128, "plain"),
        ):  # fmt: skip
            tiles = tiles_of(target.arch, dtype.itemsize, width, mask == "dropout")
            for kernel, config in zip(kernels, map(options, tiles[1:]), strict=True):
                yield aot_case(kernel, target, dtype, width, config, mask, mask)

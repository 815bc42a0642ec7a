"""Packed attention for Triton where samples are short and many: one program per (head, sample), no dropout.

Shapes, masks and results are those of attention.py.

Forward: the keys and values of a sample, at most LONGEST rows, are read once, into shared memory; blocks of queries
stream past them in steps of online softmax. Keys are tiles of 128, 64, 64 and 32 rows, of which a sample with at most
192 keys takes two: its own length decides, not the longest of the batch.

Backward: five products a tile instead of the seven of attention_bwd.py, which computes scores and dp twice:
    p = exp(scale * k.q - lse), dp = v.dout, ds = p (dp - delta)       [keys, queries]
    dv += p dout, dk += ds q, dq += scale * ds^T k
Key blocks one after the other, whose dk and dv are in registers while the queries stream past. dq waits in `partial`,
float32 and dense as dq, between key blocks, where no other program touches it. No atomics: equal runs give equal bits.
"""

import torch
import triton
import triton.language as tl

from . import _aot
from ._attention import LOG2E, aot_case, at, finish, keys_of, masked_scores, options, rows_of, store, tile

LONGEST = 288  # 128 + 64 + 64 + 32
FORWARD = options((64, 128, 4, 1), BLOCK_N2=64)
BACKWARD = options((64, 64, 8, 1))

# --- forward ----------------------------------------------------------------------------------------------------------


@triton.jit
def _step(acc, top, total, q_tile, k_tile, v_tile, keys, limit, scale, PRECISION: tl.constexpr):
    """Online softmax over a tile of keys: (sum of weighted values, maximum, sum of weights)."""
    scores = masked_scores(q_tile, k_tile, keys, limit, scale, True, PRECISION)
    new_top = tl.maximum(top, tl.max(scores, 1))
    finite = tl.where(new_top == float("-inf"), 0.0, new_top)
    shrink, weights = tl.exp2(top - finite), tl.exp2(scores - finite[:, None])
    acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_top, total * shrink + tl.sum(weights, 1)


@triton.jit
def _limit(start_k, sample, rows, used):
    """A query row sees keys 0:limit; a number of each row, or one for all, which is fewer registers."""
    if start_k is not None:
        return tl.minimum(used, tl.maximum(tl.load(start_k + sample), rows + 1))
    else:
        return used


@triton.jit(do_not_specialize=["drop_below", "heads", "total_q"])
def _attention_single_fwd_kernel(
    q, k, v, out, lse, stats, cu_q, cu_k, used_k, start_k, seed, scale, drop_below, grow, stride_q, stride_qh,
    stride_k, stride_kh, stride_v, stride_vh, heads, total_q, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_N2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sample, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    first_q, q_len = rows_of(cu_q, sample)
    first_k, used = keys_of(cu_k, used_k, sample)
    stride_out = heads * WIDTH
    q, out = at(q, first_q, stride_q, head, stride_qh), at(out, first_q, stride_out, head, WIDTH)
    k, v = at(k, first_k, stride_k, head, stride_kh), at(v, first_k, stride_v, head, stride_vh)
    by_row, all_rows = head.to(tl.int64) * total_q + first_q, heads.to(tl.int64) * total_q
    scale *= LOG2E
    SHORT: tl.constexpr = BLOCK_N + BLOCK_N2
    keys1, keys2 = tl.arange(0, BLOCK_N), BLOCK_N + tl.arange(0, BLOCK_N2)
    k1, k2 = tile(k, keys1, stride_k, used, WIDTH, BLOCK_D, True), tile(k, keys2, stride_k, used, WIDTH, BLOCK_D, True)
    v1, v2 = tile(v, keys1, stride_v, used, WIDTH, BLOCK_D, True), tile(v, keys2, stride_v, used, WIDTH, BLOCK_D, True)
    keys3, keys4 = SHORT + tl.arange(0, 64), SHORT + 64 + tl.arange(0, 32)
    k3, k4 = tile(k, keys3, stride_k, used, WIDTH, BLOCK_D, True), tile(k, keys4, stride_k, used, WIDTH, BLOCK_D, True)
    v3, v4 = tile(v, keys3, stride_v, used, WIDTH, BLOCK_D, True), tile(v, keys4, stride_v, used, WIDTH, BLOCK_D, True)
    for block in range(0, q_len, BLOCK_M):
        rows = block + tl.arange(0, BLOCK_M)
        q_tile = tile(q, rows, stride_q, q_len, WIDTH, BLOCK_D, True)
        limit = _limit(start_k, sample, rows[:, None], used)
        acc, total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32), tl.zeros([BLOCK_M], tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        acc, top, total = _step(acc, top, total, q_tile, k1, v1, keys1, limit, scale, PRECISION)
        acc, top, total = _step(acc, top, total, q_tile, k2, v2, keys2, limit, scale, PRECISION)
        if used > SHORT:
            acc, top, total = _step(acc, top, total, q_tile, k3, v3, keys3, limit, scale, PRECISION)
            acc, top, total = _step(acc, top, total, q_tile, k4, v4, keys4, limit, scale, PRECISION)
        finish(out, lse, stats, acc, top, total, 1.0, rows, q_len, by_row, all_rows, stride_out, WIDTH, BLOCK_D)


# --- backward ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["drop_below", "heads", "total_q"])
def _attention_single_bwd_kernel(
    q, k, v, out, stats, dout, dlse, dq, partial, dk, dv, cu_q, cu_k, used_k, start_k, seed, scale, drop_below, grow,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_do, stride_doh, heads, total_q,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sample, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    first_q, q_len = rows_of(cu_q, sample)
    first_k, k_len = rows_of(cu_k, sample)
    _, used = keys_of(cu_k, used_k, sample)
    stride_out = heads * WIDTH
    q, dout = at(q, first_q, stride_q, head, stride_qh), at(dout, first_q, stride_do, head, stride_doh)
    k, v = at(k, first_k, stride_k, head, stride_kh), at(v, first_k, stride_v, head, stride_vh)
    out, dq = at(out, first_q, stride_out, head, WIDTH), at(dq, first_q, stride_out, head, WIDTH)
    dk, dv = at(dk, first_k, stride_out, head, WIDTH), at(dv, first_k, stride_out, head, WIDTH)
    partial = at(partial, first_q, stride_out, head, WIDTH)
    by_row, all_rows = head.to(tl.int64) * total_q + first_q, heads.to(tl.int64) * total_q
    for first in range(0, tl.maximum(k_len, 1), BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        k_tile = tile(k, keys, stride_k, used, WIDTH, BLOCK_D, True)
        v_tile = tile(v, keys, stride_v, used, WIDTH, BLOCK_D, True)
        dk_acc, dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for block in range(0, tl.where(first < tl.maximum(used, 1), q_len, 0), BLOCK_M):
            rows = block + tl.arange(0, BLOCK_M)
            q_tile = tile(q, rows, stride_q, q_len, WIDTH, BLOCK_D, True)
            dout_tile = tile(dout, rows, stride_do, q_len, WIDTH, BLOCK_D, True)
            out_tile = tile(out, rows, stride_out, q_len, WIDTH, BLOCK_D, True)
            delta = tl.sum(dout_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
            if dlse is not None:
                delta -= tl.load(dlse + by_row + rows, mask=rows < q_len, other=0.0)
            top = tl.load(stats + by_row + rows, mask=rows < q_len, other=float("inf"))  # past the last row p = 0
            share = tl.load(stats + all_rows + by_row + rows, mask=rows < q_len, other=0.0)
            limit = _limit(start_k, sample, rows[None, :], used)
            scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * (scale * LOG2E)
            probs = tl.where(keys[:, None] < limit, tl.exp2(scores - top[None, :]) * share[None, :], 0.0)
            dv_acc = tl.dot(probs.to(dout_tile.dtype), dout_tile, dv_acc, input_precision=PRECISION)
            dp = tl.dot(v_tile, tl.trans(dout_tile), input_precision=PRECISION)
            ds = (probs * (dp - delta[None, :])).to(q_tile.dtype)
            dk_acc = tl.dot(ds, q_tile, dk_acc, input_precision=PRECISION)
            dq_tile = tl.dot(tl.trans(ds), k_tile, input_precision=PRECISION)
            if first > 0:
                dq_tile += tile(partial, rows, stride_out, q_len, WIDTH, BLOCK_D, True)
            if first + BLOCK_N < used:
                store(partial, rows, stride_out, q_len, dq_tile, WIDTH, BLOCK_D)
            else:
                store(dq, rows, stride_out, q_len, dq_tile * scale, WIDTH, BLOCK_D)
        store(dk, keys, stride_out, k_len, dk_acc * scale, WIDTH, BLOCK_D)
        store(dv, keys, stride_out, k_len, dv_acc, WIDTH, BLOCK_D)
        tl.debug_barrier()  # what one thread left in `partial` another may read


# --- launchers --------------------------------------------------------------------------------------------------------


def fits(arch, itemsize, width, longest, pairs, multiprocessors, dropout):
    """Whether a call is for these kernels: products of four warps, samples short, and pairs of sample and head enough
    to have two on each multiprocessor."""
    small = itemsize == 2 and width <= 64 and longest <= LONGEST and not dropout
    return arch == 90 and small and pairs >= 2 * multiprocessors


def forward(q, k, v, out, lse, stats, arguments, pairs, config):
    """Launch; `arguments` of `bounds_and_numbers`."""
    _attention_single_fwd_kernel[(pairs,)](q, k, v, out, lse, stats, *arguments, **config)


def backward(q, k, v, out, stats, dout, dlse, dq, dk, dv, arguments, pairs, config):
    partial = torch.empty_like(out, dtype=torch.float32)
    _attention_single_bwd_kernel[(pairs,)](q, k, v, out, stats, dout, dlse, dq, partial, dk, dv, *arguments, **config)


# --- what ships, for compilation ahead of time ------------------------------------------------------------------------


def aot_cases():
    """ViLT's, and causal masks, which it never has."""
    types = {"partial": "*fp32"}
    for target in _aot.TARGETS:
        if target.arch != 90:
            continue
        for dtype, mask in ((torch.bfloat16, "plain"), (torch.float16, "plain"), (torch.bfloat16, "causal")):
            home = mask == "plain"
            yield aot_case(_attention_single_fwd_kernel, target, dtype, 64, FORWARD, mask, mask, home)
            yield aot_case(_attention_single_bwd_kernel, target, dtype, 64, BACKWARD, mask, mask, home, **types)

"""Packed attention for Triton: out = dropout(softmax(scale * Q K^T)) V per sample and head.

Shapes: q [Nq, H, d]; k, v [Nk, H, d], dense in d, any row and head strides (slices of a fused projection are read in
place); out [Nq, H, d] and lse [H, Nq] float32 are new and dense. Query row i of a sample sees the key rows j < used
with j < max(start, i + 1) where there is a causal start (reference/attention.py), so what a row sees is always a
leading run of keys and one number per row is the whole mask.

Where there are enough samples of ViLT's sizes, attention_single.py has one program per (head, sample); gradients are
in attention_bwd.py and there, what all share in _attention.py.

Here, one program per (query block, head, sample). Where the scores of the longest key run fit (the sequences of ViLT:
185 to 281) they all stay in registers as two tiles of power-of-two widths (281 -> 256 + 32): one maximum, one sum, no
rescaling. Longer runs take online softmax over key blocks (Milakov and Gimelshein 2018; Dao 2023), blocks that every
row sees entirely without any mask. Scores and sums are float32, in units of log2.

Dropout draws 24 Philox bits per probability from (seed, key row, packed query row, head), whatever the tile sizes, so
that the backward draws the same. The seed is read on the device. The draws need so many registers that the scores of
all keys no longer fit: with dropout, it is online softmax at every length, in key blocks of half the size.

No program reads a row of another sample or a key row that is not used: they may hold NaN. Row offsets within a sample
are 32 bits wide, those of samples and heads 64. Samples without keys give zeros and lse = -inf.
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
    finish,
    in_place,
    keys_of,
    masked_scores,
    options,
    place,
    rows_of,
    shape,
    sight,
    tile,
    warpgroups,
)  # fmt: skip
from ._tiles import cdiv, kept


@triton.jit
def _weighted(acc, weights, v_tile, rows, keys, seed, drop_below, head, PRECISION: tl.constexpr):
    """acc + dropout(weights) V, without the 1 / (1 - p)."""
    if seed is not None:
        weights = tl.where(kept(seed, drop_below, rows[:, None], keys[None, :], head), weights, 0.0)
    return tl.dot(weights.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)


# --- forward ----------------------------------------------------------------------------------------------------------


@triton.jit
def _sweep(acc, top, total, q_tile, k, v, rows, begin, end, stride_k, stride_v, used, limit, scale, seed, drop_below,
           head, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """Online softmax over keys begin:end; (acc, top, total) = (sum of weighted values, maximum, sum of weights)."""
    for first in range(begin, end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        k_tile = tile(k, keys, stride_k, used, WIDTH, BLOCK_D, MASKED)
        scores = masked_scores(q_tile, k_tile, keys, limit, scale, MASKED, PRECISION)
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        v_tile = tile(v, keys, stride_v, used, WIDTH, BLOCK_D, MASKED)
        acc = _weighted(acc * shrink[:, None], weights, v_tile, rows, keys, seed, drop_below, head, PRECISION)
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=["drop_below", "heads", "total_q", "q_blocks"])
def _attention_fwd_kernel(
    q, k, v, out, lse, stats, cu_q, cu_k, used_k, start_k, seed, scale, drop_below, grow, stride_q, stride_qh,
    stride_k, stride_kh, stride_v, stride_vh, heads, total_q, q_blocks, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_N2: tl.constexpr, SINGLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """SINGLE: all keys in one tile of BLOCK_N and, unless 0, one of BLOCK_N2. Else key blocks of BLOCK_N."""
    sample, head, block = place(q_blocks, heads, BLOCK_M)
    first_q, q_len = rows_of(cu_q, sample)
    if block >= q_len:
        return
    first_k, used = keys_of(cu_k, used_k, sample)
    rows = block + tl.arange(0, BLOCK_M)
    limit, all_see, some_see = sight(start_k, sample, rows, block, BLOCK_M, used)
    k, v = at(k, first_k, stride_k, head, stride_kh), at(v, first_k, stride_v, head, stride_vh)
    q_tile = tile(at(q, first_q, stride_q, head, stride_qh), rows, stride_q, q_len, WIDTH, BLOCK_D, True)
    scale *= LOG2E
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    q_rows = first_q + rows
    if SINGLE:
        keys = tl.arange(0, BLOCK_N)
        k_tile = tile(k, keys, stride_k, used, WIDTH, BLOCK_D, True)
        v_tile = tile(v, keys, stride_v, used, WIDTH, BLOCK_D, True)
        scores = masked_scores(q_tile, k_tile, keys, limit, scale, True, PRECISION)
        top = tl.max(scores, 1)
        if BLOCK_N2 > 0:
            keys2 = BLOCK_N + tl.arange(0, BLOCK_N2)
            k_tile2 = tile(k, keys2, stride_k, used, WIDTH, BLOCK_D, True)
            v_tile2 = tile(v, keys2, stride_v, used, WIDTH, BLOCK_D, True)
            scores2 = masked_scores(q_tile, k_tile2, keys2, limit, scale, True, PRECISION)
            top = tl.maximum(top, tl.max(scores2, 1))
        finite_top = tl.where(top == float("-inf"), 0.0, top)[:, None]
        weights = tl.exp2(scores - finite_top)
        total = tl.sum(weights, 1)
        acc = _weighted(acc, weights, v_tile, q_rows, keys, seed, drop_below, head, PRECISION)
        if BLOCK_N2 > 0:
            weights2 = tl.exp2(scores2 - finite_top)
            total += tl.sum(weights2, 1)
            acc = _weighted(acc, weights2, v_tile2, q_rows, keys2, seed, drop_below, head, PRECISION)
    else:
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        even = all_see // BLOCK_N * BLOCK_N
        acc, top, total = _sweep(acc, top, total, q_tile, k, v, q_rows, 0, even, stride_k, stride_v, used, limit,
                                 scale, seed, drop_below, head, WIDTH, BLOCK_D, BLOCK_N, False, PRECISION)  # fmt: skip
        acc, top, total = _sweep(acc, top, total, q_tile, k, v, q_rows, even, some_see, stride_k, stride_v, used,
                                 limit, scale, seed, drop_below, head, WIDTH, BLOCK_D, BLOCK_N, True,
                                 PRECISION)  # fmt: skip
    stride_out = heads * WIDTH
    by_row, all_rows = head.to(tl.int64) * total_q + first_q, heads.to(tl.int64) * total_q
    out = at(out, first_q, stride_out, head, WIDTH)
    finish(out, lse, stats, acc, top, total, grow, rows, q_len, by_row, all_rows, stride_out, WIDTH, BLOCK_D)


# --- launchers --------------------------------------------------------------------------------------------------------


def supports(
    *, device=None, dtype=None, head_dim=64, requires_grad=False, dropout=False, causal=False, return_lse=False,
    generator=False, apart=False,
):  # fmt: skip
    """ "" when Triton can run this, else why not."""
    if apart:
        return "cu_seqlens, seqused_k and causal_start must be on the device of q; it never copies between devices."
    if not 1 <= head_dim <= 256:
        return f"head dim is {head_dim}, expected 1 to 256."
    return _device.problem(device, dtype=dtype)


# (BLOCK_M, BLOCK_N, num_warps, num_stages) of the forward, of dq and of dk, dv; by bytes an element and head dim. The
# largest that no supported compiler spills: in float32 each product is three of TF32, whose operands are in registers.
_TILES = {
    (2, 64): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
    (2, 128): ((64, 64, 4, 2), (64, 32, 4, 2), (32, 64, 8, 2)),
    (2, 256): ((64, 32, 8, 2), (32, 32, 8, 1), (32, 32, 8, 1)),
    (4, 64): ((32, 32, 8, 2), (32, 32, 8, 2), (32, 16, 4, 2)),
    (4, 128): ((16, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    (4, 256): ((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
}
# Where an architecture differs: 80 stands for all whose matrix instruction belongs to one warp (80, 86, 89, 120: both
# operands in registers), 0 for AMD, where 4 warps may use 512 registers a thread and 8 only 256. With at most 256, two
# programs share a multiprocessor there, for which dk, dv gives up its prefetching.
_TILES_OF = {
    80: {
        (2, 64): ((64, 32, 4, 2), (64, 32, 4, 2), (32, 64, 4, 2)),
        (2, 128): ((64, 32, 4, 2), (64, 32, 4, 2), (32, 64, 8, 2)),
    },
    90: {(4, 64): ((64, 32, 4, 2), (64, 32, 4, 2), (32, 16, 4, 2))},
    0: {
        (2, 64): ((64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 1)),
        (2, 128): ((64, 64, 4, 2), (64, 32, 4, 2), (32, 64, 4, 2)),
        (2, 256): ((64, 32, 8, 2), (32, 32, 4, 1), (32, 32, 4, 1)),
        (4, 64): ((64, 32, 4, 2), (32, 32, 4, 1), (32, 32, 4, 1)),
        (4, 128): ((32, 32, 8, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
        (4, 256): ((32, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    },
}
_SINGLE_TILES = ((64, 0), (64, 32), (128, 0), (128, 32), (128, 64), (256, 0), (256, 32), (256, 64))


def tiles_of(arch, itemsize, width, dropout=False):
    """Tiles of the forward, of dq and of dk, dv. With dropout, what streams past comes in halves: the registers are
    needed for random numbers, whose arithmetic takes so long that smaller products do not matter."""
    key = (itemsize, 64 if width <= 64 else 128 if width <= 128 else 256)
    family = arch if not arch or warpgroups(arch) else 80
    forward, by_q, by_k = _TILES_OF.get(family, {}).get(key) or _TILES[key]
    if not dropout:
        return forward, by_q, by_k
    halved = ((m, max(16, n // 2), *rest) for m, n, *rest in (forward, by_q))
    return *halved, (max(16, by_k[0] // 2), *by_k[1:])


def _forward_config(
    arch, itemsize, width, max_seqlen_q, max_seqlen_k, pairs, multiprocessors, dropout=False, rows=0
):  # fmt: skip
    """Block sizes of the forward, or those of attention_single.py, which has no SINGLE; pairs = samples * heads."""
    if itemsize == 2 and width <= 64 and not dropout:
        tried = _device.configuration("attention", arch, rows)
        if tried and (not tried["SINGLE"] or tried["BLOCK_N"] + tried["BLOCK_N2"] >= max_seqlen_k):
            return tried
    tiles = tiles_of(arch, itemsize, width, dropout)[0]
    crowded = cdiv(max_seqlen_q, 64) * pairs >= multiprocessors
    if attention_single.fits(arch, itemsize, width, max_seqlen_k, pairs, multiprocessors, dropout):
        return attention_single.FORWARD
    if max_seqlen_k <= 320 and itemsize == 2 and width <= 64 and not dropout:
        n, n2 = next(pair for pair in _SINGLE_TILES if sum(pair) >= max_seqlen_k)
        fits = 288 if warpgroups(arch) else 192 if arch else 320  # keys whose scores of 64 rows four warps can hold
        if crowded and n + n2 <= fits:
            return options((64, n, 4, 2), BLOCK_N2=n2, SINGLE=True)
        if not (crowded and warpgroups(arch)):  # small blocks, or they are too few; on NVIDIA shared by eight warps
            return options((32, n, 8 if arch else 4, 2), BLOCK_N2=n2, SINGLE=True)
    elif arch == 90 and itemsize == 2 and width <= 64 and crowded and not dropout:
        tiles = (128, 64, 4, 3)
    return options(tiles, BLOCK_N2=0, SINGLE=False)


def attention_fwd(
    *, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, causal_start, dropout_p, scale, seed,
    keep,
):  # fmt: skip
    """Kept are stats [2, H, Nq] float32: the largest score of a row in units of log2, and 1 / (sum of the exponentials
    of what the others fall short of it)."""
    rows, heads, width = q.shape
    out = q.new_empty(*q.shape)
    lse = q.new_empty(heads, rows, dtype=torch.float32)
    stats = q.new_empty(2, heads, rows, dtype=torch.float32)
    if out.numel():
        q, k, v = in_place(q, max_seqlen_q), in_place(k, max_seqlen_k), in_place(v, max_seqlen_k)
        pairs = heads * (len(cu_seqlens_q) - 1)
        config = _forward_config(
            _device.arch(q), q.element_size(), width, max_seqlen_q, max_seqlen_k, pairs, _device.multiprocessors(q),
            dropout_p > 0, rows,
        )  # fmt: skip
        arguments = bounds_and_numbers(
            cu_seqlens_q, cu_seqlens_k, seqused_k, causal_start, seed, scale, dropout_p, q, k, v
        )
        config = config | shape(width, _device.arch(q))
        with _device.on(q):
            if "SINGLE" not in config:
                attention_single.forward(q, k, v, out, lse, stats, arguments, pairs, config)
            else:
                q_blocks = cdiv(max_seqlen_q, config["BLOCK_M"])
                _attention_fwd_kernel[(q_blocks * pairs,)](q, k, v, out, lse, stats, *arguments, q_blocks, **config)
    return (out, lse), (stats,) if keep else ()


# --- what ships, for compilation ahead of time ------------------------------------------------------------------------


_LENGTHS = (40, 90, 128, 150, 185, 240, 281, 320)  # each takes another of _SINGLE_TILES


def aot_cases():
    """What ViLT meets (head dim 64, 12 heads, up to 320 rows), longer sequences and head dim 128."""
    for target in _aot.TARGETS:
        seen = []
        for dtype, width, longest, batch, mask in (
            *((torch.bfloat16, 64, longest, batch, "plain") for longest in _LENGTHS for batch in (64, 8, 1)),
            (torch.bfloat16, 64, 281, 64, "dropout"), (torch.bfloat16, 64, 281, 64, "causal"),
            (torch.bfloat16, 64, 281, 1, "causal"), (torch.bfloat16, 64, 320, 64, "causal"),
            (torch.bfloat16, 64, 1024, 64, "plain"), (torch.float16, 64, 281, 64, "plain"),
            (torch.float32, 64, 281, 64, "plain"), (torch.float32, 64, 281, 64, "dropout"),
            (torch.bfloat16, 128, 281, 64, "plain"), (torch.float32, 128, 281, 64, "plain"),
        ):  # fmt: skip
            config = _forward_config(
                target.arch, dtype.itemsize, width, longest, longest, 12 * batch, target.multiprocessors,
                dropout=mask == "dropout",
            )  # fmt: skip
            if "SINGLE" not in config or (dtype, width, mask, config) in seen:
                continue
            seen.append((dtype, width, mask, config))
            yield aot_case(
                _attention_fwd_kernel, target, dtype, width, config, f"L{longest} B{batch} {mask}", mask,
                home=longest <= 320,
            )  # fmt: skip

"""What the attention kernels share: where rows lie, tiles, what a row sees; how a launcher describes its matrices.

Shapes, masks and dropout are those of attention.py.
"""

import math

import torch
import triton
import triton.language as tl

from . import _aot, _device
from ._tiles import dense, power_of_two

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))


# --- device side ------------------------------------------------------------------------------------------------------


@triton.jit
def place(blocks, heads, BLOCK: tl.constexpr):
    """Sample, head and first row of the block of this program."""
    pid = tl.program_id(0)
    return pid // blocks // heads, pid // blocks % heads, (pid % blocks) * BLOCK


@triton.jit
def at(base, first, stride, head, stride_head):
    """Where a head of a sample begins, whose first row is `first`."""
    return base + first.to(tl.int64) * stride + head.to(tl.int64) * stride_head


@triton.jit
def rows_of(cu, sample):
    """First row and number of the rows of a sample."""
    first = tl.load(cu + sample)
    return first, tl.load(cu + sample + 1) - first


@triton.jit
def keys_of(cu, used, sample):
    """First row and number of the keys of a sample."""
    first, count = rows_of(cu, sample)
    if used is not None:
        count = tl.minimum(count, tl.load(used + sample))
    return first, count


@triton.jit
def tile(base, rows, stride, end, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """[rows, BLOCK_D] of a matrix of WIDTH columns; zero from row `end` on (if MASKED) and past the last column."""
    columns = tl.arange(0, BLOCK_D)
    from_base = base + (rows[:, None] * stride + columns[None, :])  # summed in 32 bits first: fewer registers
    if MASKED and BLOCK_D != WIDTH:
        return tl.load(from_base, mask=(rows[:, None] < end) & (columns[None, :] < WIDTH), other=0.0)
    elif MASKED:
        return tl.load(from_base, mask=rows[:, None] < end, other=0.0)
    elif BLOCK_D != WIDTH:
        return tl.load(from_base, mask=columns[None, :] < WIDTH, other=0.0)
    else:
        return tl.load(from_base)


@triton.jit
def store(base, rows, stride, end, tile, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < end) & (columns[None, :] < WIDTH)
    tl.store(base + (rows[:, None] * stride + columns[None, :]), tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def finish(out, lse, stats, acc, top, total, grow, rows, q_len, by_row, all_rows, stride_out, WIDTH: tl.constexpr,
           BLOCK_D: tl.constexpr):  # fmt: skip
    """Write what a block of query rows has come to: sums of weighted values, maxima and sums of weights.

    `out` is where the head of the sample begins, `by_row` where its statistics do, `all_rows` the number of all.
    """
    total = tl.where(total == 0.0, 1.0, total)
    share = 1.0 / total
    store(out, rows, stride_out, q_len, acc * (share * grow)[:, None], WIDTH, BLOCK_D)
    tl.store(lse + by_row + rows, (top + tl.log2(total)) * LN2, mask=rows < q_len)
    tl.store(stats + by_row + rows, top, mask=rows < q_len)
    tl.store(stats + all_rows + by_row + rows, share, mask=rows < q_len)


@triton.jit
def sight(start_k, sample, rows, block, BLOCK_M: tl.constexpr, used):
    """A query row sees keys 0:limit; all rows of its block see 0:all_see, and none looks past some_see."""
    if start_k is not None:
        start = tl.load(start_k + sample)
        limit = tl.minimum(used, tl.maximum(start, rows + 1))[:, None]
        all_see = tl.minimum(used, tl.maximum(start, block + 1))
        some_see = tl.minimum(used, tl.maximum(start, block + BLOCK_M))
        return limit, all_see, some_see
    else:
        return used, used, used


@triton.jit
def masked_scores(q_tile, k_tile, keys, limit, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """[M, N] scores in units of log2; -inf where a row may not look."""
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
    if MASKED:
        scores = tl.where(keys[None, :] < limit, scores, float("-inf"))
    return scores


# --- host side --------------------------------------------------------------------------------------------------------


def warpgroups(arch):
    """Whether four warps together multiply 64 rows, with an operand or both in shared memory."""
    return arch == 90 or 100 <= arch < 120


def options(tiles, **more):
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), tiles, strict=True), **more)


def in_place(tensor, longest):
    """The tensor itself if the kernels can read it as it lies: dense in d, 32 bits for the rows of a sample."""
    return tensor if tensor.stride(-1) == 1 and (longest + 512) * tensor.stride(0) < 2**31 else tensor.contiguous()


def dropout(p):
    """Draws of 24 bits below the first number are dropped; what stays grows by the second."""
    return round(p * 2**24), 1 / (1 - p)


def shape(width, arch):
    return dict(WIDTH=width, BLOCK_D=max(16, power_of_two(width)), PRECISION=_device.precision(arch))


def bounds_and_numbers(cu_q, cu_k, used_k, start_k, seed, scale, dropout_p, *matrices):
    """What all kernels take in this order: cu_q to grow, the strides of the matrices (q, k, v, ...), heads, rows."""
    rows, heads, _ = matrices[0].shape
    return (
        *dense(cu_q, cu_k, used_k, start_k), seed if dropout_p > 0 else None, scale,
        *dropout(dropout_p), *(stride for matrix in matrices for stride in matrix.stride()[:2]), heads, rows,
    )  # fmt: skip


# --- what ships, for compilation ahead of time ------------------------------------------------------------------------


def aot_case(kernel, target, dtype, width, config, name, mask, home=True, **types):
    """One case of benchmarks.compiled.aot_report; away from home (what ViLT never meets) it may spill a few bytes."""
    name = f"{kernel.__name__.strip('_')} {name} {str(dtype)[6:]} d{width} {target.name}"
    element = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    return _aot.case(
        kernel, name, element, config | shape(width, target.arch), targets=[target], matmul=True, home=home,
        scale="fp32", **types, **dict.fromkeys(ABSENT[mask]),
    )  # fmt: skip


ABSENT = {"plain": ("start_k", "seed", "dlse"), "dropout": ("start_k", "dlse"), "causal": ("seed", "dlse")}

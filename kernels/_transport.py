"""What the transport kernels share: numbers as whole exponents and factors, their sums, tiles of costs, launch helpers.

A power of two times a factor near one stands for numbers that no float holds: step * cost = whole + fraction is split
exactly, exponents are whole numbers and add without rounding (kernels/ipot.py says why). float32 throughout.
"""

import math

import torch
import triton
import triton.language as tl

from ._tiles import power_of_two

FAR = tl.constexpr(1e28)  # the cost of padding: finite, so that nothing turns NaN, and nothing comes of it
LOWEST = tl.constexpr(-1e9)  # exponent of a sum over padding, beyond all others


# --- device side ------------------------------------------------------------------------------------------------------


@triton.jit
def split_exponent(cost, step):
    """(whole, fraction) with step * cost = whole + fraction, |fraction| <= 1/2 or so; step is a float64 scalar.

    Exact to 2^-45 of the product, thanks to the fused multiply-add; float32 alone would keep 2^-24.
    """
    rounded = step.to(tl.float32)
    rest = (step - rounded.to(tl.float64)).to(tl.float32)
    whole = tl.floor(rounded * cost + 0.5)
    return whole, tl.fma(rounded, cost, -whole) + rest * cost


@triton.jit
def power(cost, step, row_exponent, column_exponent):
    """2^(row + column - step cost), the exponents whole numbers."""
    whole, fraction = split_exponent(cost, step)
    return tl.exp2((row_exponent[:, None] + column_exponent[None, :] - whole) - fraction)


@triton.jit
def normal(exponent, factor):
    """The same number with a factor in [1, 2) or so, which keeps factors from drifting off."""
    shift = tl.floor(tl.log2(factor))
    return exponent + shift, factor * tl.exp2(-shift)


@triton.jit
def some(total):
    """A sum, or 1 where only padding was summed; NaN stays NaN."""
    return tl.where(total == 0.0, 1.0, total)


@triton.jit
def image_top(cost, step, exponent):
    """The largest whole exponent in each column of x_i 2^(-step cost_ij)."""
    return tl.maximum(tl.floor(tl.max(exponent[:, None] - cost * step.to(tl.float32), 0)), LOWEST)


@triton.jit
def text_top(cost, step, exponent):
    return tl.maximum(tl.floor(tl.max(exponent[None, :] - cost * step.to(tl.float32), 1)), LOWEST)


@triton.jit
def image_total(cost, step, exponent, factor, top):
    """sum_i x_i 2^(-step cost_ij) / 2^top_j with x = factor 2^exponent."""
    return tl.sum(factor[:, None] * power(cost, step, exponent, -top), 0)


@triton.jit
def text_total(cost, step, exponent, factor, top):
    return tl.sum(factor[None, :] * power(cost, step, -top, exponent), 1)


@triton.jit
def add_text_sums(top, total, cost, step, exponent, factor):
    """(top, total) of the text sums, and one more tile of columns; starts from (LOWEST, 0)."""
    new_top = tl.maximum(top, text_top(cost, step, exponent))
    return new_top, total * tl.exp2(top - new_top) + text_total(cost, step, exponent, factor, new_top)


@triton.jit
def plan_of(cost, step, u_exponent, u, v_exponent, v):
    """T = diag(u) 2^(-step cost) diag(v)."""
    return power(cost, step, u_exponent, v_exponent) * u[:, None] * v[None, :]


@triton.jit
def is_real(pad, pair, at, size):
    """Which of the positions `at` of a pair are real, from a mask [B, size]."""
    return tl.load(pad + pair.to(tl.int64) * size + at, mask=at < size, other=1) == 0


@triton.jit
def count(real):
    return tl.sum(real.to(tl.float32), 0)


@triton.jit
def load_cost(cost, rows, columns, stride_m, text_real, image_real):
    """A tile of costs, FAR on padding."""
    real = text_real[:, None] & image_real[None, :]
    tile = tl.load(cost + (rows[:, None].to(tl.int64) * stride_m + columns[None, :]), mask=real, other=0.0)
    return tl.where(real, tile.to(tl.float32), FAR)


@triton.jit
def furthest(cost):
    return tl.max(tl.max(tl.where(cost == FAR, 0.0, tl.abs(cost)), 1), 0)


@triton.jit
def store_scaling(out, first, at, size, exponent, factor):
    """(exponent, factor) pairs into rows first + at of [rows, 2], unless nobody wants them."""
    if out is not None:
        out += (first.to(tl.int64) + at) * 2
        tl.store(out, exponent, mask=at < size)
        tl.store(out + 1, factor, mask=at < size)


@triton.jit
def store_plan(plan, rows, columns, M, N, values):
    tl.store(plan + (rows[:, None] * N + columns[None, :]), values, mask=(rows[:, None] < M) & (columns[None, :] < N))


# --- host side --------------------------------------------------------------------------------------------------------


def streamed(M):
    """All rows, and columns for few enough entries a thread that no compiler spills."""
    block_m = max(16, power_of_two(M))
    return dict(BLOCK_M=block_m, BLOCK_N=4096 // block_m, num_warps=16)


def step_of(iterations_unit):
    """log2(e) / beta as two float32 numbers (Triton hands Python floats over as float32)."""
    step = math.log2(math.e) / iterations_unit
    high = torch.tensor(step, dtype=torch.float32).item()
    return high, step - high


def aligned(cost):
    """The same costs with dense rows that start at multiples of 16 entries, so that four are loaded at once."""
    if cost.stride(2) == 1 and cost.stride(1) % 16 == 0 and cost.stride(0) % 16 == 0 and cost.data_ptr() % 16 == 0:
        return cost
    return torch.nn.functional.pad(cost, (0, -cost.shape[2] % 16))


def pads(*masks):
    return [mask.contiguous().view(torch.uint8) for mask in masks]

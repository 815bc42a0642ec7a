"""Sinkhorn for Triton: entropic transport plans, one program a pair, with the numbers and sums of `kernels/ipot.py`.

    K = exp(-C/epsilon);  v = 1;  repeat:  u_i = mu_i / sum_j K_ij v_j,  v_j = nu_j / sum_i u_i K_ij
    T = diag(u) K diag(v);  error = sum_i |u_i sum_j K_ij v_j - mu_i|   (sums that the next u needs anyway)
    <C, T> + epsilon KL(T || mu nu^t) = epsilon sum_ij T_ij (log u_i/mu_i + log v_j/nu_j)

u and v are (whole exponent, factor) pairs and C/epsilon is split exactly, so small epsilon costs no accuracy.

Shapes: cost [B, M, N] any float, text_pad [B, M], image_pad [B, N], weights [B, M], [B, N] float32 or none.
Memory. One sweep over the costs an iteration, a tile of columns at a time with all rows: v of a tile follows from u and
goes into the next row sums at once, so only u and the row sums are kept, in registers. ViLT's 40 x 240 costs (38 KB)
stay in the L1 cache. Nothing but the results is written. A pair stops at its own tolerance. Padding is never read.
"""

import torch
import triton
import triton.language as tl

from . import _aot, _device, ipot
from .ipot import (
    LOWEST,
    add_text_sums,
    image_top,
    image_total,
    is_real,
    load_cost,
    normal,
    plan_of,
    some,
    store_plan,
)  # fmt: skip


@triton.jit
def _share(weight, real, pair, at, size):
    """(what is real, its weight); what weighs nothing is not real."""
    if weight is None:
        share = real.to(tl.float32)
    else:
        share = tl.load(weight + pair.to(tl.int64) * size + at, mask=real, other=0.0)
        real = real & (share != 0.0)
    return real, share


@triton.jit(do_not_specialize=["M", "N"])
def _sinkhorn_fwd_kernel(
    cost, text_pad, image_pad, text_weight, image_weight, plan, value, used, error, M, N, stride_b, stride_m,
    step_high, step_low, iterations, tolerance, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    rows = tl.arange(0, BLOCK_M)
    text_real, mu = _share(text_weight, is_real(text_pad, pair, rows, M), pair, rows, M)
    mu_sum = tl.sum(mu, 0)
    mu /= some(mu_sum)
    nu_sum = 0.0
    for first in range(0, N, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        _, nu = _share(image_weight, is_real(image_pad, pair, columns, N), pair, columns, N)
        nu_sum += tl.sum(nu, 0)
    empty = (mu_sum == 0.0) | (nu_sum == 0.0)
    per_nu = 1.0 / some(nu_sum)
    step = tl.cast(step_high, tl.float64) + tl.cast(step_low, tl.float64)
    cost += pair.to(tl.int64) * stride_b
    tops = tl.where(text_real, LOWEST, LOWEST)
    totals = tl.where(text_real, 0.0, 0.0)
    for first in range(0, N, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        image_real, nu = _share(image_weight, is_real(image_pad, pair, columns, N), pair, columns, N)
        tile = load_cost(cost, rows, columns, stride_m, text_real, image_real)
        tops, totals = add_text_sums(tops, totals, tile, step, tl.where(image_real, 0.0, 0.0), nu * 0.0 + 1.0)
    u_exponent = tl.where(text_real, 0.0, 0.0)
    u = u_exponent
    missing = 0.0
    done = 0
    running = empty == 0
    while (done < iterations) & running:
        u_exponent, u = normal(-tops, tl.where(text_real, mu, 1.0) / some(totals))
        tops = tl.where(text_real, LOWEST, LOWEST)
        totals = tl.where(text_real, 0.0, 0.0)
        for first in range(0, N, BLOCK_N):
            columns = first + tl.arange(0, BLOCK_N)
            image_real, nu = _share(image_weight, is_real(image_pad, pair, columns, N), pair, columns, N)
            tile = load_cost(cost, rows, columns, stride_m, text_real, image_real)
            top = image_top(tile, step, u_exponent)
            v = tl.where(image_real, nu * per_nu, 0.0) / some(image_total(tile, step, u_exponent, u, top))
            tops, totals = add_text_sums(tops, totals, tile, step, -top, v)
        row_sums = u * totals * tl.exp2(tl.where(text_real, u_exponent + tops, 0.0))
        missing = tl.sum(tl.where(text_real, tl.abs(row_sums - mu), 0.0), 0)
        done += 1
        running = (tolerance < 0.0) | (missing > tolerance)
    tl.store(used + pair, done)
    tl.store(error + pair, missing)

    log_u = u_exponent + tl.log2(tl.where(text_real, u / mu, 1.0))
    total = 0.0
    plan += pair.to(tl.int64) * M * N
    for first in range(0, N, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        image_real, nu = _share(image_weight, is_real(image_pad, pair, columns, N), pair, columns, N)
        tile = load_cost(cost, rows, columns, stride_m, text_real, image_real)
        top = image_top(tile, step, u_exponent)
        v = tl.where(image_real, nu * per_nu, 1.0) / some(image_total(tile, step, u_exponent, u, top))
        values = plan_of(tile, step, u_exponent, u, -top, v)
        values = tl.where(empty, 0.0, values)
        store_plan(plan, rows, columns, M, N, values)
        log_v = tl.log2(tl.where(image_real, v / (nu * per_nu), 1.0)) - top
        terms = tl.where(text_real[:, None] & image_real[None, :], values * (log_u[:, None] + log_v[None, :]), 0.0)
        total += tl.sum(tl.sum(terms, 1), 0)
    tl.store(value + pair, tl.where(empty, 0.0, total / step.to(tl.float32)))


def supports(*, device=None, dtype=None, rows=None, columns=None, unrolled=False):
    """ "" when Triton can run this, else why not."""
    if unrolled:
        return "it has no gradient through the iterations; use gradient='envelope' or another backend."
    return ipot.supports(device=device, dtype=dtype, rows=rows)


def sinkhorn_fwd(
    *, cost, text_pad, image_pad, epsilon, iterations, tolerance, text_marginal, image_marginal, keep
):  # fmt: skip
    B, M, N = cost.shape
    plan = torch.empty(cost.shape, dtype=torch.float32, device=cost.device)
    value, error = plan.new_zeros(B), plan.new_zeros(B)
    used = torch.zeros(B, dtype=torch.int64, device=cost.device)
    if plan.numel() == 0:
        return (plan, value, used, error), ()
    cost = ipot.aligned(cost)
    weights = [None if w is None else w.float().contiguous() for w in (text_marginal, image_marginal)]
    with _device.on(cost):
        _sinkhorn_fwd_kernel[(B,)](
            cost, *ipot.pads(text_pad, image_pad), *weights, plan, value, used, error, M, N, *cost.stride()[:2],
            *ipot.step_of(epsilon), iterations, -1.0 if tolerance is None else float(tolerance), **ipot.streamed(M),
        )  # fmt: skip
    return (plan, value, used, error), ()


def aot_cases():
    """Every configuration that ships, with ViLT's sizes, for the ahead-of-time report."""
    for M in (16, 24, 40, 128):
        for weighted in (False, True):
            absent = {} if weighted else dict(text_weight=None, image_weight=None)
            name = f"sinkhorn {M} rows" + " weighted" * weighted
            yield _aot.case(_sinkhorn_fwd_kernel, name, "fp32", ipot.streamed(M), **absent)

"""Sinkhorn for Triton: entropic transport plans, one program a pair, with the numbers and sums of `_transport.py`.

    K = exp(-C/epsilon);  v = 1;  repeat:  u_i = mu_i / sum_j K_ij v_j,  v_j = nu_j / sum_i u_i K_ij
    T = diag(u) K diag(v);  error = sum_i |u_i sum_j K_ij v_j - mu_i|   (sums that the next u needs anyway)
    <C, T> + epsilon KL(T || mu nu^t) = epsilon sum_ij T_ij (log u_i/mu_i + log v_j/nu_j)

u, v and the weights are (whole exponent, factor) pairs and C/epsilon is split exactly: neither small epsilon nor
weights of any size cost accuracy.

Shapes: cost [B, M, N] any float, text_pad [B, M], image_pad [B, N], weights [B, M], [B, N] float32 or none.
Memory. One sweep over the costs an iteration, a tile of columns at a time with all rows: v of a tile follows from u and
goes into the next row sums at once, so only u and the row sums are kept, in registers. ViLT's 40 x 240 costs (38 KB)
stay in the L1 cache. Nothing but the results is written. A pair stops at its own tolerance. Padding is never read.
"""

import torch
import triton
import triton.language as tl

from . import _aot, _device, ipot
from ._transport import (
    LOWEST,
    add_text_sums,
    aligned,
    image_top,
    image_total,
    is_real,
    load_cost,
    normal,
    pads,
    plan_of,
    some,
    step_of,
    store_plan,
    streamed,
)  # fmt: skip


@triton.jit
def _parts(x):
    """(exponent, factor in [1, 2)) of positive numbers, (LOWEST, 0) of 0; of the bits, for a GPU may take a subnormal
    number for 0. What is not finite stays so."""
    bits = x.to(tl.int32, bitcast=True)
    subnormal = (bits & 0x7F800000) == 0
    number = tl.where(subnormal, (bits & 0x7FFFFF).to(tl.float32).to(tl.int32, bitcast=True), bits)
    exponent = ((number >> 23) & 0xFF) - tl.where(subnormal, 127 + 149, 127)
    factor = ((number & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    none = (bits & 0x7FFFFFFF) == 0
    exponent, factor = tl.where(none, LOWEST, exponent.to(tl.float32)), tl.where(none, 0.0, factor)
    return exponent, tl.where((bits & 0x7F800000) == 0x7F800000, x, factor)


@triton.jit
def _share(weight, real, pair, at, size):
    """(what is real, exponent and factor of its weight); what weighs nothing is not real."""
    if weight is None:
        exponent, factor = tl.where(real, 0.0, LOWEST), real.to(tl.float32)
    else:
        exponent, factor = _parts(tl.load(weight + pair.to(tl.int64) * size + at, mask=real, other=0.0))
        real = real & (factor != 0.0)
    return real, exponent, factor


@triton.jit(do_not_specialize=["M", "N"])
def _sinkhorn_fwd_kernel(
    cost, text_pad, image_pad, text_weight, image_weight, plan, value, used, error, M, N, stride_b, stride_m,
    step_high, step_low, iterations, tolerance, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    rows = tl.arange(0, BLOCK_M)
    text_real, mu_exponent, mu = _share(text_weight, is_real(text_pad, pair, rows, M), pair, rows, M)
    mu_top = tl.max(mu_exponent, 0)
    mu_sum = tl.sum(mu * tl.exp2(mu_exponent - mu_top), 0)
    mu_exponent = tl.where(text_real, mu_exponent - mu_top, 0.0)
    mu = tl.where(text_real, mu, 1.0) / some(mu_sum)
    nu_top = mu_top * 0.0 + LOWEST
    nu_sum = 0.0
    for first in range(0, N, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        _, nu_exponent, nu = _share(image_weight, is_real(image_pad, pair, columns, N), pair, columns, N)
        new_top = tl.maximum(nu_top, tl.max(nu_exponent, 0))
        nu_sum = nu_sum * tl.exp2(nu_top - new_top) + tl.sum(nu * tl.exp2(nu_exponent - new_top), 0)
        nu_top = new_top
    empty = (mu_sum == 0.0) | (nu_sum == 0.0)
    per_nu = 1.0 / some(nu_sum)
    text_share = tl.where(text_real, mu * tl.exp2(mu_exponent), 0.0)
    step = tl.cast(step_high, tl.float64) + tl.cast(step_low, tl.float64)
    cost += pair.to(tl.int64) * stride_b
    tops = tl.where(text_real, LOWEST, LOWEST)
    totals = tl.where(text_real, 0.0, 0.0)
    for first in range(0, N, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        image_real, nu_exponent, nu = _share(image_weight, is_real(image_pad, pair, columns, N), pair, columns, N)
        tile = load_cost(cost, rows, columns, stride_m, text_real, image_real)
        tops, totals = add_text_sums(tops, totals, tile, step, nu_exponent * 0.0, nu * 0.0 + 1.0)
    u_exponent = tl.where(text_real, 0.0, 0.0)
    u = u_exponent
    missing = 0.0
    done = 0
    running = empty == 0
    while (done < iterations) & running:
        u_exponent, u = normal(mu_exponent - tops, mu / some(totals))
        tops = tl.where(text_real, LOWEST, LOWEST)
        totals = tl.where(text_real, 0.0, 0.0)
        for first in range(0, N, BLOCK_N):
            columns = first + tl.arange(0, BLOCK_N)
            image_real, nu_exponent, nu = _share(image_weight, is_real(image_pad, pair, columns, N), pair, columns, N)
            tile = load_cost(cost, rows, columns, stride_m, text_real, image_real)
            top = image_top(tile, step, u_exponent)
            v = tl.where(image_real, nu * per_nu, 0.0) / some(image_total(tile, step, u_exponent, u, top))
            nu_exponent = tl.where(image_real, nu_exponent - nu_top, 0.0)
            tops, totals = add_text_sums(tops, totals, tile, step, nu_exponent - top, v)
        row_sums = u * totals * tl.exp2(tl.where(text_real, u_exponent + tops, 0.0))
        missing = tl.sum(tl.where(text_real, tl.abs(row_sums - text_share), 0.0), 0)
        done += 1
        running = (tolerance < 0.0) | (missing > tolerance)
    tl.store(used + pair, done)
    tl.store(error + pair, missing)

    log_u = u_exponent - mu_exponent + tl.log2(tl.where(text_real, u / mu, 1.0))
    total = 0.0
    plan += pair.to(tl.int64) * M * N
    for first in range(0, N, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        image_real, nu_exponent, nu = _share(image_weight, is_real(image_pad, pair, columns, N), pair, columns, N)
        tile = load_cost(cost, rows, columns, stride_m, text_real, image_real)
        top = image_top(tile, step, u_exponent)
        v = tl.where(image_real, nu * per_nu, 1.0) / some(image_total(tile, step, u_exponent, u, top))
        nu_exponent = tl.where(image_real, nu_exponent - nu_top, 0.0)
        values = plan_of(tile, step, u_exponent, u, nu_exponent - top, v)
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
    cost = aligned(cost)
    weights = [None if w is None else w.float().contiguous() for w in (text_marginal, image_marginal)]
    with _device.on(cost):
        _sinkhorn_fwd_kernel[(B,)](
            cost, *pads(text_pad, image_pad), *weights, plan, value, used, error, M, N, *cost.stride()[:2],
            *step_of(epsilon), iterations, -1.0 if tolerance is None else float(tolerance), **streamed(M),
        )  # fmt: skip
    return (plan, value, used, error), ()


def aot_cases():
    """Every configuration that ships, with ViLT's sizes, for the ahead-of-time report."""
    for M in (16, 24, 40, 128):
        for weighted in (False, True):
            absent = {} if weighted else dict(text_weight=None, image_weight=None)
            name = f"sinkhorn {M} rows" + " weighted" * weighted
            yield _aot.case(_sinkhorn_fwd_kernel, name, "fp32", streamed(M), **absent)

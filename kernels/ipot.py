"""IPOT for Triton: transport plans of the inexact proximal point method, one program a pair.

With A = exp(-C/beta), M words and N patches, the recurrence of `reference/ipot.py` has the closed form

    T_t = diag(u) A^t diag(v)          (A^t entry by entry)
    iteration t:  v_j = 1 / (N sum_i a_i A_ij^t),   u'_i = 1 / (M sum_j A_ij^t v_j),   a = u'^2 / u,   u = u'

starting from u = 1, a = 1/M (a carries sigma over; with `inner` > 1 the further steps use a = u'). So the only matrix
that changes is A^t, and the state is a, u and v.

Numbers. t C/beta reaches 1e5, where float32 has lost the fraction. So everything is a power of two times a factor near
one: t C log2(e)/beta = whole + fraction is split exactly (`split_exponent`), u and v are (exponent, factor) pairs whose
exponents are whole numbers, and exponents add without rounding. float32 throughout, no float64 matrices.

Two loops:
  linear   while t C/beta moves little in an iteration, q = A^t is updated by one multiplication an entry and u, v are
           plain numbers; every `window` iterations, and for the last, q is rebuilt from the exponents.
           Three operations an entry and iteration, no exponential.
  scaled   for small beta: each sum takes its largest exponent out first. Two exponentials an entry and iteration.

Memory. Up to 40 x 256 (ViLT's 40 words x 240 patches), costs are read once and stay in registers for all iterations, as
two tiles of rows, 32 + 8: one tile of 64 rows would spill. Larger pairs are streamed: a tile of columns at a time with
all its rows, one sweep an iteration, read only (v of a tile follows from a, so it is never stored). Padding is never
read. float32 plan [B, M, N] out, zero on padding.
"""

import torch
import triton
import triton.language as tl

from . import _aot, _device
from ._transport import (
    LOWEST,
    add_text_sums,
    aligned,
    count,
    furthest,
    image_top,
    image_total,
    is_real,
    load_cost,
    normal,
    pads,
    plan_of,
    power,
    some,
    step_of,
    store_plan,
    store_scaling,
    streamed,
    text_top,
    text_total,
)  # fmt: skip

REACH = tl.constexpr(24.0)  # by how many powers of two q may shrink between two rebuilds
LONGEST = tl.constexpr(16)  # iterations between two rebuilds
MAX_ROWS = 128


# --- the two loops, on a pair whose rows lie in two tiles, c and d ----------------------------------------------------


@triton.jit
def _linear(c, d, uc_exponent, ud_exponent, v_exponent, m, n, step, window, iterations, inner):
    uc = uc_exponent + 1.0
    ud = ud_exponent + 1.0
    v = v_exponent + 1.0
    ac = uc_exponent + 1.0 / m
    ad = ud_exponent + 1.0 / m
    done = 0
    while done < iterations:
        shift = tl.floor(tl.log2(uc))  # move whole powers of two from the factors into the exponents
        uc_exponent += shift
        uc *= tl.exp2(-shift)
        ac *= tl.exp2(-shift)
        shift = tl.floor(tl.log2(ud))
        ud_exponent += shift
        ud *= tl.exp2(-shift)
        ad *= tl.exp2(-shift)
        v_exponent += tl.floor(tl.log2(v))
        qc = power(c, step * (done + 1), uc_exponent, v_exponent)
        qd = power(d, step * (done + 1), ud_exponent, v_exponent)
        stop = tl.minimum(done + window, tl.maximum(iterations - 1, done + 1))  # the last iteration has a new q
        for _ in range(done, stop):
            for _ in range(inner):
                v = 1.0 / (n * some(tl.sum(qc * ac[:, None], 0) + tl.sum(qd * ad[:, None], 0)))
                ac = 1.0 / (m * some(tl.sum(qc * v[None, :], 1)))
                ad = 1.0 / (m * some(tl.sum(qd * v[None, :], 1)))
            new = ac
            ac *= new / uc
            uc = new
            new = ad
            ad *= new / ud
            ud = new
            qc *= tl.exp2(-c * step.to(tl.float32))
            qd *= tl.exp2(-d * step.to(tl.float32))
        done = stop
    return uc_exponent, uc, ud_exponent, ud, v_exponent, v


@triton.jit
def _carried(u_exponent, u, new_exponent, new):
    """u' and u'^2 / u: what u and a are after an iteration."""
    return new_exponent, new, 2.0 * new_exponent - u_exponent, new * (new / u)


@triton.jit
def _scaled(c, d, uc_exponent, ud_exponent, v_exponent, m, n, step, iterations, inner):
    uc = uc_exponent + 1.0
    ud = ud_exponent + 1.0
    v = v_exponent + 1.0
    ac_exponent = uc_exponent
    ad_exponent = ud_exponent
    ac = uc_exponent + 1.0 / m
    ad = ud_exponent + 1.0 / m
    for k in range(iterations * inner):  # one loop, lest compilers keep for inner steps what does not change in them
        now = step * (k // inner + 1)
        top = tl.maximum(image_top(c, now, ac_exponent), image_top(d, now, ad_exponent))
        total = image_total(c, now, ac_exponent, ac, top) + image_total(d, now, ad_exponent, ad, top)
        v_exponent = -top
        v = 1.0 / (n * some(total))
        top = text_top(c, now, v_exponent)
        ac_exponent, ac = normal(-top, 1.0 / (m * some(text_total(c, now, v_exponent, v, top))))
        top = text_top(d, now, v_exponent)
        ad_exponent, ad = normal(-top, 1.0 / (m * some(text_total(d, now, v_exponent, v, top))))
        if k % inner == inner - 1:
            uc_exponent, uc, ac_exponent, ac = _carried(uc_exponent, uc, ac_exponent, ac)
            ud_exponent, ud, ad_exponent, ad = _carried(ud_exponent, ud, ad_exponent, ad)
    return uc_exponent, uc, ud_exponent, ud, v_exponent, v


@triton.jit
def transport(c, d, text_c, text_d, image_real, step, iterations, inner, LOOP: tl.constexpr):
    """u of both tiles and v after all iterations, as (exponent, factor) pairs.

    c, d: costs in registers, FAR on padding; text_c, text_d, image_real: which rows and columns are real.
    LOOP: "linear" (only if 2 steps are at most REACH), "scaled", or "either": the costs decide.
    """
    m = tl.maximum(count(text_c) + count(text_d), 1.0)
    n = tl.maximum(count(image_real), 1.0)
    uc_exponent = tl.where(text_c, 0.0, 0.0)
    ud_exponent = tl.where(text_d, 0.0, 0.0)
    v_exponent = tl.where(image_real, 0.0, 0.0)
    reach = tl.maximum(furthest(c), furthest(d)) * step.to(tl.float32)  # powers of two an iteration can move an entry
    window = tl.minimum(REACH / tl.maximum(reach, 1.0), LONGEST)
    window = tl.where(window >= 1.0, window, 1.0).to(tl.int32)  # NaN, of a cost that is NaN, is no number of iterations
    if LOOP == "linear":
        return _linear(c, d, uc_exponent, ud_exponent, v_exponent, m, n, step, window, iterations, inner)
    elif LOOP == "scaled":
        return _scaled(c, d, uc_exponent, ud_exponent, v_exponent, m, n, step, iterations, inner)
    else:
        if reach <= REACH:
            uc_exponent, uc, ud_exponent, ud, v_exponent, v = _linear(
                c, d, uc_exponent, ud_exponent, v_exponent, m, n, step, window, iterations, inner
            )
        else:
            uc_exponent, uc, ud_exponent, ud, v_exponent, v = _scaled(
                c, d, uc_exponent, ud_exponent, v_exponent, m, n, step, iterations, inner
            )
        return uc_exponent, uc, ud_exponent, ud, v_exponent, v


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["M", "N"])
def _ipot_fwd_kernel(
    cost, text_pad, image_pad, plan, scaling, M, N, stride_b, stride_m, step_high, step_low, iterations, inner,
    BLOCK_M: tl.constexpr, BLOCK_M2: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The whole pair in two tiles, [BLOCK_M, BLOCK_N] and [BLOCK_M2, BLOCK_N]."""
    pair = tl.program_id(0)
    c_rows = tl.arange(0, BLOCK_M)
    d_rows = BLOCK_M + tl.arange(0, BLOCK_M2)
    columns = tl.arange(0, BLOCK_N)
    text_c = is_real(text_pad, pair, c_rows, M)
    text_d = is_real(text_pad, pair, d_rows, M)
    image_real = is_real(image_pad, pair, columns, N)
    cost += pair.to(tl.int64) * stride_b
    c = load_cost(cost, c_rows, columns, stride_m, text_c, image_real)
    d = load_cost(cost, d_rows, columns, stride_m, text_d, image_real)
    step = tl.cast(step_high, tl.float64) + tl.cast(step_low, tl.float64)
    uc_exponent, uc, ud_exponent, ud, v_exponent, v = transport(
        c, d, text_c, text_d, image_real, step, iterations, inner, "either"
    )
    store_scaling(scaling, pair * (M + N), c_rows, M, uc_exponent, uc)
    store_scaling(scaling, pair * (M + N), d_rows, M, ud_exponent, ud)
    plan += pair.to(tl.int64) * M * N
    store_plan(plan, c_rows, columns, M, N, plan_of(c, step * iterations, uc_exponent, uc, v_exponent, v))
    store_plan(plan, d_rows, columns, M, N, plan_of(d, step * iterations, ud_exponent, ud, v_exponent, v))


@triton.jit(do_not_specialize=["M", "N"])
def _ipot_fwd_streamed_kernel(
    cost, text_pad, image_pad, plan, scaling, M, N, stride_b, stride_m, step_high, step_low, iterations, inner,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All rows, BLOCK_N columns at a time, read again in every iteration."""
    pair = tl.program_id(0)
    rows = tl.arange(0, BLOCK_M)
    text_real = is_real(text_pad, pair, rows, M)
    m = tl.maximum(count(text_real), 1.0)
    n = 0.0
    for first in range(0, N, BLOCK_N):
        n += count(is_real(image_pad, pair, first + tl.arange(0, BLOCK_N), N))
    n = tl.maximum(n, 1.0)
    step = tl.cast(step_high, tl.float64) + tl.cast(step_low, tl.float64)
    cost += pair.to(tl.int64) * stride_b
    u_exponent = tl.where(text_real, 0.0, 0.0)
    u = u_exponent + 1.0
    a_exponent = u_exponent
    a = u_exponent + 1.0 / m
    used_exponent = a_exponent
    used = a
    for k in range(iterations * inner):  # one loop, as in _scaled
        now = step * (k // inner + 1)
        text_tops = tl.where(text_real, LOWEST, LOWEST)
        text_totals = tl.where(text_real, 0.0, 0.0)
        for first in range(0, N, BLOCK_N):
            columns = first + tl.arange(0, BLOCK_N)
            tile = load_cost(cost, rows, columns, stride_m, text_real, is_real(image_pad, pair, columns, N))
            top = image_top(tile, now, a_exponent)
            v = 1.0 / (n * some(image_total(tile, now, a_exponent, a, top)))
            text_tops, text_totals = add_text_sums(text_tops, text_totals, tile, now, -top, v)
        used_exponent = a_exponent
        used = a
        a_exponent, a = normal(-text_tops, 1.0 / (m * some(text_totals)))
        if k % inner == inner - 1:
            u_exponent, u, a_exponent, a = _carried(u_exponent, u, a_exponent, a)
    store_scaling(scaling, pair * (M + N), rows, M, u_exponent, u)
    now = step * iterations
    plan += pair.to(tl.int64) * M * N
    for first in range(0, N, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        tile = load_cost(cost, rows, columns, stride_m, text_real, is_real(image_pad, pair, columns, N))
        top = image_top(tile, now, used_exponent)
        v = 1.0 / (n * some(image_total(tile, now, used_exponent, used, top)))
        store_plan(plan, rows, columns, M, N, plan_of(tile, now, u_exponent, u, -top, v))


# --- launchers --------------------------------------------------------------------------------------------------------


def supports(*, device=None, dtype=None, rows=None, columns=None):
    """ "" when Triton can run this, else why not."""
    if reason := _device.problem(device, cost=dtype):
        return reason
    if rows is not None and rows > MAX_ROWS:
        return f"there are {rows} text tokens, at most {MAX_ROWS}; swap text and image or use backend='reference'."
    return ""


def config(M, N, smallest=8):
    """(on chip?, tiles and warps) for a pair of M x N; no tile has fewer rows than `smallest`."""
    if N <= 256 and M <= 32 + smallest:
        block_m = 16 if M <= 32 else 32
        rest = 16 if M <= 32 else smallest  # 16 + 8 rows would tempt ptxas to trade spills for occupancy
        block_n, warps = (128, 4) if N <= 128 else (256, 8)
        return True, dict(BLOCK_M=block_m, BLOCK_M2=rest, BLOCK_N=block_n, num_warps=warps)
    return False, streamed(M)


def ipot_fwd(*, cost, text_pad, image_pad, beta, iterations, inner, keep):
    plan = launch(cost, text_pad, image_pad, beta=beta, iterations=iterations, inner=inner, scaling=None)
    return (plan,), ()


def launch(cost, text_pad, image_pad, *, beta, iterations, inner, scaling):
    """plan [B, M, N] float32. scaling: None, or a tensor [B, M + N, 2] whose first M rows are to hold u, as
    (exponent, factor) pairs."""
    B, M, N = cost.shape
    plan = torch.empty(cost.shape, dtype=torch.float32, device=cost.device)
    if plan.numel() == 0:
        return plan
    cost = aligned(cost)
    on_chip, options = config(M, N)
    kernel = _ipot_fwd_kernel if on_chip else _ipot_fwd_streamed_kernel
    with _device.on(cost):
        kernel[(B,)](
            cost, *pads(text_pad, image_pad), plan, scaling, M, N, *cost.stride()[:2], *step_of(beta), iterations,
            inner, **options,
        )  # fmt: skip
    return plan


def aot_cases():
    """Every configuration that ships, with ViLT's sizes, for the ahead-of-time report."""
    for M, N in ((40, 240), (32, 240), (16, 100), (64, 500), (128, 1024)):
        on_chip, options = config(M, N)
        kernel = _ipot_fwd_kernel if on_chip else _ipot_fwd_streamed_kernel
        yield _aot.case(kernel, f"ipot {M}x{N}", "fp32", options, scaling=None)

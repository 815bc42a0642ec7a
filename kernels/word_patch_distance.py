"""Word-patch alignment distance for Triton: from hidden states to distances in one kernel, and its gradient in another.

    C_ij = 1 - cos(t_i, v_j), norms at least 1e-5;   T = ipot(C);   distance = sum_ij C_ij T_ij
    backward, T constant:   W = dL/d distance * T
      dt_i = -(sum_j W_ij v^_j - (sum_j W_ij cos_ij) t^_i) / |t_i|   and the same for v_j;  x^ = x / max(|x|, 1e-5)
      (where the norm is clamped, x^ does not turn and the second term is not there)

Shapes: text [B, M, D], image [B, N, D] float32, float16 or bfloat16, dense rows, stride_d = D apart; M at most 48 and
N at most 256.
Memory. Forward: tiles of D go through `tl.dot`, cosines stay in registers (two tiles of rows, as in `kernels/ipot.py`),
where all iterations happen: neither costs nor plan are written. Kept for the backward are u of T = diag(u) A^t diag(v)
and what each patch receives, r_j = sum_i T_ij: M pairs of numbers and N numbers instead of M N. The backward computes
the cosines again, a tile of patches at a time, and without iterating T_ij = r_j softmax_i(log u_i - t C_ij / beta). (v
would do for r_j, were it not for t / beta, which magnifies any difference in rounding between the two costs; a softmax
over the few words that share a patch takes most of it away.) A program has a share of D: its part of the text gradient
stays in registers, the image gradient is complete after each tile. Half precision takes T as the sum of two halves, so
that nothing is lost. Larger pairs write their costs: torch for the products, the streamed `ipot` kernel for the plan.
No atomics; padding is never read.
"""

import math

import torch
import triton
import triton.language as tl

from ..reference.word_patch_distance import cosine_cost
from . import _aot, _device, ipot
from ._tiles import cdiv
from ._transport import (
    FAR,
    LOWEST,
    image_top,
    is_real,
    pads,
    plan_of,
    power,
    some,
    step_of,
    store_plan,
    store_scaling,
)  # fmt: skip
from .ipot import transport

MAX_COST = 2.0


@triton.jit
def _rows(base, rows, real, columns, stride_d):
    """Rows of hidden states, zero on padding."""
    at = base + (rows[:, None] * stride_d + columns[None, :])
    return tl.load(at, mask=real[:, None] & (columns[None, :] < stride_d), other=0.0)


@triton.jit
def _squares(x):
    x = x.to(tl.float32)
    return tl.sum(x * x, 1)


@triton.jit
def _per_norm(squares):
    return 1.0 / tl.maximum(tl.sqrt(squares), 1e-5)


@triton.jit
def _cosines(
    text, image, c_rows, d_rows, columns, text_c, text_d, image_real, stride_d, BLOCK_M: tl.constexpr,
    BLOCK_M2: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """cos of both tiles."""
    c = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    d = tl.zeros([BLOCK_M2, BLOCK_N], tl.float32)
    c_squares = tl.zeros([BLOCK_M], tl.float32)
    d_squares = tl.zeros([BLOCK_M2], tl.float32)
    squares = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, stride_d, BLOCK_D):
        depth = first + tl.arange(0, BLOCK_D)
        words_c = _rows(text, c_rows, text_c, depth, stride_d)
        words_d = _rows(text, d_rows, text_d, depth, stride_d)
        patches = _rows(image, columns, image_real, depth, stride_d)
        c_squares += _squares(words_c)
        d_squares += _squares(words_d)
        squares += _squares(patches)
        c = tl.dot(words_c, tl.trans(patches), c, input_precision=PRECISION)
        d = tl.dot(words_d, tl.trans(patches), d, input_precision=PRECISION)
    per = _per_norm(squares)
    return c * _per_norm(c_squares)[:, None] * per[None, :], d * _per_norm(d_squares)[:, None] * per[None, :]


@triton.jit(do_not_specialize=["M", "N"])
def _word_patch_distance_fwd_kernel(
    text, image, text_pad, image_pad, distance, plan, scaling, M, N, stride_d, step_high, step_low, iterations, inner,
    BLOCK_M: tl.constexpr, BLOCK_M2: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    c_rows = tl.arange(0, BLOCK_M)
    d_rows = BLOCK_M + tl.arange(0, BLOCK_M2)
    columns = tl.arange(0, BLOCK_N)
    text_c = is_real(text_pad, pair, c_rows, M)
    text_d = is_real(text_pad, pair, d_rows, M)
    image_real = is_real(image_pad, pair, columns, N)
    text += pair.to(tl.int64) * M * stride_d
    image += pair.to(tl.int64) * N * stride_d
    c, d = _cosines(
        text, image, c_rows, d_rows, columns, text_c, text_d, image_real, stride_d, BLOCK_M, BLOCK_M2, BLOCK_N,
        BLOCK_D, PRECISION,
    )  # fmt: skip
    c = tl.where(text_c[:, None] & image_real[None, :], 1.0 - c, FAR)
    d = tl.where(text_d[:, None] & image_real[None, :], 1.0 - d, FAR)
    step = tl.cast(step_high, tl.float64) + tl.cast(step_low, tl.float64)
    uc_exponent, uc, ud_exponent, ud, v_exponent, v = transport(
        c, d, text_c, text_d, image_real, step, iterations, inner, LOOP
    )
    store_scaling(scaling, pair * (M + N), c_rows, M, uc_exponent, uc)
    store_scaling(scaling, pair * (M + N), d_rows, M, ud_exponent, ud)
    plan_c = plan_of(c, step * iterations, uc_exponent, uc, v_exponent, v)
    plan_d = plan_of(d, step * iterations, ud_exponent, ud, v_exponent, v)
    received = tl.sum(plan_c, 0) + tl.sum(plan_d, 0)
    store_scaling(scaling, pair * (M + N) + M, columns, N, received * 0.0, received)
    total = tl.sum(tl.sum(plan_c * c, 1), 0) + tl.sum(tl.sum(plan_d * d, 1), 0)
    tl.store(distance + pair, total)
    if plan is not None:
        plan += pair.to(tl.int64) * M * N
        store_plan(plan, c_rows, columns, M, N, plan_c)
        store_plan(plan, d_rows, columns, M, N, plan_d)


@triton.jit
def _load_scaling(scaling, first, at, size):
    where = scaling + (first.to(tl.int64) + at) * 2
    return tl.load(where, mask=at < size, other=0.0), tl.load(where + 1, mask=at < size, other=0.0)


@triton.jit
def _halves(x, top, dtype: tl.constexpr):
    """x / top as the sum of two numbers of `dtype`."""
    x = x / tl.where(top == 0.0, 1.0, top)
    high = x.to(dtype)
    return high, (x - high.to(tl.float32)).to(dtype)


@triton.jit
def _product(high, low, states, PRECISION: tl.constexpr, SPLIT: tl.constexpr):
    result = tl.dot(high, states, input_precision=PRECISION)
    if SPLIT:
        result = tl.dot(low, states, result)
    return result


@triton.jit
def _store_rows(base, rows, real, size, columns, stride_d, values):
    at = base + (rows[:, None] * stride_d + columns[None, :])
    values = tl.where(real[:, None], values, 0.0).to(base.dtype.element_ty)
    tl.store(at, values, mask=(rows[:, None] < size) & (columns[None, :] < stride_d))


@triton.jit(do_not_specialize=["M", "N"])
def _word_patch_distance_bwd_kernel(
    gradient, text, image, text_pad, image_pad, scaling, d_text, d_image, M, N, stride_d, step_high, step_low,
    iterations, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SHARE: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Program (pair, s) writes columns s SHARE to (s + 1) SHARE of both gradients, BLOCK_N patches at a time."""
    pair = tl.program_id(0)
    rows = tl.arange(0, BLOCK_M)
    share = tl.program_id(1) * SHARE + tl.arange(0, SHARE)
    text_real = is_real(text_pad, pair, rows, M)
    text += pair.to(tl.int64) * M * stride_d
    image += pair.to(tl.int64) * N * stride_d
    d_text += pair.to(tl.int64) * M * stride_d
    d_image += pair.to(tl.int64) * N * stride_d
    step = (tl.cast(step_high, tl.float64) + tl.cast(step_low, tl.float64)) * iterations
    u_exponent, u = _load_scaling(scaling, pair * (M + N), rows, M)
    u_exponent = tl.where(text_real, u_exponent, LOWEST)
    u = tl.where(text_real, u, 0.0)
    g = -tl.load(gradient + pair)
    dtype: tl.constexpr = text.dtype.element_ty
    limit = 0.999999 * 1e5  # one over a norm that was clamped
    words_share = _rows(text, rows, text_real, share, stride_d)
    text_squares = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, stride_d, BLOCK_D):
        text_squares += _squares(_rows(text, rows, text_real, first + tl.arange(0, BLOCK_D), stride_d))
    per_text = _per_norm(text_squares)
    moved_text = tl.zeros([BLOCK_M, SHARE], tl.float32)
    turn_text = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, N, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        image_real = is_real(image_pad, pair, columns, N)
        cos = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        squares = tl.zeros([BLOCK_N], tl.float32)
        for first in range(0, stride_d, BLOCK_D):
            depth = first + tl.arange(0, BLOCK_D)
            patches = _rows(image, columns, image_real, depth, stride_d)
            squares += _squares(patches)
            words = _rows(text, rows, text_real, depth, stride_d)
            cos = tl.dot(words, tl.trans(patches), cos, input_precision=PRECISION)
        per_image = _per_norm(squares)
        cos = cos * per_text[:, None] * per_image[None, :]  # rounded as in the forward
        _, received = _load_scaling(scaling, pair * (M + N) + M, columns, N)
        costs = 1.0 - cos
        weights = u[:, None] * power(costs, step, u_exponent, -image_top(costs, step, u_exponent))
        plan = weights * (received / some(tl.sum(weights, 0)))[None, :]
        plan = tl.where(image_real[None, :], plan, 0.0)
        turn_text += tl.sum(plan * cos, 1)
        turn = tl.where(per_image < limit, tl.sum(plan * cos, 0) * per_image, 0.0)

        patches = _rows(image, columns, image_real, share, stride_d)
        weights = plan * per_image[None, :]
        top = tl.max(weights, 1)
        high, low = _halves(weights, top[:, None], dtype)
        moved_text += _product(high, low, patches, PRECISION, SPLIT) * top[:, None]
        weights = plan * per_text[:, None]
        top = tl.max(weights, 0)
        high, low = _halves(weights, top[None, :], dtype)
        moved = _product(tl.trans(high), tl.trans(low), words_share, PRECISION, SPLIT) * top[:, None]
        moved = g * per_image[:, None] * (moved - turn[:, None] * patches.to(tl.float32))
        _store_rows(d_image, columns, image_real, N, share, stride_d, moved)
    turn_text = tl.where(per_text < limit, turn_text * per_text, 0.0)
    moved_text = g * per_text[:, None] * (moved_text - turn_text[:, None] * words_share.to(tl.float32))
    _store_rows(d_text, rows, text_real, M, share, stride_d, moved_text)


# --- launchers --------------------------------------------------------------------------------------------------------


def supports(*, device=None, dtype=None, rows=None, columns=None, hidden=None, requires_grad=False):
    """ "" when Triton can run this, else why not."""
    if reason := _device.problem(device, **{"text and image": dtype}):
        return reason
    return ipot.supports(device=device, rows=rows)


def config(M, N, half):
    """(on chip?, tiles and warps) of the forward."""
    on_chip, options = ipot.config(M, N, smallest=16)  # tl.dot wants 16 rows
    return on_chip, options | dict(BLOCK_D=32 if half else 16, num_stages=2)


def bwd_config(M, half):
    """Tiles and warps of the backward, for M up to 48; SHARE columns of the hidden states a program."""
    block_m = 16 if M <= 16 else 64  # with 32 rows, ptxas trades a few registers for occupancy and spills
    tiles = dict(BLOCK_M=block_m, BLOCK_N=16, BLOCK_D=32 if half else 16, SHARE=64 if half else 32)
    return dict(tiles, num_warps=4, num_stages=1)


def _loop(beta):
    return "linear" if MAX_COST * 1.001 * sum(step_of(beta)) <= ipot.REACH.value else "scaled"


def word_patch_distance_fwd(
    *, text, image, text_pad, image_pad, beta, iterations, inner, return_plan, keep
):  # fmt: skip
    """Kept are u and r, [B, M + N, 2] float32: u in (exponent, factor) pairs, r in their factors."""
    (B, M, D), N = text.shape, image.shape[1]
    numbers = dict(dtype=torch.float32, device=text.device)
    scaling = torch.empty(B, M + N, 2, **numbers)
    plan = torch.empty((B, M, N) if return_plan else 0, **numbers)
    if M == 0 or N == 0:
        return (torch.zeros(B, **numbers), plan), (scaling,) if keep else ()
    on_chip, options = config(M, N, text.element_size() == 2)
    if not on_chip:
        cost = cosine_cost(text, image, text_pad, image_pad)
        options = dict(beta=beta, iterations=iterations, inner=inner, scaling=scaling)
        written = ipot.launch(cost, text_pad, image_pad, **options)
        scaling[:, M:, 1] = written.sum(1)
        return ((cost * written).sum((1, 2)), written if return_plan else plan), (scaling,) if keep else ()
    distance = torch.empty(B, **numbers)
    with _device.on(text):
        _word_patch_distance_fwd_kernel[(B,)](
            text.contiguous(), image.contiguous(), *pads(text_pad, image_pad), distance,
            plan if return_plan else None, scaling, M, N, D, *step_of(beta), iterations, inner,
            PRECISION=_device.precision(_device.arch(text)), LOOP=_loop(beta), **options,
        )  # fmt: skip
    return (distance, plan), (scaling,) if keep else ()


def word_patch_distance_bwd(
    *, needs, grad_distance, text, image, text_pad, image_pad, plan, state, beta, iterations
):  # fmt: skip
    """Both gradients come out of one kernel, whatever is needed; state: what the forward kept."""
    (B, M, D), N = text.shape, image.shape[1]
    if M == 0 or N == 0:
        return (text.new_zeros(text.shape), image.new_zeros(image.shape)), ()
    on_chip, _ = config(M, N, text.element_size() == 2)
    if not on_chip:
        return _large_bwd(grad_distance, text, image, text_pad, image_pad, state, beta, iterations), ()
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (text, image)]
    options = bwd_config(M, text.element_size() == 2)
    with _device.on(text):
        _word_patch_distance_bwd_kernel[(B, cdiv(D, options["SHARE"]))](
            grad_distance.contiguous(), text.contiguous(), image.contiguous(), *pads(text_pad, image_pad), state,
            *gradients, M, N, D, *step_of(beta), iterations, PRECISION=_device.precision(_device.arch(text)),
            SPLIT=text.element_size() == 2, **options,
        )  # fmt: skip
    return tuple(gradients), ()


CLAMP = 1e-5  # least norm of a hidden state


def _large_bwd(grad, text, image, text_pad, image_pad, scaling, beta, iterations):
    """The same with the plan in memory, for pairs that do not fit on the chip."""
    cost = cosine_cost(text, image, text_pad, image_pad)
    u, received = scaling[:, : text.shape[1], None], scaling[:, None, text.shape[1] :, 1]
    step = sum(step_of(beta)) * iterations
    exponents = (u[..., 0].double() + u[..., 1].double().log2() - step * cost.double()) * math.log(2)
    padded = text_pad.unsqueeze(2) | image_pad.unsqueeze(1)
    plan = exponents.masked_fill(padded, -torch.inf).softmax(1).float() * received
    pull = plan.masked_fill(padded, 0) * -grad[:, None, None]
    units, norms = zip(*(_unit(x, pad) for x, pad in ((text, text_pad), (image, image_pad))), strict=True)
    moved = pull @ units[1], pull.transpose(1, 2) @ units[0]
    return tuple(
        # No turn of its own where a norm is clamped.
        ((m - torch.where(n > CLAMP, (m * unit).sum(2, keepdim=True), 0) * unit) / n.clamp_min(CLAMP)).to(text.dtype)
        for m, unit, n in zip(moved, units, norms, strict=True)
    )


def _unit(states, pad):
    """(states / max(|state|, 1e-5), |state|) in float32, zero on padding."""
    states = states.float().masked_fill(pad.unsqueeze(2), 0)
    norm = states.norm(dim=2, keepdim=True)
    return states / norm.clamp_min(CLAMP), norm


def aot_cases():
    """Every configuration that ships, with ViLT's sizes, for the ahead-of-time report."""
    forward, backward = _word_patch_distance_fwd_kernel, _word_patch_distance_bwd_kernel
    for short in ("bf16", "fp32"):
        half = short == "bf16"
        for M, N in ((40, 240), (24, 240), (16, 100)):
            for target in _aot.TARGETS:
                size, more = f"{M}x{N} {short}", dict(targets=[target], matmul=True)
                for loop in ("linear", "scaled"):
                    options = config(M, N, half)[1] | dict(PRECISION=target.precision, LOOP=loop)
                    yield _aot.case(forward, f"word_patch_distance {size} {loop}", short, options, plan=None, **more)
                options = bwd_config(M, half) | dict(PRECISION=target.precision, SPLIT=half)
                yield _aot.case(backward, f"word_patch_distance_bwd {size}", short, options, **more)

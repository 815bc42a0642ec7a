"""Cross entropy of a linear head for Triton, on labelled rows only: loss_r = LSE_v(x_r W^T + b) - (x_r W^T + b)[l_r].

Shapes: x [R, D]; weight [V, D]; bias [V] or None; labels [R] int64; losses, lse [R] float32; kept [R] int32 lists the
labelled rows in order, count [1] int32 says how many there are. lse is in the order of kept.

How many rows are labelled is known to the device alone: grids are sized for R, programs read `count` and stop there.
  1. compact: one program makes `kept` and `count`.
  2. tiles of (kept rows x vocabulary), [BLOCK_M, BLOCK_N] logits in registers, reduced at once to a maximum and a sum
     of exponentials per row; memory holds 2 floats a row and tile instead of BLOCK_N logits. Row blocks are innermost,
     so that a panel of W is read from device memory once.
  3. combine: log-sum-exp over the tiles.

Backward, with p = exp(logit - lse), e = (p - onehot) g: dx = e W, dW = e^T x, db = column sums of e. The vocabulary
goes by in chunks of at most 8192 columns: logits of a chunk are computed again and e stored, [R, chunk] in the dtype of
x and no more; then dW and db of the chunk (each element by one program, rows in order) and the chunk's part of dx (its
columns split up to 8 ways for want of rows; each split adds to its own float32 [R, D], and these are added up in order
at the end). No atomics: equal runs give equal bits. e is scaled by 1 / max|g| before it is rounded and the results
scaled back, so that float16 does not lose the gradient of a mean over many rows.

A label outside 0..V-1 gives a NaN loss (on a GPU nobody looks at labels).
"""

import torch
import triton
import triton.language as tl

from . import _aot, _device, _tiles

_ALIVE = 1 << 24  # elements of e alive at once
_MAX_CHUNK = 8192
_SPLITS = 8
_LISTS, _COMBINE, _SCATTER = dict(BLOCK=1024), dict(BLOCK_R=32, BLOCK_T=32), dict(BLOCK_R=16, BLOCK_D=256)


@triton.jit(do_not_specialize=["R"])
def _linear_cross_entropy_compact_kernel(labels, kept, count, losses, picked, R, ignore_index, BLOCK: tl.constexpr):
    """One program: kept, count; zero losses for the rest; NaN where the logit of the label will be put."""
    found = 0
    for first in range(0, R, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        keep = tl.load(labels + rows, mask=rows < R, other=ignore_index) != ignore_index
        flags = keep.to(tl.int32)
        tl.store(kept + found + tl.cumsum(flags, 0) - flags, rows, mask=keep)
        tl.store(losses + rows, 0.0, mask=(rows < R) & (flags == 0))
        tl.store(picked + rows, float("nan"), mask=rows < R)
        found += tl.sum(flags, 0)
    tl.store(count, found)


@triton.jit
def _logits(
    x, weight, bias, source, cols, V, D, stride_xm, stride_wn,
    WHOLE_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x[source] W[cols]^T + b[cols], float32; -inf past the vocabulary."""
    ks = tl.arange(0, BLOCK_K)
    x_at = x + source.to(tl.int64)[:, None] * stride_xm + ks[None, :]
    w_at = weight + tl.where(cols < V, cols, 0).to(tl.int64)[None, :] * stride_wn + ks[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, D, BLOCK_K):
        if WHOLE_D:
            a, b = tl.load(x_at + k), tl.load(w_at + k)
        else:
            a = tl.load(x_at + k, mask=ks[None, :] < D - k, other=0.0)
            b = tl.load(w_at + k, mask=ks[:, None] < D - k, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if bias is not None:
        acc += tl.load(bias + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    return tl.where((cols < V)[None, :], acc, float("-inf"))


@triton.jit(do_not_specialize=["R"])
def _linear_cross_entropy_fwd_kernel(
    x, weight, bias, labels, kept, count, picked, maxima, sums, R, V, D, stride_xm, stride_wn,
    WHOLE_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.load(count)
    tiles_m = tl.cdiv(rows, BLOCK_M)
    for tile in range(tl.program_id(0), tiles_m * tl.cdiv(V, BLOCK_N), tl.num_programs(0)):
        n = tile // tiles_m
        places = (tile % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = n * BLOCK_N + tl.arange(0, BLOCK_N)
        source = tl.load(kept + places, mask=places < rows, other=0)
        logits = _logits(
            x, weight, bias, source, cols, V, D, stride_xm, stride_wn, WHOLE_D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
        )
        top = tl.max(logits, 1)
        level = tl.where(top == float("-inf"), 0.0, top)
        at = n.to(tl.int64) * R + places
        tl.store(maxima + at, top, mask=places < rows)
        tl.store(sums + at, tl.sum(tl.exp(logits - level[:, None]), 1), mask=places < rows)
        label = tl.load(labels + source, mask=places < rows, other=-1)
        here = (label >= n * BLOCK_N) & (label < tl.minimum((n + 1) * BLOCK_N, V))
        value = tl.sum(tl.where(cols[None, :] == label[:, None], logits, 0.0), 1)
        tl.store(picked + places, value, mask=(places < rows) & here)


@triton.jit(do_not_specialize=["R"])
def _linear_cross_entropy_combine_kernel(
    kept, count, picked, maxima, sums, lse, losses, R, tiles, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr
):
    """log-sum-exp over the vocabulary tiles of BLOCK_R rows, and their losses."""
    rows = tl.load(count)
    first = tl.program_id(0) * BLOCK_R
    if first < rows:
        places = first + tl.arange(0, BLOCK_R)
        top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_R,), tl.float32)
        for start in range(0, tiles, BLOCK_T):
            ts = start + tl.arange(0, BLOCK_T)
            at = ts.to(tl.int64)[:, None] * R + places[None, :]
            inside = (ts < tiles)[:, None] & (places < rows)[None, :]
            part = tl.load(maxima + at, mask=inside, other=float("-inf"))
            higher = tl.maximum(top, tl.max(part, 0))
            level = tl.where(higher == float("-inf"), 0.0, higher)
            share = tl.load(sums + at, mask=inside, other=0.0) * tl.exp(part - level[None, :])
            total = total * tl.exp(top - level) + tl.sum(share, 0)
            top = higher
        result = top + tl.log(tl.where(top == float("-inf"), 1.0, total))
        tl.store(lse + places, result, mask=places < rows)
        source = tl.load(kept + places, mask=places < rows, other=0)
        tl.store(losses + source, result - tl.load(picked + places, mask=places < rows), mask=places < rows)


# --- backward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _linear_cross_entropy_scale_kernel(grad, kept, count, scale, BLOCK: tl.constexpr):
    """One program: the largest finite |grad| of a labelled row; 1 where there is none but 0."""
    rows = tl.load(count)
    top = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, rows, BLOCK):
        places = first + tl.arange(0, BLOCK)
        source = tl.load(kept + places, mask=places < rows, other=0)
        size = tl.abs(tl.load(grad + source, mask=places < rows, other=0.0))
        top = tl.maximum(top, tl.where(size < float("inf"), size, 0.0))
    largest = tl.max(top, 0)
    tl.store(scale, tl.where(largest > 0.0, largest, 1.0))


@triton.jit
def _linear_cross_entropy_bwd_logits_kernel(
    x, weight, bias, labels, kept, count, lse, grad, scale, e, V, D, start, width, stride_xm, stride_wn, stride_e,
    WHOLE_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """e[place, v - start] = (p - onehot) g / scale for v in start .. start + width; 0 past the vocabulary."""
    rows = tl.load(count)
    tiles_m = tl.cdiv(rows, BLOCK_M)
    for tile in range(tl.program_id(0), tiles_m * tl.cdiv(width, BLOCK_N), tl.num_programs(0)):
        places = (tile % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = (tile // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
        cols = start + columns
        source = tl.load(kept + places, mask=places < rows, other=0)
        logits = _logits(
            x, weight, bias, source, cols, V, D, stride_xm, stride_wn, WHOLE_D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
        )
        p = tl.exp(logits - tl.load(lse + places, mask=places < rows, other=0.0)[:, None])
        label = tl.load(labels + source, mask=places < rows, other=-1)
        g = tl.load(grad + source, mask=places < rows, other=0.0) / tl.load(scale)
        p = tl.where(cols[None, :] == label[:, None], p - 1.0, p) * g[:, None]
        at = e + places.to(tl.int64)[:, None] * stride_e + columns[None, :]
        p = tl.where((cols < V)[None, :], p, 0.0)
        tl.store(at, p.to(e.dtype.element_ty), mask=(places < rows)[:, None])


@triton.jit
def _linear_cross_entropy_bwd_weight_kernel(
    x, e, kept, count, scale, dweight, dbias, V, start, stride_xm, stride_e, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dweight[v, :] = scale * sum_places e[place, v] x[kept[place], :] for a chunk; one tile [BLOCK_M, BLOCK_N]."""
    rows = tl.load(count)
    columns = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    depth = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, rows, BLOCK_K):
        places = first + tl.arange(0, BLOCK_K)
        source = tl.load(kept + places, mask=places < rows, other=0).to(tl.int64)
        inside = (places < rows)[:, None]
        part = tl.load(e + places.to(tl.int64)[:, None] * stride_e + columns[None, :], mask=inside, other=0.0)
        features = tl.load(
            x + source[:, None] * stride_xm + depth[None, :], mask=inside & (depth < D)[None, :], other=0.0
        )
        acc = tl.dot(tl.trans(part), features, acc, input_precision=PRECISION)
        if dbias is not None:
            total += tl.sum(part.to(tl.float32), 0)
    factor = tl.load(scale)
    cols = start + columns
    if dweight is not None:
        at = dweight + cols.to(tl.int64)[:, None] * D + depth[None, :]
        tl.store(at, (acc * factor).to(dweight.dtype.element_ty), mask=(cols < V)[:, None] & (depth < D)[None, :])
    if dbias is not None:
        if tl.program_id(1) == 0:
            tl.store(dbias + cols, (total * factor).to(dbias.dtype.element_ty), mask=cols < V)


@triton.jit(do_not_specialize=["R", "splits"])
def _linear_cross_entropy_bwd_input_kernel(
    e, weight, count, partial, R, V, start, width, splits, stride_wn, stride_e, ADD: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial[split, place, :] (+)= e[place, columns of the split] W[start + those columns, :]."""
    rows = tl.load(count)
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(D, BLOCK_N)
    each = tl.cdiv(tl.cdiv(width, splits), BLOCK_K) * BLOCK_K
    for tile in range(tl.program_id(0), tiles_m * tiles_n * splits, tl.num_programs(0)):
        places = (tile % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
        depth = (tile // tiles_m) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
        split = tile // (tiles_m * tiles_n)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in range(split * each, tl.minimum(width, (split + 1) * each), BLOCK_K):
            columns = first + tl.arange(0, BLOCK_K)
            at = e + places.to(tl.int64)[:, None] * stride_e + columns[None, :]
            part = tl.load(at, mask=(places < rows)[:, None], other=0.0)
            cols = start + columns
            at = weight + cols.to(tl.int64)[:, None] * stride_wn + depth[None, :]
            panel = tl.load(at, mask=(cols < V)[:, None] & (depth < D)[None, :], other=0.0)
            acc = tl.dot(part, panel, acc, input_precision=PRECISION)
        at = partial + (split.to(tl.int64) * R + places)[:, None] * D + depth[None, :]
        inside = (places < rows)[:, None] & (depth < D)[None, :]
        if ADD:
            acc += tl.load(at, mask=inside, other=0.0)
        tl.store(at, acc, mask=inside)


@triton.jit(do_not_specialize=["R", "splits"])
def _linear_cross_entropy_bwd_scatter_kernel(
    partial, kept, count, scale, dx, R, splits, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """dx[kept[place], :] = scale * sum_splits partial[split, place, :]."""
    rows = tl.load(count)
    places = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    depth = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    if tl.program_id(0) * BLOCK_R < rows:
        inside = (places < rows)[:, None] & (depth < D)[None, :]
        total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        for split in range(splits):
            at = partial + (tl.cast(split, tl.int64) * R + places)[:, None] * D + depth[None, :]
            total += tl.load(at, mask=inside, other=0.0)
        source = tl.load(kept + places, mask=places < rows, other=0).to(tl.int64)
        at = dx + source[:, None] * D + depth[None, :]
        tl.store(at, (total * tl.load(scale)).to(dx.dtype.element_ty), mask=inside)


# --- launchers --------------------------------------------------------------------------------------------------------


def supports(*, device=None, dtype=None, soft=False, requires_grad=False):
    """ "" when Triton can run this, else why not."""
    if soft:
        return "it takes labels that are classes; probabilities belong to the reference."
    return _device.problem(device, x=dtype)


def _config(what, wide, R, arch):
    """Blocks, warps, stages of the tiles that recompute logits ("logits"), of "weight" and of "input" tiles.

    ``wide``: float32 operands. R: all rows, of which one in seven or so is labelled in masked language modelling.
    """
    if wide:
        blocks = (64, 64, 32, 4, 3)
    elif what == "logits":
        blocks = (64, 128, 64, 4, 3) if R <= 512 else (128, 128, 64, 8, 3)
    else:
        blocks = (128, 128, 64, 8, 3) if what == "weight" else (64, 128, 64, 4, 3)
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    config = dict(zip(names, blocks, strict=True))
    if not arch:
        config["num_stages"] = 2
    return dict(config, PRECISION=_device.precision(arch))


def _chosen(what, x):
    return _config(what, x.dtype == torch.float32, len(x), _device.arch(x))


def linear_cross_entropy_fwd(*, x, weight, bias, labels, ignore_index, keep):
    """Losses [R] float32, 0 where ignored; kept are lse and the labelled rows, both zero past their count."""
    R, D = x.shape
    V = len(weight)
    losses, picked = (x.new_empty(R, dtype=torch.float32) for _ in range(2))
    kept, lse = x.new_zeros(R, dtype=torch.int32), x.new_zeros(R, dtype=torch.float32)  # zero past `count`
    count = x.new_empty(1, dtype=torch.int32)
    (x, weight), (bias, labels) = _tiles.rows(x, weight), _tiles.dense(bias, labels)
    config = _chosen("logits", x)
    tiles = _tiles.cdiv(V, config["BLOCK_N"])
    maxima, sums = x.new_empty(tiles, R, dtype=torch.float32), x.new_empty(tiles, R, dtype=torch.float32)
    programs = min(2 * _device.multiprocessors(x), _tiles.cdiv(R, config["BLOCK_M"]) * tiles)
    with _device.on(x):
        _linear_cross_entropy_compact_kernel[(1,)](labels, kept, count, losses, picked, R, ignore_index, **_LISTS)
        if R:
            _linear_cross_entropy_fwd_kernel[(programs,)](
                x, weight, bias, labels, kept, count, picked, maxima, sums, R, V, D, x.stride(0), weight.stride(0),
                WHOLE_D=D % config["BLOCK_K"] == 0, **config,
            )  # fmt: skip
            _linear_cross_entropy_combine_kernel[(_tiles.cdiv(R, _COMBINE["BLOCK_R"]),)](
                kept, count, picked, maxima, sums, lse, losses, R, tiles, **_COMBINE
            )
    return (losses, count), (lse, kept) if keep else ()


def _chunk(R, V):
    """Columns of e alive at once: a multiple of 128, and so of every block."""
    return min(max(_ALIVE // max(R, 1) // 128 * 128, 128), _MAX_CHUNK, _tiles.cdiv(V, 128) * 128)


def linear_cross_entropy_bwd(*, needs, grad_losses, x, weight, bias, labels, lse, rows, count):
    needs_x, needs_weight, needs_bias = needs
    grad, kept = grad_losses, rows
    (R, D), V = x.shape, len(weight)
    dx = x.new_zeros(x.shape if needs_x else 0)
    dweight = weight.new_empty(weight.shape if needs_weight else 0)
    dbias = weight.new_empty(V if needs_bias else 0)
    if not R:
        return (dx, dweight.zero_(), dbias.zero_()), ()
    (x, weight), (bias, labels, grad) = _tiles.rows(x, weight), _tiles.dense(bias, labels, grad)
    chunk = _chunk(R, V)
    e, scale = x.new_empty(R, chunk), x.new_empty(1, dtype=torch.float32)
    splits = min(max(_ALIVE // (R * D), 1), _SPLITS)
    partial = x.new_empty(splits if needs_x else 0, R, D, dtype=torch.float32)
    of_logits, of_weight, of_input = (_chosen(what, x) for what in ("logits", "weight", "input"))
    most = 2 * _device.multiprocessors(x)

    def tiles(config, rows, columns):
        return _tiles.cdiv(rows, config["BLOCK_M"]), _tiles.cdiv(columns, config["BLOCK_N"])

    with _device.on(x):
        _linear_cross_entropy_scale_kernel[(1,)](grad, kept, count, scale, **_LISTS)
        for start in range(0, V, chunk):
            m, n = tiles(of_logits, R, chunk)
            _linear_cross_entropy_bwd_logits_kernel[(min(most, m * n),)](
                x, weight, bias, labels, kept, count, lse, grad, scale, e, V, D, start, chunk, x.stride(0),
                weight.stride(0), chunk, WHOLE_D=D % of_logits["BLOCK_K"] == 0, **of_logits,
            )  # fmt: skip
            if needs_weight or needs_bias:
                m, n = tiles(of_weight, chunk, D)
                _linear_cross_entropy_bwd_weight_kernel[(m, n if needs_weight else 1)](
                    x, e, kept, count, scale, dweight if needs_weight else None, dbias if needs_bias else None, V,
                    start, x.stride(0), chunk, D=D, **of_weight,
                )  # fmt: skip
            if needs_x:
                m, n = tiles(of_input, R, D)
                _linear_cross_entropy_bwd_input_kernel[(min(most, m * n * splits),)](
                    e, weight, count, partial, R, V, start, chunk, splits, weight.stride(0), chunk,
                    ADD=start > 0, D=D, **of_input,
                )  # fmt: skip
        if needs_x:
            grid = (_tiles.cdiv(R, _SCATTER["BLOCK_R"]), _tiles.cdiv(D, _SCATTER["BLOCK_D"]))
            _linear_cross_entropy_bwd_scatter_kernel[grid](partial, kept, count, scale, dx, R, splits, D=D, **_SCATTER)
    return (dx, dweight, dbias), ()


# --- ahead of time ----------------------------------------------------------------------------------------------------


def aot_cases():
    """Width 768; masked language modelling of a batch of 8 (320 text rows) and of 64 (2560)."""

    def case(kernel, short, config, target, matmul=False):
        blocks = "x".join(str(size) for name, size in config.items() if name.startswith("BLOCK"))
        name = f"{kernel.__name__.strip('_')} {short} {blocks}"
        return _aot.case(kernel, name, short, config, targets=[target], matmul=matmul, grad="*fp32")

    of_logits = (_linear_cross_entropy_fwd_kernel, _linear_cross_entropy_bwd_logits_kernel)
    for target in _aot.TARGETS:
        yield case(_linear_cross_entropy_compact_kernel, "fp32", _LISTS, target)
        yield case(_linear_cross_entropy_scale_kernel, "fp32", _LISTS, target)
        yield case(_linear_cross_entropy_combine_kernel, "fp32", _COMBINE, target)
        for short in ("bf16", "fp32"):
            yield case(_linear_cross_entropy_bwd_scatter_kernel, short, _SCATTER | dict(D=768), target)
            for what, R, more, kernels in (
                ("logits", 320, dict(WHOLE_D=True), of_logits),
                ("logits", 2560, dict(WHOLE_D=True), of_logits),
                ("weight", 2560, dict(D=768), (_linear_cross_entropy_bwd_weight_kernel,)),
                ("input", 2560, dict(D=768, ADD=True), (_linear_cross_entropy_bwd_input_kernel,)),
            ):
                if short == "fp32" and R == 320:
                    continue  # float32 has one configuration
                config = _config(what, short == "fp32", R, target.arch) | more
                for kernel in kernels:
                    yield case(kernel, short, config, target, matmul=True)

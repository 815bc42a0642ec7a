"""Linear layer for Triton: out = act(x W^T + b) + residual, one pass; act is the identity or the exact GELU (_gelu.py).

Shapes: x [M, K]; weight [N, K]; bias [N] or None; residual [M, N] or None, of any floating dtype; out [M, N], and for
the backward of a GELU the rounded pre-activation x W^T + b, [M, N]. With x_scale [M] and weight_scale [N], float32, x
and weight are e4m3 and stand for x * x_scale[:, None] and weight * weight_scale[:, None] (kernels/linear_fp8.py). Then
a row of x may have a scale for each 128 columns, [K / 128, M], and so may one of out, which is e4m3, too.

One kernel, two ways of reading the operands:
  * TMA (sm_90, sm_100): host-side tensor descriptors, tiles land in shared memory without passing through registers. On
    sm_100 the loop over tiles is flattened and warp specialised, so that the epilogue of one tile runs under the
    products of the next; the compilers we support have no such pass for sm_90, where two programs on a multiprocessor
    (tiles of 128 x 128 and less) or three or four stages in flight do that job.
  * pointers (sm_80, sm_89, AMD, float32, rows not aligned to 16 bytes). Rows and columns past the end read row 0, which
    is always there, and are not written.

A fixed number of programs walks the output tiles in groups of GROUP row blocks, so that the weight panels of a group
stay in L2. Accumulators are float32. The epilogue works on quarters of a wide tile: bias, erf and conversion of all of
a 128 x 256 tile at once would spill. float32 operands go through three TF32 products (tf32x3) on NVIDIA.

Backward: dx = g W, dW = g^T x, db = column sums of g, dresidual = g; library products.
"""

import itertools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _aot, _dependent, _device, _tiles
from ._e4m3 import GROUP as GROUP_OF_SCALES
from ._epilogue import finish, finish_halves, finish_quantized


@triton.jit
def tile_place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(row block, column block) of a tile number: down GROUP row blocks first, then to the next column block."""
    width = GROUP * tiles_n
    first = (tile // width) * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    return first + (tile % width) % size, (tile % width) // size


@triton.jit
def _multiplied(acc, a, b, k, m0, M, scales, INEXACT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b, where a has a scale for each group of columns times that of its group."""
    if scales[2] is None:
        return tl.dot(a, b, acc, PRECISION, max_num_imprecise_acc=INEXACT)
    else:
        lines = m0 + tl.arange(0, acc.shape[0])
        steps = scales[2] + k // GROUP_OF_SCALES * M.to(tl.int64) + lines
        return acc + tl.dot(a, b, input_precision=PRECISION) * tl.load(steps, mask=lines < M, other=0.0)[:, None]


@triton.jit
def products_of(
    x, weight, scales, m0, n0, first, last, M, N, K, stride_xm, stride_wn, TMA: tl.constexpr, WHOLE_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The float32 tile at (m0, n0) of x W^T, summed over columns `first` to `last` of both."""
    # Hopper's tensor cores keep 13 bits or so of a sum of e4m3 products: after 128 it moves on to float32 registers.
    INEXACT: tl.constexpr = 0 if scales[0] is None else BLOCK_K if BLOCK_K < 128 else 128
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TMA:
        for k in range(first, last, BLOCK_K):
            a, b = x.load([m0, k]), weight.load([n0, k]).T
            acc = _multiplied(acc, a, b, k, m0, M, scales, INEXACT, PRECISION)
    else:
        rows, cols, ks = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        x_at = x + tl.where(rows < M, rows, 0).to(tl.int64)[:, None] * stride_xm + ks[None, :]
        w_at = weight + tl.where(cols < N, cols, 0).to(tl.int64)[None, :] * stride_wn + ks[:, None]
        for k in range(first, last, BLOCK_K):
            if WHOLE_K:
                a, b = tl.load(x_at + k), tl.load(w_at + k)
            else:
                a = tl.load(x_at + k, mask=ks[None, :] < K - k, other=0.0)
                b = tl.load(w_at + k, mask=ks[:, None] < K - k, other=0.0)
            acc = _multiplied(acc, a, b, k, m0, M, scales, INEXACT, PRECISION)
    return acc


@triton.jit
def tile_of(
    x, weight, scales, bias, residual, pre, out, m, n, M, N, K, stride_xm, stride_wn, stride_rm, GELU: tl.constexpr,
    TMA: tl.constexpr, WHOLE_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute and write the output tile of row block m and column block n.

    scales: of x [M], of weight [N], of x by groups of columns, of out by groups of columns; None where there are none.
    """
    m0, n0 = m * BLOCK_M, n * BLOCK_N
    acc = products_of(
        x, weight, scales, m0, n0, 0, K, M, N, K, stride_xm, stride_wn, TMA, WHOLE_K, BLOCK_M, BLOCK_N, BLOCK_K,
        PRECISION,
    )  # fmt: skip
    if scales[3] is not None:
        finish_quantized(acc, m0, n0, scales, bias, out, M, N, GELU, TMA, PARTS)
    elif PARTS == 4:
        left, right = _tiles.halves(acc)
        half: tl.constexpr = BLOCK_N // 2
        finish_halves(left, m0, n0, scales, bias, residual, pre, out, M, N, stride_rm, GELU, TMA)
        finish_halves(right, m0, n0 + half, scales, bias, residual, pre, out, M, N, stride_rm, GELU, TMA)
    else:
        finish(acc, m0, n0, scales, bias, residual, pre, out, M, N, stride_rm, GELU, TMA)


@triton.jit(do_not_specialize=["M"])
def _linear_fwd_kernel(
    x, weight, x_scale, weight_scale, group_scale, out_scale, bias, residual, pre, out, M, N, K, stride_xm, stride_wn,
    stride_rm, GELU: tl.constexpr, TMA: tl.constexpr, SPECIALIZE: tl.constexpr, WHOLE_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    _dependent.begin(PDL)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(
        tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=SPECIALIZE, warp_specialize=SPECIALIZE
    ):
        m, n = tile_place(tile, tiles_m, tiles_n, GROUP)
        tile_of(
            x, weight, (x_scale, weight_scale, group_scale, out_scale), bias, residual, pre, out, m, n, M, N, K,
            stride_xm, stride_wn, stride_rm, GELU, TMA, WHOLE_K, BLOCK_M, BLOCK_N, BLOCK_K, PARTS, PRECISION,
        )  # fmt: skip


# --- configurations ---------------------------------------------------------------------------------------------------

#: kind -> rows of (largest M, largest N, BLOCK_M, BLOCK_N, BLOCK_K, PARTS, num_warps, num_stages, programs a
#: multiprocessor); the first that covers the call is taken. Batch 1 of ViLT has 185 rows, batch 8 about 1.7k, batch 64
#: about 14k. Chosen for whole waves on 132 multiprocessors and for what fits without spills.
_ANY = 1 << 62
_CONFIGS = {
    "tma": (
        (512, 1024, 64, 32, 128, 1, 4, 4, 2),
        (512, _ANY, 64, 64, 128, 1, 4, 3, 2),
        (4096, 1024, 128, 64, 64, 1, 4, 3, 2),
        (4096, _ANY, 128, 128, 64, 4, 8, 3, 2),
        (_ANY, 1024, 128, 128, 64, 4, 8, 3, 2),
        (_ANY, _ANY, 128, 256, 64, 4, 8, 4, 1),
    ),
    "pointer": (
        (512, 1024, 64, 32, 64, 1, 4, 4, 2),
        (512, _ANY, 64, 64, 64, 1, 4, 3, 2),
        (4096, 1024, 128, 64, 32, 1, 4, 4, 2),
        (_ANY, _ANY, 128, 128, 32, 4, 8, 4, 2),
    ),
    "float32": (
        (512, _ANY, 32, 64, 32, 1, 4, 3, 2),
        (4096, 1024, 64, 64, 32, 1, 4, 3, 2),
        (_ANY, _ANY, 128, 64, 32, 4, 8, 3, 1),
    ),
    "tma fp8": (  # e4m3: half the bytes of bfloat16, so twice the depth
        (512, 1024, 64, 32, 128, 1, 4, 4, 2),
        (512, _ANY, 64, 64, 128, 1, 4, 4, 2),
        (4096, 1024, 128, 64, 128, 1, 4, 3, 2),
        (_ANY, _ANY, 128, 128, 128, 4, 8, 3, 2),
    ),
    "pointer fp8": (
        (512, 1024, 64, 32, 128, 1, 4, 3, 2),
        (512, _ANY, 64, 64, 128, 1, 4, 3, 2),
        (_ANY, _ANY, 128, 64, 64, 1, 4, 3, 2),
    ),
    # Where x has scales by groups of columns, and a sum of its own for each; where out has, and tiles are as wide.
    "pointer fp8 x": ((512, 1024, 64, 32, 128, 1, 4, 3, 2), (_ANY, _ANY, 64, 64, 128, 1, 4, 3, 2)),
    "tma fp8 out": ((512, _ANY, 64, 128, 128, 4, 4, 3, 2), (_ANY, _ANY, 128, 128, 128, 4, 8, 3, 2)),
    "pointer fp8 out": ((_ANY, _ANY, 64, 128, 64, 4, 4, 3, 2),),
}
_GROUP = 8


def _config(kind, M, N, *, arch=90, residual=False, gelu=False, groups=""):
    """Block sizes, warps, stages, programs a multiprocessor and the way of a GELU, if any, for an [M, N] output.

    ``groups``: "x" or "out" has scales by groups of columns.
    """
    rows = _CONFIGS.get(f"{kind} {groups}", _CONFIGS[kind])
    row = next(row for row in rows if row[0] >= M and row[1] >= N)
    # sm_100 stages the residual in shared memory: too much for 256 columns. Where nothing else runs under an epilogue,
    # that of one program should run under the products of another.
    if row[3] == 256 and (residual if arch >= 100 else gelu):
        row = _CONFIGS[kind][4]
    # Nor do Triton 3.6 and 3.9 compile the search for a group's largest over 8 warps there.
    if groups == "out" and arch >= 100:
        row = rows[0]
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "PARTS", "num_warps", "num_stages", "per_multiprocessor")
    config = dict(zip(names, row[2:], strict=True), GROUP=_GROUP)
    config["SPECIALIZE"] = kind.startswith("tma") and arch >= 100
    # The warp specialisation of Triton 3.9 hands parts of a longer epilogue on through shared memory, which overflows.
    by_erf = kind == "float32" or config["SPECIALIZE"]
    config["GELU"] = ("erf" if by_erf else "tail") if gelu else None
    if not arch:
        config["num_stages"] = 2
    return config | _device.configuration("linear_gelu", arch, M) if gelu and kind == "tma" else config


def _measured(config, kind, M, K, arch):
    """Of a plain linear layer: with what was measured, where something was; a split of K only where K is that long."""
    found = dict(_device.configuration("linear", arch, M)) if kind == "tma" else {}
    found.pop("RESIDUAL", None)  # which is for those who call
    if K <= found.get("DEPTH", 0):
        found = {name: found[name] for name in ("PDL",) if name in found}
    return config | found


def kind_of(x, *weights):
    if x.dtype == torch.float32:
        return "float32"
    bytes_each = x.element_size()
    reachable = all(
        t.stride(0) * bytes_each % 16 == 0 and t.data_ptr() % 16 == 0 and t.shape[1] > 0 for t in (x, *weights)
    )
    how = "tma" if 90 <= _device.arch(x) < 120 and reachable and weights[0].shape[0] % 8 == 0 else "pointer"
    return how if bytes_each == 2 else f"{how} fp8"


def supports(*, device=None, dtype=None, weight_dtype=None, residual_dtype=None, requires_grad=False):
    """ "" when Triton can run this, else why not."""
    if weight_dtype is not None:
        return f"weights are {weight_dtype}, expected the dtype of x; convert them with .to(...)."
    return _device.problem(device, x=dtype, residual=residual_dtype)


# --- launchers --------------------------------------------------------------------------------------------------------


def launch(x, weight, bias, residual, *, gelu, save, out_dtype, scales=(None,) * 4, kind=None, config=None):
    """(out, pre): out = act(x W^T + b) + residual, pre = x W^T + b in the dtype of x where ``save``, else None.

    ``scales`` are those of `tile_of`, for e4m3; with the last, out is e4m3, through GELU. ``kind`` and ``config``
    override the choice, for tests and benchmarks.
    """
    shape = (*x.shape[:-1], weight.shape[0])
    x, weight = _tiles.rows(x, weight)
    (M, K), N = x.shape, weight.shape[0]
    out = x.new_empty(M, N, dtype=out_dtype)
    pre = x.new_empty(M, N) if save else None
    if out.numel():
        (bias,), (residual,) = _tiles.dense(bias), _tiles.rows(residual)
        kind = kind or kind_of(x, weight)
        arch, groups = _device.arch(x), "x" if scales[2] is not None else ""
        if scales[3] is not None:
            kind, groups = kind if N % 16 == 0 else kind.replace("tma", "pointer"), "out"  # a value of out is a byte
        if config is None:
            config = _config(kind, M, N, arch=arch, residual=residual is not None, gelu=gelu, groups=groups)
            config = config if gelu else _measured(config, kind, M, K, arch)
        config = _dependent.options(dict(config), arch)
        if gelu and out_dtype == torch.float32:
            config["GELU"] = "erf"
        programs = config.pop("per_multiprocessor") * _device.multiprocessors(x)
        block_m, block_n, block_k = (config[f"BLOCK_{axis}"] for axis in "MNK")
        tma = kind.startswith("tma")
        if config.get("DEPTH"):
            from . import linear_split  # which imports this file

            linear_split.launch(x, weight, scales, bias, residual, pre, out, tma, config)
            return out.view(shape), pre if pre is None else pre.view(shape)
        with _device.on(x):
            _linear_fwd_kernel[(min(programs, _tiles.cdiv(M, block_m) * _tiles.cdiv(N, block_n)),)](
                TensorDescriptor.from_tensor(x, [block_m, block_k]) if tma else x,
                TensorDescriptor.from_tensor(weight, [block_n, block_k]) if tma else weight,
                *scales,
                bias,
                residual,
                described(pre, config, tma),
                described(out, config, tma),
                M, N, K, x.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0),
                TMA=tma, WHOLE_K=K % block_k == 0, PRECISION=_device.precision(arch), **config,
            )  # fmt: skip
    return out.view(shape), pre if pre is None else pre.view(shape)


def described(tensor, config, tma):
    if tensor is None or not tma:
        return tensor
    return TensorDescriptor.from_tensor(tensor, [config["BLOCK_M"], config["BLOCK_N"] // config["PARTS"]])


def linear_fwd(*, x, weight, bias, residual, keep):
    out_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return (launch(x, weight, bias, residual, gelu=False, save=False, out_dtype=out_dtype)[0],), ()


def products(grad, x, weight, need_x, need_weight):
    """(dx, dweight) of x W^T, None where not needed; grad [..., N] is rounded to the dtype of x first."""
    grad = grad.to(weight.dtype).reshape(-1, weight.shape[0])
    dx = torch.mm(grad, weight).view(*x.shape) if need_x else None
    return dx, torch.mm(grad.t(), x.reshape(-1, x.shape[-1])) if need_weight else None


def linear_bwd(*, needs, grad_out, x, weight, bias, residual):
    """The gradient of the residual is None where it is that of the result itself."""
    need_x, need_weight, need_bias, need_residual = needs
    dbias = grad_out.flatten(0, -2).sum(0).to(bias.dtype) if need_bias else None
    apart = need_residual and grad_out.dtype != residual.dtype
    dresidual = grad_out.to(residual.dtype) if apart else None
    return (*products(grad_out, x, weight, need_x, need_weight), dbias, dresidual), ()


# --- ahead of time ----------------------------------------------------------------------------------------------------

ROWS = (185, 1720, 13880)  # batch 1, 8, 64


def aot_variants(op, shapes, *, gelu, pre=(False,), residual=(None,), fp8=False, groups=""):
    """Every configuration that ``launch`` can choose for these (N, K) and ViLT's row counts, once each.

    ``groups``: "x" or "out", which of them has scales by groups of columns.
    """
    seen = set()
    for target in _aot.FP8_TARGETS if fp8 else _aot.TARGETS:
        kinds = [("pointer fp8", "fp8e4nv")] if fp8 else [("pointer", "bf16"), ("float32", "fp32")]
        if target.arch in (90, 100):
            kinds.append(("tma fp8", "fp8e4nv") if fp8 else ("tma", "bf16"))
        for kind, dtype in kinds:
            for M, (N, K), save, extra in itertools.product(ROWS, shapes, pre, residual):
                more = dict(residual=extra is not None, gelu=gelu, groups=groups)
                config = _config(kind, M, N, arch=target.arch, **more)
                config.pop("per_multiprocessor")
                key = (target, kind, save, extra, *config.values())
                if key not in seen:
                    seen.add(key)
                    yield _aot_case(op, target, kind, dtype, save, extra, M, N, K, config | {"PDL": False}, groups)
                    if kind == "tma" and not save and extra is None:
                        yield _aot_case(op, target, kind, dtype, save, extra, M, N, K, config | {"PDL": True}, groups)


def _aot_case(op, target, kind, dtype, save, residual, M, N, K, config, groups):
    tma, result = kind.startswith("tma"), "bf16" if dtype == "fp8e4nv" else dtype
    block_m, block_n, block_k = (config[f"BLOCK_{axis}"] for axis in "MNK")

    def matrix(element, rows, columns):
        return f"tensordesc<{element}[{rows}, {columns}]>" if tma else f"*{element}"

    def output(element):
        return matrix(element, block_m, block_n // config["PARTS"])

    types = dict(
        x=matrix(dtype, block_m, block_k), weight=matrix(dtype, block_n, block_k),
        out=output(dtype if groups == "out" else residual or result),
        pre=output(result) if save else None, residual=residual and f"*{residual}",
    )  # fmt: skip
    scaled = {
        "x_scale": groups != "x",
        "weight_scale": True,
        "group_scale": groups == "x",
        "out_scale": groups == "out",
    }
    types |= {name: "*fp32" if there and result != dtype else None for name, there in scaled.items()}
    extras = "+pre" * save + (f"+residual {residual}" if residual else "") + f" {groups} by groups" * bool(groups)
    extras += " dependent" * config["PDL"]
    return _aot.case(
        _linear_fwd_kernel, f"{op} {kind} M<={M} N={N} K={K} {block_m}x{block_n}x{block_k}{extras}", result,
        config | dict(TMA=tma, WHOLE_K=K % block_k == 0, PRECISION=target.precision),
        targets=[target], matmul=True, **types,
    )  # fmt: skip


def aot_cases():
    yield from aot_variants("linear", ((768, 768), (2304, 768), (768, 3072)), gelu=False, residual=(None, "fp32"))
    from . import linear_split

    yield from linear_split.cases()

"""Linear layer of few rows for Triton, K dealt out over programs: where N and the rows make too few tiles for a GPU.

Shapes as in kernels/linear.py; between its two kernels float32 sums [splits, M, N], each of DEPTH columns of x and of
weight, DEPTH a multiple of BLOCK_K.

The first kernel computes one tile of one split a program. The second adds the splits, in order, and does what an
epilogue does: bias, GELU, residual. No atomics: equal runs give equal bits. (One kernel, in which the last program to
reach a tile adds, would save that launch and need counters that are zero before every launch: a launch of its own, or
memory that two streams must not share.)
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _aot, _dependent, _device, linear
from ._epilogue import finish, store
from ._tiles import cdiv

#: What takes part of a configuration with DEPTH, and what paper has for fc2 at batch 1: one round of a GPU's programs.
_NAMES = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "DEPTH", "GROUP", "num_warps", "num_stages")
BATCH_1 = dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, DEPTH=768, GROUP=8, num_warps=4, num_stages=4)
_SUM = dict(ROWS=4, COLUMNS=256, num_warps=4)


@triton.jit(do_not_specialize=["M"])
def _linear_split_fwd_kernel(
    x, weight, x_scale, weight_scale, partial, M, N, K, stride_xm, stride_wn, TMA: tl.constexpr, WHOLE_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    _dependent.begin(PDL)
    m, n = linear.tile_place(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    m0, n0, first = m * BLOCK_M, n * BLOCK_N, tl.program_id(1) * DEPTH
    acc = linear.products_of(
        x, weight, (x_scale, weight_scale, None, None), m0, n0, first, tl.minimum(first + DEPTH, K), M, N, K, stride_xm,
        stride_wn, TMA, WHOLE_K, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    mine = partial + tl.program_id(1).to(tl.int64) * M * N
    store(mine, acc, m0, n0, M, N, False)


@triton.jit(do_not_specialize=["M"])
def _linear_sum_kernel(
    partial, x_scale, weight_scale, bias, residual, pre, out, M, N, stride_rm, SPLITS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, GELU: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    _dependent.begin(PDL)
    m0, n0 = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    rows, cols = m0 + tl.arange(0, ROWS)[:, None], n0 + tl.arange(0, COLUMNS)[None, :]
    at, inside = partial + rows.to(tl.int64) * N + cols, (rows < M) & (cols < N)
    acc = tl.load(at, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        acc += tl.load(at + tl.cast(split, tl.int64) * M * N, mask=inside, other=0.0)
    finish(acc, m0, n0, (x_scale, weight_scale, None, None), bias, residual, pre, out, M, N, stride_rm, GELU, False)


def launch(x, weight, scales, bias, residual, pre, out, tma, config):
    """Both kernels, to `out` [M, N] and to `pre` where that is one; as linear.launch has them, `config` with DEPTH."""
    config = dict(config)
    (M, K), N = x.shape, weight.shape[0]
    block_m, block_n, block_k = (config[f"BLOCK_{axis}"] for axis in "MNK")
    if config["DEPTH"] % block_k:
        raise ValueError(f"linear: splits of {config['DEPTH']} columns, expected a multiple of BLOCK_K={block_k}.")
    splits = cdiv(K, config["DEPTH"])
    gelu, how = config["GELU"], {name: config[name] for name in ("PDL", "launch_pdl") if name in config}
    config = {name: config[name] for name in _NAMES} | how
    partial = x.new_empty(splits, M, N, dtype=torch.float32)
    with _device.on(x):
        _linear_split_fwd_kernel[(cdiv(M, block_m) * cdiv(N, block_n), splits)](
            TensorDescriptor.from_tensor(x, [block_m, block_k]) if tma else x,
            TensorDescriptor.from_tensor(weight, [block_n, block_k]) if tma else weight,
            *scales[:2], partial, M, N, K, x.stride(0), weight.stride(0),
            TMA=tma, WHOLE_K=K % block_k == 0, PRECISION=_device.precision(_device.arch(x)), **config,
        )  # fmt: skip
        _linear_sum_kernel[(cdiv(M, _SUM["ROWS"]), cdiv(N, _SUM["COLUMNS"]))](
            partial, *scales[:2], bias, residual, pre, out, M, N, 0 if residual is None else residual.stride(0),
            SPLITS=splits, GELU=gelu, **_SUM, **how,
        )  # fmt: skip


# --- ahead of time ----------------------------------------------------------------------------------------------------


def cases():
    """Of fc2 at batch 1, as the paper has it (benchmarks/NOTES.md), and of rows that no descriptor describes."""
    for targets, how in _dependent.ways():
        for target in targets:
            tma = target.arch in (90, 100)
            if tma or not how["PDL"]:
                yield _aot_case(target, tma, BATCH_1 | how)
        yield _aot.case(
            _linear_sum_kernel, "linear, four splits added" + " dependent" * how["PDL"], "bf16",
            _SUM | how | dict(SPLITS=4, GELU=None), targets=targets,
            x_scale=None, weight_scale=None, residual=None, pre=None,
        )  # fmt: skip


def _aot_case(target, tma, config):
    block_m, block_n, block_k = (config[f"BLOCK_{axis}"] for axis in "MNK")
    if not target.arch:
        config = config | {"num_stages": 2}
    matrices = dict.fromkeys(("x", "weight"), "*bf16")
    if tma:
        matrices = dict(x=f"tensordesc<bf16[{block_m}, {block_k}]>", weight=f"tensordesc<bf16[{block_n}, {block_k}]>")
    name = f"linear split N=768 K=3072 by {config['DEPTH']} {block_m}x{block_n}x{block_k}"
    return _aot.case(
        _linear_split_fwd_kernel, name + " dependent" * config["PDL"], "bf16",
        config | dict(TMA=tma, WHOLE_K=True, PRECISION=target.precision), targets=[target], matmul=True,
        x_scale=None, weight_scale=None, **matrices,
    )  # fmt: skip

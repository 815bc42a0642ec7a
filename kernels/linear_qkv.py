"""Queries, keys and values for Triton: three linear layers of the same rows in one launch, no weights laid together.

Shapes: x [..., K]; weights [N, K]; biases [N] or None; three outputs [..., N].

A program computes one tile of one of the three, and chooses the weight, the bias and the output that are its own among
the kernel's arguments (pointers or descriptors). The three of a tile run together, and rows in groups of GROUP blocks,
so that x and a panel of weights are in L2. Programs do not stay: where two share a multiprocessor, one's epilogue runs
under the other's products.

Backward: dx = sum_i g_i W_i, summed into one buffer, dW_i = g_i^T x, db_i = column sums of g_i; library products.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _aot, _dependent, _device, _tiles, linear
from .linear import described, tile_of, tile_place


@triton.jit(do_not_specialize=["M"])
def _linear_qkv_fwd_kernel(
    x, query_weight, key_weight, value_weight, query_bias, key_bias, value_bias, query, key, value, M, N, K, stride_xm,
    stride_qn, stride_kn, stride_vn, TMA: tl.constexpr, WHOLE_K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    _dependent.begin(PDL)
    which = tl.program_id(0) % 3
    m, n = tile_place(tl.program_id(0) // 3, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    weight, bias, out, stride_wn = query_weight, query_bias, query, stride_qn
    if which == 1:
        weight, bias, out, stride_wn = key_weight, key_bias, key, stride_kn
    elif which == 2:
        weight, bias, out, stride_wn = value_weight, value_bias, value, stride_vn
    tile_of(
        x, weight, (None, None, None, None), bias, None, None, out, m, n, M, N, K, stride_xm, stride_wn, 0, None, TMA,
        WHOLE_K, BLOCK_M, BLOCK_N, BLOCK_K, PARTS, PRECISION,
    )  # fmt: skip


def supports(*, device=None, dtype=None, requires_grad=False):
    """ "" when Triton can run this, else why not."""
    return _device.problem(device, x=dtype)


def _config(kind, M, N, *, arch=90):
    """What linear.py takes for the three outputs side by side and at most 4096 rows: from there on two programs share a
    multiprocessor. Less what is for programs that stay."""
    config = linear._config(kind, min(M, 4096), 3 * N, arch=arch)
    config = {name: config[name] for name in config if name not in ("SPECIALIZE", "GELU", "per_multiprocessor")}
    return config | _device.configuration("linear_qkv", arch, M) if kind == "tma" else config


def linear_qkv_fwd(*, x, query_weight, key_weight, value_weight, query_bias, key_bias, value_bias, keep):
    weights, biases = (query_weight, key_weight, value_weight), (query_bias, key_bias, value_bias)
    shape = (*x.shape[:-1], len(query_weight))
    outs = [x.new_empty(*shape) for _ in range(3)]
    if outs[0].numel():
        launch(x, weights, biases, outs)
    return tuple(outs), ()


def launch(x, weights, biases, outs, kind=None, config=None):
    """Write the three products to `outs`, dense; ``kind`` and ``config`` as in linear.launch."""
    x, *weights = _tiles.rows(x, *weights)
    (M, K), N = x.shape, len(weights[0])
    kind = kind or linear.kind_of(x, *weights)
    arch = _device.arch(x)
    config = _dependent.options(dict(config or _config(kind, M, N, arch=arch)), arch)
    block_m, block_n, block_k = (config[f"BLOCK_{axis}"] for axis in "MNK")
    tma = kind.startswith("tma")
    if any(bias is None for bias in biases) and biases.count(None) < 3:
        biases = [x.new_zeros(N) if bias is None else bias for bias in biases]
    with _device.on(x):
        _linear_qkv_fwd_kernel[(3 * _tiles.cdiv(M, block_m) * _tiles.cdiv(N, block_n),)](
            TensorDescriptor.from_tensor(x, [block_m, block_k]) if tma else x,
            *(TensorDescriptor.from_tensor(w, [block_n, block_k]) if tma else w for w in weights),
            *_tiles.dense(*biases),
            *(described(out.view(M, N), config, tma) for out in outs),
            M, N, K, x.stride(0), *(w.stride(0) for w in weights),
            TMA=tma, WHOLE_K=K % block_k == 0, PRECISION=_device.precision(arch), **config,
        )  # fmt: skip


def linear_qkv_bwd(
    *, needs, grad_query, grad_key, grad_value, x, query_weight, key_weight, value_weight, query_bias, key_bias,
    value_bias,
):  # fmt: skip
    need_x, *others = needs
    flat, dx, dweights, dbiases = x.reshape(-1, x.shape[-1]), None, [], []
    for grad, weight, bias, need_weight, need_bias in zip(
        (grad_query, grad_key, grad_value), (query_weight, key_weight, value_weight),
        (query_bias, key_bias, value_bias), others[:3], others[3:], strict=True,
    ):  # fmt: skip
        if grad is None:
            dweights.append(torch.zeros_like(weight) if need_weight else None)
            dbiases.append(torch.zeros_like(bias) if need_bias else None)
            continue
        grad = grad.to(weight.dtype).reshape(-1, len(weight))
        if need_x:
            dx = torch.mm(grad, weight) if dx is None else dx.addmm_(grad, weight)
        dweights.append(torch.mm(grad.t(), flat) if need_weight else None)
        dbiases.append(grad.sum(0).to(bias.dtype) if need_bias else None)
    return (dx if dx is None else dx.view(x.shape), *dweights, *dbiases), ()


# --- ahead of time ----------------------------------------------------------------------------------------------------


WIDTH = 768  #: of ViLT: K, and N of each of the three


def aot_cases():
    """Every configuration for ViLT's three products."""
    for target in _aot.TARGETS:
        seen = []
        kinds = [("pointer", "bf16"), ("float32", "fp32"), *[("tma", "bf16")] * (target.arch in (90, 100))]
        for kind, dtype in kinds:
            for M in linear.ROWS:
                config = _config(kind, M, WIDTH, arch=target.arch)
                if (kind, config) in seen:
                    continue
                seen.append((kind, config))
                for targets, how in _dependent.ways([target]):
                    if targets and (kind == "tma" or not how["PDL"]):
                        yield _aot_case(target, kind, dtype, M, config | how)


def _aot_case(target, kind, dtype, M, config):
    tma = kind.startswith("tma")
    block_m, block_n, block_k = (config[f"BLOCK_{axis}"] for axis in "MNK")

    def matrix(rows, columns):
        return f"tensordesc<{dtype}[{rows}, {columns}]>" if tma else f"*{dtype}"

    three = ("query", "key", "value")
    types = dict(x=matrix(block_m, block_k), **{f"{name}_weight": matrix(block_n, block_k) for name in three})
    types |= dict.fromkeys(three, matrix(block_m, block_n // config["PARTS"]))
    more = dict(TMA=tma, WHOLE_K=WIDTH % block_k == 0, PRECISION=target.precision)
    name = f"linear_qkv {kind} M<={M} N={WIDTH} K={WIDTH} {block_m}x{block_n}x{block_k}" + " dependent" * config["PDL"]
    return _aot.case(_linear_qkv_fwd_kernel, name, dtype, config | more, targets=[target], matmul=True, **types)

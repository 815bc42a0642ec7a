"""Residual add and LayerNorm handed on as e4m3, for Triton (inference): the kernel of add_layer_norm.py rounds y, too.

Shapes: x, residual [..., D]; s [..., D] in the wider dtype of the two; q [..., D] float8_e4m3fn; scale [...] float32.
NVIDIA from sm_89 on. A whole row is in a program's registers, so its largest is at hand, and q and scale are those of
a pass over y of its own (kernels/linear_fp8.py) to the bit.
"""

import torch

from . import _device, add_layer_norm, linear_fp8


def supports(*, device=None, dtype=None, residual_dtype=None, width=1):
    """ "" when Triton can run this, else why not."""
    return linear_fp8.supports(device=device, dtype=dtype) or add_layer_norm.supports(
        device=device, dtype=dtype, residual_dtype=residual_dtype, width=width
    )


def add_layer_norm_fp8_fwd(*, x, residual, weight, bias, eps, keep):
    D, arch = x.shape[-1], _device.arch(x)
    N = x.numel() // max(D, 1)
    config = add_layer_norm.fwd_config(N, D, x.dtype, arch)
    config |= _device.configuration("add_layer_norm_fp8", arch, N)
    config.pop("FUSED", None)  # which is for those who call
    s = x.new_empty(*x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    q, scale = x.new_empty(*x.shape, dtype=torch.float8_e4m3fn), x.new_empty(*x.shape[:-1], dtype=torch.float32)
    if s.numel():
        add_layer_norm.launch(x, residual, weight, bias, None, s, q, scale, None, None, eps, 0.0, config)
    return (s, q, scale), ()

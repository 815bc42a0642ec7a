"""The encoder on the CPU: csrc/cpu/encoder.cpp."""

import torch

from ...reference.encoder import MATRICES, LayerParameters
from . import _native, quantize_linear

_COMPUTE = {"float32": "f32", "bfloat16": "bf16", "int8": "int8"}


def supports(
    *, device=None, dtype=None, compute="float32", head_dim=64, blobs=False, parameter_dtypes=(), requires_grad=False
):  # fmt: skip
    if dtype not in (None, torch.float32):
        return f"x is {dtype}, expected float32."
    if head_dim > 256:
        return f"head dim is {head_dim}, at most 256."
    if compute == "int8" and not blobs and parameter_dtypes:
        return "compute='int8' takes the six weights of each layer as blobs: functional.quantize_linear(weight)."
    dtypes = {f"a parameter ({place})": dtype for place, dtype in enumerate(sorted(parameter_dtypes, key=str))}
    return _native.problem(device, requires_grad=requires_grad, **dtypes)


def encoder_fwd(
    *, x, parameters, cu_seqlens, seqused_k, max_seqlen, num_heads, eps, compute, return_hidden, wanted, cu_wanted, keep
):  # fmt: skip
    from vilt_fast import _C

    _native.check_on_cpu(cu_seqlens=cu_seqlens, seqused_k=seqused_k, wanted=wanted, cu_wanted=cu_wanted)
    rows, width = x.shape
    cu_seqlens, seqused_k = cu_seqlens.contiguous(), seqused_k.contiguous()
    if wanted is not None:
        wanted, cu_wanted = wanted.contiguous(), cu_wanted.contiguous()
    held, inner = [], None  # held: keeps contiguous copies alive during the call
    layers = LayerParameters.layers(parameters)
    for number, layer in enumerate(layers):
        layer, shapes = _opened(number, layer)
        inner = shapes["fc1"][0] if inner is None else inner
        for name, shape in shapes.items():
            want = (inner if name == "fc1" else width, inner if name == "fc2" else width)
            if shape != want:
                raise ValueError(
                    f"encoder: layer {number}: {name}_weight is {list(shape)}, expected {list(want)}; the native "
                    "encoder takes layers of one size."
                )
            bias = getattr(layer, f"{name}_bias")
            if bias.shape not in ((want[0],), (0,)):
                raise ValueError(
                    f"encoder: layer {number}: {name}_bias has shape {list(bias.shape)}, expected [{want[0]}], or [0] "
                    "for none."
                )
        held += layer
    out = x.new_empty(rows if wanted is None else len(wanted), width)
    hidden = x.new_empty(len(layers), rows, width) if return_hidden else None
    if len(out):
        x = x.contiguous()
        _C.encoder(
            x.data_ptr(), out.data_ptr(), _native.address(hidden), rows, width, len(layers),
            [_native.address(p) for p in held], [_native.NAMES[p.dtype] if p.numel() else "f32" for p in held], inner,
            num_heads, eps, cu_seqlens.data_ptr(), seqused_k.data_ptr(), len(seqused_k),
            _native.address(wanted), _native.address(cu_wanted), _COMPUTE[compute],
            torch.get_num_threads(),
        )  # fmt: skip
    return (hidden if return_hidden else out,), ()


def _opened(number, layer):
    """A layer with dense parameters, and the (N, K) of its matrices, which a blob knows of itself."""
    layer, shapes = layer._asdict(), {}
    for name in MATRICES:
        key = f"{name}_weight"
        if layer[key].dtype == torch.uint8:
            layer[key], shapes[name] = quantize_linear.opened(f"encoder: layer {number}: {key}", layer[key])
        else:
            shapes[name] = tuple(layer[key].shape)
    return LayerParameters(**{key: tensor.contiguous() for key, tensor in layer.items()}), shapes

"""The encoder on the CPU: csrc/cpu/encoder.cpp."""

import torch

from ...reference.encoder import MATRICES, LayerParameters
from ...remembered import once
from . import _native, quantize_linear

_LAYER = len(LayerParameters._fields)
#: Of each matrix: where its weight and bias are among the tensors of a layer.
_PLACES = {
    name: tuple(LayerParameters._fields.index(f"{name}_{kind}") for kind in ("weight", "bias")) for name in MATRICES
}
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
    layers, held = len(parameters) // _LAYER, parameters  # until the call is over
    if not once(parameters, "dense", lambda: all(p.is_contiguous() for p in parameters)):
        held = [p.contiguous() for p in parameters]
    if not once(held, "aligned", lambda: not _unaligned(held)):
        held = list(held)
        for place in _unaligned(held):
            held[place] = held[place].clone()
    inner, addresses, dtypes = once(held, ("native", width), lambda: _laid_out(held, layers, width))
    out = x.new_empty(rows if wanted is None else len(wanted), width)
    hidden = x.new_empty(layers, rows, width) if return_hidden else None
    if len(out):
        x = x.contiguous()
        _C.encoder(
            x.data_ptr(), out.data_ptr(), _native.address(hidden), rows, width, layers,
            addresses, dtypes, inner, num_heads, eps, cu_seqlens.data_ptr(), seqused_k.data_ptr(), len(seqused_k),
            _native.address(wanted), _native.address(cu_wanted), _COMPUTE[compute],
            torch.get_num_threads(),
        )  # fmt: skip
    return (hidden if return_hidden else out,), ()


def _unaligned(parameters):
    """Places of the blobs that the library cannot read where they lie."""
    return [place for place, p in enumerate(parameters) if p.dtype == torch.uint8 and not quantize_linear.aligned(p)]


def _laid_out(held, layers, width):
    """(inner, addresses, names of the dtypes) of the tensors of layers, all of one size."""
    inner = _size(held, _PLACES["fc1"][0])[0]
    for name, (weight, bias) in _PLACES.items():
        want = inner if name == "fc1" else width, inner if name == "fc2" else width
        for number in range(layers):
            size = _size(held, number * _LAYER + weight)
            if size != want:
                raise ValueError(
                    f"encoder: layer {number}: {name}_weight is {list(size)}, expected {list(want)}; the native "
                    "encoder takes layers of one size."
                )
            size = held[number * _LAYER + bias].shape
            if size != want[:1] and size != (0,):
                raise ValueError(
                    f"encoder: layer {number}: {name}_bias has shape {list(size)}, expected [{want[0]}], or [0] for "
                    "none."
                )
    return inner, [p.data_ptr() for p in held], [_native.NAMES.get(p.dtype, "f32") for p in held]


def _size(held, place):
    """(N, K) of a matrix, which a blob knows of itself."""
    matrix = held[place]
    if matrix.dtype != torch.uint8:
        return matrix.shape
    name = "encoder: layer {}: {}"
    return quantize_linear.opened(matrix, name, place // _LAYER, LayerParameters._fields[place % _LAYER])[1]

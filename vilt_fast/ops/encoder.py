"""encoder and quantize_linear: validation, choice of backend, torch.ops.vilt_fast.encoder.

Facts for `supports`: dtype (of x), compute, weights ("float" or "blob"), weight_dtypes (a set), requires_grad.
"""

import torch

from . import _check, registry

PER_LAYER = 16
WEIGHTS = (2, 4, 6, 8, 12, 14)  # q k v o fc1 fc2 within a layer's 16 parameters
COMPUTE = ("float32", "bfloat16", "int8")

torch.library.define(
    "vilt_fast::encoder",
    "(Tensor x, Tensor[] parameters, Tensor cu_seqlens, Tensor seqused_k, SymInt max_seqlen, int num_heads, "
    "float[] eps, str compute, bool return_hidden, str backend) -> Tensor",
)


@torch.library.impl("vilt_fast::encoder", "CompositeExplicitAutograd")
def _run(x, parameters, cu_seqlens, seqused_k, max_seqlen, num_heads, eps, compute, return_hidden, backend):
    return registry.launcher("encoder", backend)(
        x, parameters, cu_seqlens, seqused_k, max_seqlen, num_heads=num_heads, eps=eps, compute=compute,
        return_hidden=return_hidden,
    )  # fmt: skip


@torch.library.register_fake("vilt_fast::encoder")
def _fake(x, parameters, cu_seqlens, seqused_k, max_seqlen, num_heads, eps, compute, return_hidden, backend):
    return x.new_empty(len(parameters) // PER_LAYER, *x.shape) if return_hidden else x.new_empty(x.shape)


def _check_parameters(parameters, width, blobs):
    if not parameters or len(parameters) % PER_LAYER:
        raise ValueError(
            f"encoder: parameters holds {len(parameters)} tensors, expected 16 a layer (empty for a missing bias)."
        )

    def refuse(place, expected):
        raise ValueError(f"encoder: parameter {place} has shape {list(parameters[place].shape)}, expected {expected}.")

    for start in range(0, len(parameters), PER_LAYER):
        shapes = [tuple(p.shape) for p in parameters[start : start + PER_LAYER]]
        for i in (0, 1, 10, 11):
            if shapes[i] != (width,):
                refuse(start + i, f"[{width}] (LayerNorm)")
        if blobs:  # only the backend knows what is in them
            for i in WEIGHTS:
                if len(shapes[i]) != 1:
                    refuse(start + i, "a blob of quantize_linear: quantise all six weights of every layer, or none")
            continue
        inner = shapes[12][0]
        for i in WEIGHTS:
            out, columns = inner if i == 12 else width, inner if i == 14 else width
            if shapes[i] != (out, columns):
                refuse(start + i, f"[{out}, {columns}] ([out, in])")
            if shapes[i + 1] not in ((out,), (0,)):
                refuse(start + i + 1, f"[{out}], or [0] for none")


def encoder(x, parameters, cu_seqlens, seqused_k, max_seqlen, num_heads, eps, compute, return_hidden, backend):
    sizes = _check.shapes("encoder", x=(x, "N D"), cu_seqlens=(cu_seqlens, "B+1"), seqused_k=(seqused_k, "B"))
    if sizes["B"] < 1:
        raise ValueError("encoder: cu_seqlens has one entry, so there is no sample; expected B + 1 >= 2 entries.")
    if compute not in COMPUTE:
        raise ValueError(f"encoder: compute is {compute!r}, expected one of {', '.join(COMPUTE)}.")
    if sizes["D"] % num_heads:
        raise ValueError(f"encoder: hidden size {sizes['D']} is not a multiple of num_heads {num_heads}.")
    parameters, eps = list(parameters), [float(e) for e in eps]
    blobs = any(p.dtype == torch.uint8 for p in parameters)
    if blobs and compute != "int8":
        raise ValueError(f"encoder: compute is {compute!r} but the weights are quantised; use compute='int8'.")
    _check_parameters(parameters, sizes["D"], blobs)
    if len(eps) != 2 * (len(parameters) // PER_LAYER):
        raise ValueError(f"encoder: eps holds {len(eps)} numbers, expected 2 a layer (LN1, LN2).")
    _check.dtypes("encoder", (torch.float32, torch.float64), x=x)
    _check.dtypes("encoder", (torch.int32,), cu_seqlens=cu_seqlens, seqused_k=seqused_k)
    name = registry.resolve(
        "encoder", backend, x.device.type, dtype=x.dtype, compute=compute, weights="blob" if blobs else "float",
        weight_dtypes={p.dtype for p in parameters if p.numel()} - {torch.uint8},
        requires_grad=_check.needs_grad(x, *parameters),
    )  # fmt: skip
    if name in registry.PLAIN:
        return registry.launcher("encoder", name)(
            x, parameters, cu_seqlens, seqused_k, max_seqlen, num_heads=num_heads, eps=eps, compute=compute,
            return_hidden=return_hidden,
        )  # fmt: skip
    return torch.ops.vilt_fast.encoder(
        x, parameters, cu_seqlens, seqused_k, max_seqlen, num_heads, eps, compute, return_hidden, name
    )


def quantize_linear(weight, backend):
    _check.shapes("quantize_linear", weight=(weight, "N K"))
    _check.dtypes("quantize_linear", (torch.float32, torch.bfloat16), weight=weight)
    name = registry.resolve("quantize_linear", backend, weight.device.type, dtype=weight.dtype)
    return registry.launcher("quantize_linear", name)(weight)

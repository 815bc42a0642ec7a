"""encoder: a stack of pre-norm transformer blocks over packed rows."""

import dataclasses

import torch
from torch import Tensor

from ..reference.encoder import MATRICES, LayerParameters
from ..remembered import Known, once
from . import _check, registry
from ._define import Op

COMPUTE = ("float32", "bfloat16", "int8")
_LAYER = len(LayerParameters._fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts(registry.Facts):
    compute: str
    head_dim: int
    blobs: bool = False  #: the weights are those of quantize_linear
    parameter_dtypes: frozenset = frozenset()  #: of all that are no blobs
    requires_grad: bool = False


def _fake(
    x: Tensor, parameters: list[Tensor], cu_seqlens: Tensor, seqused_k: Tensor, max_seqlen: int, num_heads: int,
    eps: list[float], compute: str, return_hidden: bool, wanted: Tensor | None, cu_wanted: Tensor | None,
):  # fmt: skip
    if return_hidden:
        return (x.new_empty(len(parameters) // _LAYER, *x.shape),), ()
    return (x.new_empty(x.shape[0] if wanted is None else wanted.shape[0], x.shape[1]),), ()


def _validate(x, parameters, cu_seqlens, seqused_k, num_heads, eps, compute, return_hidden, wanted, cu_wanted):
    sizes = _check.shapes(
        "encoder", x=(x, "N D"), cu_seqlens=(cu_seqlens, "B+1"), seqused_k=(seqused_k, "B"), wanted=(wanted, "W"),
        cu_wanted=(cu_wanted, "B+1"),
    )  # fmt: skip
    if sizes["B"] < 1:
        raise ValueError("encoder: cu_seqlens has one entry, so there is no sample; expected B + 1 >= 2 entries.")
    if compute not in COMPUTE:
        raise ValueError(f"encoder: compute is {compute!r}, expected one of {', '.join(COMPUTE)}.")
    if sizes["D"] % num_heads:
        raise ValueError(f"encoder: hidden size {sizes['D']} is not a multiple of num_heads {num_heads}.")
    blobs = torch.uint8 in _dtypes(parameters)
    if blobs and compute != "int8":
        raise ValueError(f"encoder: compute is {compute!r} but the weights are quantised; use compute='int8'.")
    once(parameters, ("right", sizes["D"]), lambda: _check_parameters(parameters, sizes["D"], blobs))
    if len(eps) != 2 * (len(parameters) // _LAYER):
        raise ValueError(f"encoder: eps holds {len(eps)} numbers, expected 2 a layer (LN1, LN2).")
    _check.dtypes("encoder", (torch.float32, torch.float64), x=x)
    _check.dtypes("encoder", (torch.int32,), cu_seqlens=cu_seqlens, seqused_k=seqused_k)
    _check.offsets("encoder", "cu_seqlens", cu_seqlens, sizes["N"])
    _check.used("encoder", seqused_k, cu_seqlens)
    if (wanted is None) != (cu_wanted is None):
        raise ValueError("encoder: wanted and cu_wanted belong together; give both or neither.")
    if wanted is not None:
        _validate_wanted(wanted, cu_wanted, cu_seqlens, return_hidden)


def _validate_wanted(wanted, cu_wanted, cu_seqlens, return_hidden):
    if return_hidden:
        raise ValueError("encoder: return_hidden gives all rows of every layer; give no wanted rows with it.")
    _check.dtypes("encoder", (torch.int64,), wanted=wanted)
    _check.dtypes("encoder", (torch.int32,), cu_wanted=cu_wanted)
    _check.offsets("encoder", "cu_wanted", cu_wanted, len(wanted))
    if len(wanted) and _check.readable(wanted) and _check.readable(cu_seqlens):
        rows, starts, firsts = wanted.tolist(), cu_seqlens.tolist(), cu_wanted.tolist()
        for start, end, first, last in zip(starts, starts[1:], firsts, firsts[1:], strict=False):
            if first < last and not (start <= min(rows[first:last]) and max(rows[first:last]) < end):
                raise ValueError("encoder: wanted lists a row of another sample than cu_wanted says.")


def _check_parameters(parameters, width, blobs):
    if not parameters or len(parameters) % _LAYER:
        raise ValueError(
            f"encoder: parameters holds {len(parameters)} tensors, expected 16 a layer (empty for a missing bias)."
        )
    shapes = [p.shape for p in parameters]
    kinds = [p.dtype == torch.uint8 for p in parameters] if blobs else []
    right = None  # the shapes of a layer that has been looked at: few models have two kinds
    for start in range(0, len(parameters), _LAYER):
        end = start + _LAYER
        if (shapes[start:end], kinds[start:end]) != right:
            _check_layer(start, LayerParameters(*parameters[start:end]), width, blobs)
            right = shapes[start:end], kinds[start:end]


def _check_layer(start, p, width, blobs):
    def refuse(name, expected):
        place = start + LayerParameters._fields.index(name)
        given = list(getattr(p, name).shape)
        raise ValueError(f"encoder: parameter {place} ({name}) has shape {given}, expected {expected}.")

    for name in ("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias"):
        if getattr(p, name).shape != (width,):
            refuse(name, f"[{width}] (LayerNorm)")
    inner = None if blobs else p.fc1_weight.shape[0]
    for name in MATRICES:
        weight = getattr(p, f"{name}_weight")
        if blobs:  # only the backend knows what is in them
            if weight.dim() != 1 or weight.dtype != torch.uint8:
                refuse(f"{name}_weight", "a blob of quantize_linear: quantise all six weights of every layer, or none")
            continue
        rows, columns = inner if name == "fc1" else width, inner if name == "fc2" else width
        if weight.shape != (rows, columns):
            refuse(f"{name}_weight", f"[{rows}, {columns}] ([out, in])")
        if getattr(p, f"{name}_bias").shape not in ((rows,), (0,)):
            refuse(f"{name}_bias", f"[{rows}], or [0] for none")


def _facts(x, parameters, num_heads, compute, requires_grad):
    dtypes = _dtypes(parameters)
    return Facts(
        device=x.device.type, dtype=x.dtype, compute=compute, head_dim=x.shape[1] // num_heads,
        blobs=torch.uint8 in dtypes, parameter_dtypes=frozenset(dtypes - {torch.uint8}),
        requires_grad=requires_grad,
    )  # fmt: skip


def _dtypes(parameters):
    """Their dtypes; an empty tensor, which stands for no bias, is of none."""

    def found():
        dtypes = {p.dtype for p in parameters}
        return dtypes if len(dtypes - {torch.uint8}) < 2 else {p.dtype for p in parameters if p.numel()}

    return once(parameters, "dtypes", found)


_OP = Op("encoder", _fake, outputs=("stream",), validate=_validate, facts=_facts)


def encoder(
    x: Tensor,
    parameters: list[Tensor],
    cu_seqlens: Tensor,
    seqused_k: Tensor,
    max_seqlen: int,
    *,
    num_heads: int,
    eps: list[float],
    compute: str = "float32",
    return_hidden: bool = False,
    wanted: Tensor | None = None,
    cu_wanted: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A stack of pre-norm transformer blocks over packed rows, meant for inference.

    Each block: ``x += O(attention(QKV(LN1 x)))``, ``x += FC2(gelu(FC1(LN2 x)))``.

    Args:
        x: [N, D] float32 (reference: also float64), not modified.
        parameters: 16 tensors a layer, those of :class:`LayerParameters` in its order, end to end; weights [out, in], a
            missing bias is an empty tensor. The six weights of every layer may be blobs of :func:`quantize_linear`
            (``compute="int8"``, cpp); the reference takes float weights and emulates int8.
        cu_seqlens: [B + 1] int32; seqused_k: [B] int32, the leading rows of each sample that are keys; both on the CPU
            for the cpp backend. max_seqlen: upper bound of the lengths.
        eps: 2 numbers a layer (LN1, LN2).
        compute: how the operands of matrix products are represented: "float32", "bfloat16" or "int8" (weights per
            output channel, activations per row). The residual stream, norms and softmax are float32 in all three.
        return_hidden: return the stream after every layer.
        wanted: [W] int64, the rows that are wanted of the last layer, sample by sample; it computes nothing else for
            the others than their keys and values. cu_wanted: [B + 1] int32, where those of each sample begin in
            ``wanted``. None, both of them, for all rows.

    Returns:
        [N, D], the residual stream after the last layer, before the final norm, or its ``wanted`` rows [W, D];
        [layers, N, D] with ``return_hidden``.

    Source: Dosovitskiy et al. 2021, eq. 2-3.
    """
    parameters = parameters if type(parameters) is Known else list(parameters)
    eps = [float(e) for e in eps]
    _validate(x, parameters, cu_seqlens, seqused_k, num_heads, eps, compute, return_hidden, wanted, cu_wanted)
    name = _OP.resolve(backend, _facts(x, parameters, num_heads, compute, _check.needs_grad(x, *parameters)))
    arguments = dict(
        x=x, parameters=parameters, cu_seqlens=cu_seqlens, seqused_k=seqused_k, max_seqlen=max_seqlen,
        num_heads=num_heads, eps=eps, compute=compute, return_hidden=return_hidden, wanted=wanted, cu_wanted=cu_wanted,
    )  # fmt: skip
    return _OP.plain(name, **arguments) if name in registry.PLAIN else _OP(name, **arguments)[0]

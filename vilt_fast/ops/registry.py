"""Which function computes which op: the only dispatch in the project.

Every row of ``_ROWS`` reads (op, backend) -> "module:launcher". A module is imported when its op is first wanted.

A launcher is called by keyword, with the arguments of the op's fake (``vilt_fast/ops/<op>.py``), already validated, and
``keep``: whether a gradient will be wanted. It returns ``(outputs, kept)``, two tuples of tensors; without ``keep``,
kept is empty. A backward (``<op>_bwd``) gets what its own fake names and returns ``(gradients, ())``, None where one is
not needed. The backends in ``PLAIN`` are ordinary PyTorch, differentiated by autograd: they take and return what the
public function does.

The module of a launcher may define

    supports(*, device=None, dtype=None, ...) -> str      "" when it can do it, else what is missing or what to do

and that is the one place where a backend states its limits (dtypes, head dims, sizes, build). It is asked with the
op's ``Facts``, by name, and must name each one: a call that wants something its backend has not heard of is refused.
Called without facts it says whether the backend can run on this machine at all.
"""

import dataclasses
import functools
import importlib
import inspect

import torch

from .. import order, record

PLAIN = ("reference", "torch")
_ORDER = ("cpp", "torch", "reference")
_GPUS = {"cuda"}  #: types of device whose order is that of `order.py`

_ROWS = {
    ("patch_embed", "reference"): "vilt_fast.reference.patch_embed:patch_embed",
    ("patch_embed", "cpp"): "vilt_fast.backends.cpp.patch_embed:patch_embed_fwd",
    ("patch_embed", "triton"): "vilt_fast.kernels.patch_embed:patch_embed_fwd",
    ("patch_embed_bwd", "cpp"): "vilt_fast.backends.cpp.patch_embed:patch_embed_bwd",
    ("patch_embed_bwd", "triton"): "vilt_fast.kernels.patch_embed_bwd:patch_embed_bwd",
    ("text_embed", "reference"): "vilt_fast.reference.text_embed:text_embed",
    ("text_embed", "triton"): "vilt_fast.kernels.text_embed:text_embed_fwd",
    ("text_embed_bwd", "triton"): "vilt_fast.kernels.text_embed:text_embed_bwd",
    ("attention", "reference"): "vilt_fast.reference.attention:attention",
    ("attention", "torch"): "vilt_fast.backends.sdpa:attention",
    ("attention", "cpp"): "vilt_fast.backends.cpp.attention:attention_fwd",
    ("attention", "triton"): "vilt_fast.kernels.attention:attention_fwd",
    ("attention_bwd", "cpp"): "vilt_fast.backends.cpp.attention:attention_bwd",
    ("attention_bwd", "triton"): "vilt_fast.kernels.attention_bwd:attention_bwd",
    ("add_layer_norm", "reference"): "vilt_fast.reference.add_layer_norm:add_layer_norm",
    ("add_layer_norm", "cpp"): "vilt_fast.backends.cpp.add_layer_norm:add_layer_norm_fwd",
    ("add_layer_norm", "triton"): "vilt_fast.kernels.add_layer_norm:add_layer_norm_fwd",
    ("add_layer_norm_bwd", "cpp"): "vilt_fast.backends.cpp.add_layer_norm:add_layer_norm_bwd",
    ("add_layer_norm_bwd", "triton"): "vilt_fast.kernels.add_layer_norm:add_layer_norm_bwd",
    ("linear", "reference"): "vilt_fast.reference.linear:linear",
    ("linear", "cpp"): "vilt_fast.backends.cpp.linear:linear_fwd",
    ("linear", "triton"): "vilt_fast.kernels.linear:linear_fwd",
    ("linear_bwd", "cpp"): "vilt_fast.backends.cpp.linear:linear_bwd",
    ("linear_bwd", "triton"): "vilt_fast.kernels.linear:linear_bwd",
    ("linear_gelu", "reference"): "vilt_fast.reference.linear_gelu:linear_gelu",
    ("linear_gelu", "cpp"): "vilt_fast.backends.cpp.linear_gelu:linear_gelu_fwd",
    ("linear_gelu", "triton"): "vilt_fast.kernels.linear_gelu:linear_gelu_fwd",
    ("linear_gelu_bwd", "cpp"): "vilt_fast.backends.cpp.linear_gelu:linear_gelu_bwd",
    ("linear_gelu_bwd", "triton"): "vilt_fast.kernels.linear_gelu:linear_gelu_bwd",
    ("linear_qkv", "reference"): "vilt_fast.reference.linear_qkv:linear_qkv",
    ("linear_qkv", "triton"): "vilt_fast.kernels.linear_qkv:linear_qkv_fwd",
    ("linear_qkv_bwd", "triton"): "vilt_fast.kernels.linear_qkv:linear_qkv_bwd",
    ("encoder", "reference"): "vilt_fast.reference.encoder:encoder",
    ("encoder", "cpp"): "vilt_fast.backends.cpp.encoder:encoder_fwd",
    ("quantize_linear", "cpp"): "vilt_fast.backends.cpp.quantize_linear:quantize_linear_fwd",
    ("fingerprint", "cpp"): "vilt_fast.backends.cpp.fingerprint:fingerprint_fwd",
    ("ipot", "reference"): "vilt_fast.reference.ipot:ipot",
    ("ipot", "cpp"): "vilt_fast.backends.cpp.ipot:ipot_fwd",
    ("ipot", "triton"): "vilt_fast.kernels.ipot:ipot_fwd",
    ("ipot", "cuda"): "vilt_fast.backends.cuda.ipot:ipot_fwd",
    ("sinkhorn", "reference"): "vilt_fast.reference.sinkhorn:sinkhorn",
    ("sinkhorn", "cpp"): "vilt_fast.backends.cpp.sinkhorn:sinkhorn_fwd",
    ("sinkhorn", "triton"): "vilt_fast.kernels.sinkhorn:sinkhorn_fwd",
    ("sinkhorn", "cuda"): "vilt_fast.backends.cuda.sinkhorn:sinkhorn_fwd",
    ("word_patch_distance", "reference"): "vilt_fast.reference.word_patch_distance:word_patch_distance",
    ("word_patch_distance", "cpp"): "vilt_fast.backends.cpp.word_patch_distance:word_patch_distance_fwd",
    ("word_patch_distance", "triton"): "vilt_fast.kernels.word_patch_distance:word_patch_distance_fwd",
    ("word_patch_distance", "cuda"): "vilt_fast.backends.cuda.word_patch_distance:word_patch_distance_fwd",
    ("word_patch_distance_bwd", "cpp"): "vilt_fast.backends.cpp.word_patch_distance:word_patch_distance_bwd",
    ("word_patch_distance_bwd", "triton"): "vilt_fast.kernels.word_patch_distance:word_patch_distance_bwd",
    ("linear_int8", "cpp"): "vilt_fast.backends.cpp.linear_int8:linear_int8_fwd",
    ("linear_fp8", "reference"): "vilt_fast.reference.linear_fp8:linear_fp8",
    ("linear_fp8", "triton"): "vilt_fast.kernels.linear_fp8:linear_fp8_fwd",
    ("quantize_fp8", "reference"): "vilt_fast.reference.linear_fp8:quantize_fp8",
    ("quantize_fp8", "triton"): "vilt_fast.kernels.linear_fp8:quantize_fp8_fwd",
    ("linear_gelu_fp8", "reference"): "vilt_fast.reference.linear_gelu_fp8:linear_gelu_fp8",
    ("linear_gelu_fp8", "triton"): "vilt_fast.kernels.linear_fp8:linear_gelu_fp8_fwd",
    ("add_layer_norm_fp8", "reference"): "vilt_fast.reference.add_layer_norm_fp8:add_layer_norm_fp8",
    ("add_layer_norm_fp8", "triton"): "vilt_fast.kernels.add_layer_norm_fp8:add_layer_norm_fp8_fwd",
    ("linear_cross_entropy", "reference"): "vilt_fast.reference.linear_cross_entropy:linear_cross_entropy",
    ("linear_cross_entropy", "triton"): "vilt_fast.kernels.linear_cross_entropy:linear_cross_entropy_fwd",
    ("linear_cross_entropy_bwd", "triton"): "vilt_fast.kernels.linear_cross_entropy:linear_cross_entropy_bwd",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What a backend is asked about a call. Each op derives its own; a default is the case that asks for nothing."""

    device: str  #: type of the device that the tensors are on
    dtype: torch.dtype
    #: of the call, for the order of backends alone: no backend is asked about it
    size: str = dataclasses.field(default="any", metadata={"asked": False})


class _Slot:
    """A row, filled when it is first wanted."""

    # Slots rather than a cache dict: torch.compile reads a slot only after `_import` has filled it, whereas a dict that
    # grows while it is being traced looks stale to it.

    def __init__(self, where):
        self.where = where
        self.launcher = None
        self.supports = None
        self.heard = ()  #: names of the facts that `supports` takes


_SLOTS = {key: _Slot(where) for key, where in _ROWS.items()}


@torch.compiler.assume_constant_result
def _import(op, backend):
    slot = _SLOTS[op, backend]
    if slot.launcher is None:
        module_name, _, function_name = slot.where.partition(":")
        module = importlib.import_module(module_name)
        slot.supports = getattr(module, "supports", None)
        if slot.supports is not None:
            parameters = inspect.signature(slot.supports).parameters.values()
            if any(p.kind is not p.KEYWORD_ONLY for p in parameters):
                raise TypeError(
                    f"{module_name}.supports must take each fact by name: def supports(*, device=None, ...)."
                )
            slot.heard = tuple(p.name for p in parameters)
        slot.launcher = getattr(module, function_name)
    return True


def why_unavailable(op, backend, facts=None, **some):
    """ "" when ``backend`` can compute ``op``, else why not: with all the facts of a call, with some, or at all."""
    _import(op, backend)
    slot = _SLOTS[op, backend]
    if slot.supports is None:
        return ""
    if facts is None:
        return slot.supports(**some)
    # torch.compile traces through a cache, and warns of it.
    return (_asked if torch.compiler.is_compiling() else _remembered)(op, backend, facts)


def _asked(op, backend, facts):
    slot, named = _SLOTS[op, backend], {}
    for field in dataclasses.fields(facts):
        if not field.metadata.get("asked", True):
            continue
        value = getattr(facts, field.name)
        if field.name in slot.heard:
            named[field.name] = value
        elif value != field.default:
            return f"its supports() has not heard of {field.name}, which is {value!r} here."
    return slot.supports(**named)


_remembered = functools.lru_cache(maxsize=1024)(_asked)


def backends(op):
    """The backends written for ``op``, in no particular order."""
    return [backend for name, backend in _SLOTS if name == op]


def launcher(op, backend):
    """The function behind (op, backend)."""
    _import(op, backend)
    return _SLOTS[op, backend].launcher


@torch.compiler.assume_constant_result
def asked_in_turn(op, device, size="any"):
    """The backends that are asked for ``op`` on a type of device, for calls of a size, in order."""
    return order.entry(op, size).backends if device in _GPUS else _ORDER


@torch.compiler.assume_constant_result
def fused(op, device, dtype, size="any"):
    """Whether a kernel of ours comes first for ``op``, and neither order.csv nor a campaign says `FUSED=False`."""
    asked = (name for name in asked_in_turn(op, device, size) if (op, name) in _SLOTS)
    first = next((name for name in asked if not why_unavailable(op, name, device=device, dtype=dtype)), "reference")
    return first not in PLAIN and order.chosen(op, size).get("FUSED", True)


def size_of(tensor, dims=1):
    """The size of a call on rows that have so many dimensions, the last, for the order of backends, where that asks."""
    if torch.compiler.is_compiling() or not isinstance(tensor, torch.Tensor):
        return "any"  # a graph is for all sizes; what is no tensor is refused later
    return order.size_of(tensor.shape[:-dims].numel()) if tensor.device.type in _GPUS else "any"


def resolve(op, backend, facts):
    """Name of the backend that computes ``op``.

    Args:
        op: name of the op, e.g. ``"attention"``.
        backend: a name, or None for the first of the device's order that supports ``facts``
            (cuda: as order.csv has it; anything else: cpp, torch, reference).
        facts: what the call needs, the op's own kind of :class:`Facts`.

    Raises:
        ValueError: ``backend`` does not exist for this op.
        RuntimeError: ``backend`` was asked for by name and cannot do it (never falls back), or none can.
    """
    if backend is not None:
        if (op, backend) not in _SLOTS:
            raise ValueError(f"{op}: no backend {backend!r}; there are {', '.join(sorted(backends(op)))}.")
        reason = why_unavailable(op, backend, facts)
        if reason:
            raise RuntimeError(f"{op}: backend {backend!r} cannot run this call: {reason}")
        record.say_op(op, backend, ())
        return backend
    reasons = []
    for name in asked_in_turn(op, facts.device, facts.size):
        if (op, name) not in _SLOTS:
            continue
        reason = why_unavailable(op, name, facts)
        if not reason:
            record.say_op(op, name, reasons)
            return name
        reasons.append(f"{name}: {reason}")
    raise RuntimeError(f"{op}: no backend can run this call. {' '.join(reasons)}")


def availability():
    """Rows (op, backend, reason): reason is "" where the backend can run on this machine, else what is missing."""
    rows = []
    for op, backend in _SLOTS:
        try:
            reason = why_unavailable(op, backend)
        except ImportError as error:
            reason = f"{error}."
        rows.append((op, backend, reason))
    return rows

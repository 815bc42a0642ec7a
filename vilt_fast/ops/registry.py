"""Which function computes which op: the only dispatch in the project.

Every row of ``_ROWS`` reads (op, backend) -> "module:launcher". A module is imported when its op is first wanted. It
may define

    supports(op, **facts) -> str      "" when it can do it, else what is missing or what to do instead

and that is the one place where a backend states its limits (dtypes, head dims, sizes, build). ``supports(op)`` without
facts says whether it can run at all on this machine. The facts an op passes are listed in ``vilt_fast/ops/<op>.py``.

A launcher takes the arguments of ``vilt_fast.functional.<op>`` without ``backend``, already validated. The backends in
``PLAIN`` are ordinary PyTorch: called directly, differentiated by autograd. All others run behind
``torch.ops.vilt_fast.<op>``.
"""

import importlib
from types import SimpleNamespace

import torch

PLAIN = ("reference", "torch")
_ORDER = {"cuda": ("cuda", "triton", "torch", "reference"), "cpu": ("cpp", "torch", "reference")}
# Where an op has another order: cuBLAS multiplies until a kernel of ours has been shown to be faster.
_ORDER_OF = {("linear", "cuda"): ("reference", "triton")}

_ROWS = {
    ("patch_embed", "reference"): "vilt_fast.reference.patch_embed:patch_embed",
    ("patch_embed", "cpp"): "vilt_fast.backends.cpp:patch_embed_fwd",
    ("patch_embed", "triton"): "vilt_fast.kernels.patch_embed:patch_embed_fwd",
    ("patch_embed_bwd", "triton"): "vilt_fast.kernels.patch_embed_bwd:patch_embed_bwd",
    ("text_embed", "reference"): "vilt_fast.reference.text_embed:text_embed",
    ("text_embed", "triton"): "vilt_fast.kernels.text_embed:text_embed_fwd",
    ("text_embed_bwd", "triton"): "vilt_fast.kernels.text_embed:text_embed_bwd",
    ("attention", "reference"): "vilt_fast.reference.attention:attention",
    ("attention", "torch"): "vilt_fast.backends.sdpa:attention_fwd",
    ("attention", "cpp"): "vilt_fast.backends.cpp:attention_fwd",
    ("attention", "triton"): "vilt_fast.kernels.attention:attention_fwd",
    ("attention_bwd", "triton"): "vilt_fast.kernels.attention_bwd:attention_bwd",
    ("add_layer_norm", "reference"): "vilt_fast.reference.add_layer_norm:add_layer_norm",
    ("add_layer_norm", "triton"): "vilt_fast.kernels.add_layer_norm:add_layer_norm_fwd",
    ("add_layer_norm_bwd", "triton"): "vilt_fast.kernels.add_layer_norm:add_layer_norm_bwd",
    ("linear", "reference"): "vilt_fast.reference.linear:linear",
    ("linear", "triton"): "vilt_fast.kernels.linear:linear_fwd",
    ("linear_gelu", "reference"): "vilt_fast.reference.linear_gelu:linear_gelu",
    ("linear_gelu", "cpp"): "vilt_fast.backends.cpp:linear_gelu_fwd",
    ("linear_gelu", "triton"): "vilt_fast.kernels.linear_gelu:linear_gelu_fwd",
    ("linear_gelu_bwd", "triton"): "vilt_fast.kernels.linear_gelu:linear_gelu_bwd",
    ("encoder", "reference"): "vilt_fast.reference.encoder:encoder",
    ("encoder", "cpp"): "vilt_fast.backends.cpp:encoder_fwd",
    ("quantize_linear", "cpp"): "vilt_fast.backends.cpp:quantize_linear",
    ("ipot", "reference"): "vilt_fast.reference.ipot:ipot",
    ("ipot", "cpp"): "vilt_fast.backends.cpp_transport:ipot_fwd",
    ("ipot", "triton"): "vilt_fast.kernels.ipot:ipot_fwd",
    ("ipot", "cuda"): "vilt_fast.backends.cuda_transport:ipot_fwd",
    ("sinkhorn", "reference"): "vilt_fast.reference.sinkhorn:sinkhorn",
    ("sinkhorn", "cpp"): "vilt_fast.backends.cpp_transport:sinkhorn_fwd",
    ("sinkhorn", "triton"): "vilt_fast.kernels.sinkhorn:sinkhorn_fwd",
    ("sinkhorn", "cuda"): "vilt_fast.backends.cuda_transport:sinkhorn_fwd",
    ("word_patch_distance", "reference"): "vilt_fast.reference.word_patch_distance:word_patch_distance",
    ("word_patch_distance", "cpp"): "vilt_fast.backends.cpp_transport:word_patch_distance_fwd",
    ("word_patch_distance", "triton"): "vilt_fast.kernels.word_patch_distance:word_patch_distance_fwd",
    ("word_patch_distance", "cuda"): "vilt_fast.backends.cuda_transport:word_patch_distance_fwd",
    ("word_patch_distance_bwd", "cpp"): "vilt_fast.backends.cpp_transport:word_patch_distance_bwd",
    ("word_patch_distance_bwd", "triton"): "vilt_fast.kernels.word_patch_distance:word_patch_distance_bwd",
    ("linear_fp8", "reference"): "vilt_fast.reference.linear_fp8:linear_fp8",
    ("linear_fp8", "triton"): "vilt_fast.kernels.linear_fp8:linear_fp8_fwd",
    ("quantize_fp8", "reference"): "vilt_fast.reference.linear_fp8:quantize_fp8",
    ("quantize_fp8", "triton"): "vilt_fast.kernels.linear_fp8:quantize_fp8",
    ("linear_cross_entropy", "reference"): "vilt_fast.reference.linear_cross_entropy:linear_cross_entropy",
    ("linear_cross_entropy", "triton"): "vilt_fast.kernels.linear_cross_entropy:linear_cross_entropy_fwd",
    ("linear_cross_entropy_bwd", "triton"): "vilt_fast.kernels.linear_cross_entropy:linear_cross_entropy_bwd",
}
# One slot an entry, filled on first use. Slots rather than a cache dict: torch.compile reads a slot only after
# `_import` has filled it, whereas a dict that grows while it is being traced looks stale to it.
_SLOTS = {key: SimpleNamespace(where=where) for key, where in _ROWS.items()}


@torch.compiler.assume_constant_result
def _import(op, backend):
    slot = _SLOTS[op, backend]
    if not hasattr(slot, "launcher"):
        module_name, _, function_name = slot.where.partition(":")
        module = importlib.import_module(module_name)
        slot.supports = getattr(module, "supports", None)
        slot.launcher = getattr(module, function_name)
    return True


def why_unavailable(op, backend, **facts):
    """ "" when ``backend`` can compute ``op`` (with these facts, or at all on this machine), else why not."""
    _import(op, backend)
    supports = _SLOTS[op, backend].supports
    return "" if supports is None else supports(op, **facts)


def backends(op):
    """The backends written for ``op``, in no particular order."""
    return [backend for name, backend in _SLOTS if name == op]


def launcher(op, backend):
    """The function behind (op, backend)."""
    _import(op, backend)
    return _SLOTS[op, backend].launcher


def resolve(op, backend, device, **facts):
    """Name of the backend that computes ``op``.

    Args:
        op: name of the op, e.g. ``"attention"``.
        backend: a name, or None for the first of the device's order that supports ``facts``
            (cuda: cuda, triton, torch, reference, but for ``linear``; anything else: cpp, torch, reference).
        device: device type of the inputs, ``"cpu"``, ``"cuda"``, ...
        facts: what the call needs, handed to the backend's ``supports``.

    Raises:
        ValueError: ``backend`` does not exist for this op.
        RuntimeError: ``backend`` was asked for by name and cannot do it (never falls back), or none can.
    """
    facts["device"] = device
    if backend is not None:
        if (op, backend) not in _SLOTS:
            raise ValueError(f"{op}: no backend {backend!r}; there are {', '.join(sorted(backends(op)))}.")
        reason = why_unavailable(op, backend, **facts)
        if reason:
            raise RuntimeError(f"{op}: backend {backend!r} cannot run this call: {reason}")
        return backend
    reasons = []
    kind = "cuda" if device == "cuda" else "cpu"
    for name in _ORDER_OF.get((op, kind), _ORDER[kind]):
        if (op, name) not in _SLOTS:
            continue
        reason = why_unavailable(op, name, **facts)
        if not reason:
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

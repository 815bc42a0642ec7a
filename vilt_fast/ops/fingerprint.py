"""fingerprint: hashes of the bits of tensors, by which what was made of a weight knows that the weight has changed."""

from collections.abc import Sequence

from torch import Tensor

from ..remembered import once
from . import registry

_FAR = 1021  #: elements between those that a sample looks at, at most


def why_unavailable(device: str) -> str:
    """Why tensors on a device have none, or ""."""
    return registry.why_unavailable("fingerprint", "cpp", device=device)


def fingerprint(tensors: Sequence[Tensor], whole: Sequence[bool]) -> list[int]:
    """A 64-bit hash of each tensor on the CPU, any dtype and strides: of all bits where `whole` says so, else of some.

    A sample looks at every 1021st element or, where rows are shorter, no further apart than a row is long, so at one or
    more of every row, and at their neighbours in the same 64 bytes. It holds for a tensor where it lies: a copy may
    have another hash of a sample. Needs the native library (RuntimeError without it).
    """
    if reason := why_unavailable("cpu"):
        raise RuntimeError(f"fingerprint: {reason}")
    launch = registry.launcher("fingerprint", "cpp")
    steps = once(tensors, "steps", lambda: [_step(tensor) for tensor in tensors])
    if any(whole):
        steps = [0 if all_of_it else step for step, all_of_it in zip(steps, whole, strict=True)]
    (hashes,), _ = launch(tensors=tensors, steps=steps, keep=False)
    return hashes


def _step(tensor):
    # Not by the length of a row: the columns take turns.
    return max(1, min(_FAR, tensor.shape[-1] - 1)) if tensor.dim() else 1

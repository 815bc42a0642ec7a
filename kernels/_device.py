"""What Triton launchers ask about the machine: interpreter or GPU, which architecture, how many multiprocessors."""

import contextlib
import functools

import torch
from triton import knobs

from .. import order

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@torch.compiler.assume_constant_result
def interpreted():
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return bool(knobs.runtime.interpret)


@functools.cache
def _arch(index):
    """`arch` of a GPU: asked once, for it stays what it is."""
    if torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def _index(device):
    """Number of a GPU, of the current one where only its type is known."""
    index = None if device is None else torch.device(device).index
    return torch.cuda.current_device() if index is None else index


@torch.compiler.assume_constant_result
def _gpu_problem(device):
    if not torch.cuda.is_available():
        return "no CUDA or ROCm device is visible to torch; without one, TRITON_INTERPRET=1 runs kernels on the CPU."
    number = _arch(_index(device))
    if 0 < number < 80:
        return f"the GPU has compute capability {number // 10}.{number % 10}, expected 8.0 or newer."
    return ""


@torch.compiler.assume_constant_result
def has_e4m3(device=None):
    """Whether a GPU (the current one, unless the device has a number) multiplies e4m3."""
    return torch.cuda.is_available() and multiplies_e4m3(_arch(_index(device)))


def problem(device=None, **dtypes):
    """ "" when Triton can run here on tensors of these dtypes on a device (or type of one), else why not."""
    kind = None if device is None else torch.device(device).type
    if kind == "cpu" and not interpreted():
        return (
            "tensors are on the CPU, where Triton only runs in its interpreter (slow, for tests): "
            "set TRITON_INTERPRET=1 before Python starts, or move the tensors to a GPU."
        )
    if kind not in (None, "cpu", "cuda"):
        return f"tensors are on {device}, it runs on CUDA and ROCm devices."
    if not interpreted() and (reason := _gpu_problem(device)):
        return reason
    for name, dtype in dtypes.items():
        if dtype is None:
            continue
        if dtype not in FLOATS:
            return f"{name} is {dtype}, expected float32, float16 or bfloat16."
        if dtype == torch.bfloat16 and kind == "cpu":
            return f"{name} is bfloat16, which Triton's interpreter gets wrong; use float32 or float16 there."
    return ""


def arch(tensor):
    """80, 89, 90, 100, ... for NVIDIA, 0 for anything else (AMD, the interpreter)."""
    return _arch(tensor.device.index) if tensor.is_cuda else 0


def multiplies_e4m3(arch):
    """Whether an architecture multiplies e4m3 as torch and NVIDIA define it."""
    return arch >= 89


def precision(arch, *rounded_to):
    """How float32 operands are multiplied: three TF32 products on NVIDIA tensor cores, plain float32 elsewhere.

    With `rounded_to`, dtypes of the result: one TF32 product (10 bits) is enough for float16 and bfloat16.
    """
    if not arch:
        return "ieee"
    return "tf32x3" if not rounded_to or torch.float32 in rounded_to else "tf32"


def configuration(op, arch, rows):
    """What a kernel takes in place of its own configuration where a campaign has measured better; {} elsewhere."""
    return order.configuration(op, arch, rows)


@functools.cache
def _multiprocessors(index):
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(tensor):
    return _multiprocessors(tensor.device.index) if tensor.is_cuda else 4


def on(tensor):
    """Context in which a launch goes to the device of ``tensor``."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()

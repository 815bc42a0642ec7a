"""What the launchers of the CUDA kernels share.

`_C` takes device addresses, sizes and a stream; every shape and dtype has been checked. Nothing waits for the device.
"""

import contextlib

import torch

from ..cpp import _native

FLOATS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
LARGEST = 1024  # words, patches


@torch.compiler.assume_constant_result
def _missing():
    if missing := _native.missing():
        return missing
    from vilt_fast import _C

    if not getattr(_C, "cuda_archs", None):
        return "vilt_fast._C was built without CUDA; VILT_FAST_CUDA=1 pip install . with nvcc builds it."
    try:
        return "" if _C.cuda_devices() else f"it is built ({_C.cuda_archs}), but no GPU is visible."
    except RuntimeError as error:
        return f"it is built ({_C.cuda_archs}), but cannot run here. {error}"


def problem(device, dtype, rows, columns):
    """Why the kernels cannot take so many words and patches of this dtype on this device, or ""."""
    if device not in (None, "cuda"):
        return f"tensors are on {device}, it runs on NVIDIA GPUs."
    if missing := _missing():
        return missing
    if dtype is not None and dtype not in FLOATS:
        return f"dtype is {dtype}, expected float32, float16 or bfloat16."
    if max(rows, columns) > LARGEST:
        return f"there are {rows} words and {columns} patches, at most {LARGEST} of each."
    return ""


@contextlib.contextmanager
def stream(device):
    """The current stream of the device, which is the current one meanwhile."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream().cuda_stream


def pairs(text_pad, image_pad):
    """Masks that stay alive, and their addresses and sizes."""
    masks = text_pad.contiguous(), image_pad.contiguous()
    return masks, [*(mask.data_ptr() for mask in masks), *text_pad.shape, image_pad.shape[1]]

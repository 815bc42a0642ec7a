"""What the launchers of `vilt_fast._C` share.

`_C` takes addresses, sizes and strides, and trusts them: what launchers are given has been validated (`ops/<op>.py`).
"""

import torch

INTERFACE = 3  #: of the library: what its bindings take
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.uint8: "q8"}


@torch.compiler.assume_constant_result
def missing():
    """Why there is no native library, or ""."""
    try:
        from vilt_fast import _C
    except ImportError as error:
        return f"the native library vilt_fast._C is not built; pip install . with a C++ compiler ({error})."
    # An editable install can pull newer Python over an older library.
    same = getattr(_C, "interface", 0) == INTERFACE
    return "" if same else "the native library vilt_fast._C was built of other sources than these; build it again."


def problem(device, *, requires_grad=False, dropout=False, **dtypes):
    """Why the library cannot take tensors on this device and of these dtypes, or ""."""
    if reason := missing():
        return reason
    if device not in (None, "cpu"):
        return f"tensors are on {device}, it runs on the CPU."
    if requires_grad:
        return "it has no backward and an input requires a gradient; use torch.no_grad() or another backend."
    if dropout:
        return "it has no dropout."
    for name, dtype in dtypes.items():
        if dtype is not None and dtype not in (torch.float32, torch.bfloat16):
            return f"{name} is {dtype}, expected float32 or bfloat16."
    return ""


def address(tensor):
    """Of the first element; 0 for None and for empty tensors."""
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def as_float32(tensor):
    """Dense float32 values without a gradient; None stays."""
    return None if tensor is None else tensor.detach().to(torch.float32).contiguous()


def dense_rows(tensor):
    """The same [rows, H, d] or [rows, K] values with everything but the rows dense; no copy for a column slice."""
    inner = tensor.shape[-1]
    dense = tensor.stride(-1) == 1 and (tensor.dim() == 2 or tensor.stride(-2) == inner)
    width = inner if tensor.dim() == 2 else inner * tensor.shape[-2]
    return tensor if dense and tensor.stride(0) >= width else tensor.contiguous()


def check_on_cpu(**tensors):
    """ValueError for what the library would read on another device."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}; the cpp backend reads it on the CPU.")

"""Images of any depth as ViLT's processors take them: RGB, 8 bits, looking as they do elsewhere."""

from ..errors import InputError


def rgb(image):
    """`image` as a PIL image in RGB.

    Args:
        image: a PIL image; or an array or tensor [height, width, 3], or in grey [height, width] or [height, width, 1]:
            uint8; uint16, 0 to 65535; or floats, 0 to 1 or, where the largest is above 1, 0 to 255. Pillow's modes
            "I;16", "I" and "F", which its own conversion cuts off at 255, are scaled likewise ("I" is 16 bits where the
            largest value is above 255).

    Raises:
        TypeError: no image, or another shape or dtype. InputError: no pixels, or values out of range.
    """
    import numpy as np
    import torch
    from PIL import Image

    if isinstance(image, Image.Image):
        if not all(image.size):
            raise InputError(f"align: an image must have pixels, got {image.height} x {image.width}.")
        if not image.mode.startswith(("I", "F")):
            return image.convert("RGB")
        array = np.asarray(image)
    elif isinstance(image, torch.Tensor):
        array = image.detach().to("cpu", torch.float32 if image.is_floating_point() else image.dtype).numpy()
    else:
        array = image if isinstance(image, np.ndarray) else None
    kinds = (
        "uint8",
        "uint16",
        "float16",
        "float32",
        "float64",
        *(("int32",) if isinstance(image, Image.Image) else ()),
    )
    shaped = array is not None and (array.ndim == 2 or array.ndim == 3 and array.shape[2] in (1, 3))
    if not shaped or array.dtype.name not in kinds:
        given = type(image).__name__ if array is None else f"{array.dtype} {list(array.shape)}"
        turn = (
            " Channels come last: .permute(1, 2, 0)." if array is not None and array.shape[:1] in ((1,), (3,)) else ""
        )
        raise TypeError(
            "align: an image must be a PIL image or an array [height, width, 3] of uint8, uint16 or floats, got "
            f"{given}.{turn} Open a file with PIL.Image.open; pass what a processor has made as a mapping."
        )
    if not array.size:
        raise InputError(f"align: an image must have pixels, got {list(array.shape)}.")
    if array.dtype != np.uint8:
        array = _bytes(array)
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    return Image.fromarray(array).convert("RGB")


def _bytes(array):
    """Values of another depth as uint8, the nearest."""
    import numpy as np

    low, high = float(array.min()), float(array.max())
    if array.dtype == np.uint16 or array.dtype == np.int32 and high > 255:
        most = 65535
    else:
        most = 1 if array.dtype.kind == "f" and high <= 1 else 255
    if not 0 <= low <= high <= most:  # NaN too
        raise InputError(
            f"align: the image holds {array.dtype} values from {low:.6g} to {high:.6g}; expected 0 to 1 or 0 to 255 "
            "for floats, 0 to 65535 for whole numbers: scale it, before any normalisation."
        )
    return np.rint(array.astype(np.float64) * (255 / most)).astype(np.uint8)

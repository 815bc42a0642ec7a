"""HuggingFace's own image processor, which is the definition of right: its class, its sizes, its arithmetic.

It is the one on Pillow and NumPy, which is what ViLT was trained with; torchvision's resize gives other pixels.
"""

from __future__ import annotations

import numpy as np

try:
    from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil as Reference
    from transformers.models.vilt.image_processing_pil_vilt import get_resize_output_image_size
except ImportError:
    try:  # releases up to 5.0
        from transformers.models.vilt.image_processing_vilt import ViltImageProcessor as Reference
        from transformers.models.vilt.image_processing_vilt import get_resize_output_image_size
    except ImportError as error:
        raise ImportError(
            f'vilt_fast.ImageProcessor needs transformers and Pillow; run: pip install "vilt_fast[hf]" ({error})'
        ) from error

#: The name that is saved with a processor, for whoever loads it without vilt_fast.
SAVED_AS = "ViltImageProcessor"

#: Whether the reference turns images into RGB when told to (`do_convert_rgb`); up to 5.0 it does not know the word.
CONVERTS = hasattr(Reference, "process_image")

#: Sides that the reference may take for a number of channels; what it makes of such images depends on the release.
AMBIGUOUS = (1, 3, 4)


def target_size(height: int, width: int, shorter: int, divisor: int) -> tuple[int, int]:
    """(height, width) that the reference resizes an image of `height` x `width` pixels to; 0 where it is too thin."""
    stand_in = np.broadcast_to(np.uint8(0), (3, height, width))  # one byte, whatever its shape
    return get_resize_output_image_size(
        stand_in, shorter=shorter, longer=int(1333 / 800 * shorter), size_divisor=divisor
    )


def levels(processor: Reference, rescale_factor: float | None, mean_and_std: tuple | None) -> np.ndarray:
    """What the reference makes of each of the 256 values of a channel: [3, 256], in its dtype.

    Every value is treated on its own, so a table of results is exact whatever the arithmetic is. `rescale_factor` and
    `mean_and_std` are None where that step is not wanted; without both, the values are their own results.
    """
    values = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(1, 16, 16), (3, 16, 16)).copy()
    if rescale_factor is not None:
        values = processor.rescale(values, rescale_factor)
    if mean_and_std is not None:
        values = processor.normalize(values, *mean_and_std)
    return np.ascontiguousarray(values.reshape(3, 256))

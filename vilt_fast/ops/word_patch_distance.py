"""word_patch_distance: validation and choice of backend.

Facts for `supports`: dtype, rows (M), columns (N), hidden (D), inner, requires_grad, return_plan.
"""

import torch

from .. import registry
from . import _check


def word_patch_distance(text, image, text_pad, image_pad, beta, iterations, inner, return_plan, backend):
    op = "word_patch_distance"
    sizes = _check.shapes(
        op, text=(text, "B M D"), image=(image, "B N D"), text_pad=(text_pad, "B M"), image_pad=(image_pad, "B N")
    )
    if sizes["B"] < 1:
        raise ValueError(f"{op}: text has shape {list(text.shape)}: no sample; expected B >= 1.")
    _check.dtypes(op, _check.FLOATS, text=text)
    _check.same_dtype(op, text=text, image=image)
    _check.dtypes(op, (torch.bool,), text_pad=text_pad, image_pad=image_pad)
    _check.same_device(op, text=text, image=image, text_pad=text_pad, image_pad=image_pad)
    _check.positive(op, beta=beta)
    _check.counts(op, iterations=iterations, inner=inner)
    name = registry.resolve(
        op, backend, text.device.type, dtype=text.dtype, rows=sizes["M"], columns=sizes["N"], hidden=sizes["D"],
        inner=inner, requires_grad=_check.needs_grad(text, image), return_plan=return_plan,
    )  # fmt: skip
    return registry.launcher(op, name)(
        text, image, text_pad, image_pad, beta=beta, iterations=iterations, inner=inner, return_plan=return_plan
    )

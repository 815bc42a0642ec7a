"""What can be asked of an accelerated ViLT besides the general options."""

from __future__ import annotations

import dataclasses

import torch

from ..base import Options
from .placed import PADDING


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViltOptions(Options):
    """How the patches of an image are chosen and ordered, and what is at padded positions of per-token outputs."""

    patch_order: str = "raster"
    generator: torch.Generator | None = None
    padding: str = "zero"

    def __post_init__(self):
        super().__post_init__()
        if self.patch_order not in ("raster", "reference"):
            raise ValueError(f"patch_order must be 'raster' or 'reference', got {self.patch_order!r}.")
        if self.padding not in PADDING:
            raise ValueError(f"padding must be 'zero' or 'reference', got {self.padding!r}.")
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(self.generator).__name__}.")
        if self.generator is not None and self.patch_order == "reference":
            raise ValueError("patch_order='reference' draws from torch's default generator: pass no generator.")

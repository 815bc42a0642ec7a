"""What every family of models offers: a `Swapped` for each method that it stands in for, and the options of these."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import nn

from ..engine import encode as engine
from ..engine.graphs import EncoderGraphs
from ..engine.packing import Packing
from ..engine.quantization import KINDS, WeightCache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How an accelerated model computes. A family derives its own where there is more to ask for."""

    quantize: str | None = None
    cuda_graphs: bool = False

    def __post_init__(self):
        if self.quantize not in (None, *KINDS):
            raise ValueError(f"quantize must be None, {' or '.join(map(repr, KINDS))}, got {self.quantize!r}.")
        if not isinstance(self.cuda_graphs, bool):
            raise ValueError(f"cuda_graphs must be True or False, got {self.cuda_graphs!r}.")


@dataclasses.dataclass(frozen=True)
class Features:
    """Final hidden states of texts and images, padded, and where their patches lie."""

    text: torch.Tensor  #: [B, T, D]
    image: torch.Tensor  #: [B, 1 + P, D], [CLS] first
    text_real: torch.Tensor  #: bool [B, T]
    image_real: torch.Tensor  #: bool [B, 1 + P]
    ids: torch.Tensor  #: [B, T]
    grids: Sequence[tuple[int, int]]  #: (h, w) patches of each image
    cells: Sequence[torch.Tensor]  #: of each image: y * w + x of its real patches, in order, int64
    patch_size: Sequence[int]  #: (height, width) in pixels


class Swapped:
    """A method that stands in for a module's own, as an attribute of the instance. Families derive from it."""

    name: ClassVar[str] = "forward"  #: of the method
    options_type: ClassVar[type[Options]] = Options

    def __init__(self, module: nn.Module, options: Options):
        self.module = module
        self.options = options

    @property
    def __signature__(self):
        return inspect.signature(self.own)

    @property
    def own(self):
        """The module's own method, as its class defines it."""
        return getattr(type(self.module), self.name).__get__(self.module)

    def __call__(self, *args, **kwargs):
        raise NotImplementedError

    def plan(self, **inputs) -> Packing:
        """Where the tokens of a call with these inputs would go."""
        raise TypeError(
            f"{type(self.module).__name__} takes no sequence_plan: pass one of transformers' Vilt* models, after "
            "vilt_fast.accelerate(model)."
        )

    def refresh(self) -> None:
        """Forget what was derived from parameters."""


class SwappedTrunk(Swapped):
    """One that runs transformer blocks, and keeps what that needs from call to call."""

    def __init__(self, module: nn.Module, options: Options):
        super().__init__(module, options)
        self.weights = WeightCache(options.quantize) if options.quantize else None
        self.graphs = EncoderGraphs() if options.cuda_graphs else None

    def encode(
        self, modules: Sequence[nn.Module], describe: Callable, rows: torch.Tensor, packing: Packing, **wanted
    ) -> engine.Encoded:
        """`engine.encode` with the copies and graphs of this model."""
        return engine.encode(modules, describe, rows, packing, weights=self.weights, captured=self.graphs, **wanted)

    def features(self, inputs: Mapping, device: torch.device) -> Features:
        """Final hidden states of processed inputs, patches in raster order; the model itself stays as it is."""
        raise NotImplementedError

    def refresh(self) -> None:
        if self.weights is not None:
            self.weights.clear()

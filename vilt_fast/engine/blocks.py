"""Transformer blocks as a family describes them: lists of sublayers. The engine knows only this.

A block is an attention and a feed-forward sublayer in a row, or more of them, each with its norm and its residual:

    norm first:   x = x + f(norm(x))      ViLT, FLAVA, BLIP's vision tower: [self, feed-forward]
    norm last:    x = norm(x + f(x))      the children of BERT (VisualBERT, UNITER): [self, feed-forward]
    with a cross-attention                LXMERT, METER, BLIP's text tower: [self, cross, feed-forward]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from ..functional import LayerParameters
from . import listeners
from .genuine import is_function_of, library


@dataclasses.dataclass(frozen=True, slots=True)
class Attention:
    """A sublayer: rows attend to the rows of their sample, or to those of another stream."""

    norm: nn.Module
    projections: tuple[nn.Module, ...]  #: query, key, value; or one module that makes all three
    num_heads: int
    scale: float
    dropout: nn.Module  #: of the probabilities
    out: nn.Module
    out_dropout: nn.Module
    source: str | None = None  #: the stream that keys and values come from (cross-attention); None: the block's own

    @property
    def linears(self) -> tuple[nn.Module, ...]:
        return (*self.projections, self.out)

    @property
    def dropouts(self) -> tuple[nn.Module, ...]:
        return self.dropout, self.out_dropout


@dataclasses.dataclass(frozen=True, slots=True)
class FeedForward:
    """A sublayer: each row on its own, through a wider layer."""

    norm: nn.Module
    fc1: nn.Module
    activation: Callable
    activation_kind: str | None  #: as `activation_kind` has it; None: not known
    fc2: nn.Module
    fc2_dropout: nn.Module
    activation_dropout: nn.Module | None = None

    @property
    def linears(self) -> tuple[nn.Module, ...]:
        return self.fc1, self.fc2

    @property
    def dropouts(self) -> tuple[nn.Module, ...]:
        return tuple(d for d in (self.activation_dropout, self.fc2_dropout) if d is not None)


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """One transformer block: what it is made of, and how it is called as a whole."""

    module: nn.Module
    call_padded: Callable  #: (x [B, width, D], packing, want probabilities) -> (x, probabilities or None)
    sublayers: tuple[Attention | FeedForward, ...] = ()  #: none: of unknown make, it can only be called as it is
    norm_first: bool = True
    checkpoint: Callable | None = None  #: `checkpoint(function, x)` where gradient checkpointing is on
    unknown: str = ""  #: why there are no sublayers

    @property
    def linears(self) -> list[nn.Module]:
        """The linear layers that the block has."""
        return [m for sublayer in self.sublayers for m in sublayer.linears]

    @property
    def dropouts(self) -> list[nn.Module]:
        """The dropouts that the block has."""
        return [d for sublayer in self.sublayers for d in sublayer.dropouts]

    @property
    def packable(self) -> bool:
        """Whether calling the submodules on packed rows is calling the block."""
        return not self.why_not_packable()

    def why_not_packable(self) -> str:
        """Why the block has to be called as it is, on the padded tensor; "" where it need not be."""
        if not self.sublayers:
            return self.unknown or f"{type(self.module).__name__} is not of a make that is known here"
        for sublayer in self.sublayers:
            if not listeners.is_plain(sublayer.norm, nn.LayerNorm):
                return self._odd(sublayer.norm, nn.LayerNorm, "a norm")
            if isinstance(sublayer, Attention) and sublayer.source is not None:
                return f"it attends to another stream ({sublayer.source})"
            if isinstance(sublayer, FeedForward) and sublayer.activation_kind is None:
                return self._odd(sublayer.activation, nn.GELU, "an activation")
        for linear in self.linears:
            if not is_tokenwise(linear):
                return self._odd(linear, nn.Linear, "a linear layer")
        for dropout in self.dropouts:
            if not listeners.is_plain(dropout, nn.Dropout, nn.Identity):
                return self._odd(dropout, nn.Dropout, "a dropout")
        if listeners.any_hooked(self.module):
            return listeners.why_hooked(self.module)
        return ""

    def why_not_plain(self) -> str:
        """Why the block is not the textbook block, whose parameters tell all that it computes; "" where it is."""
        if reason := self.why_not_packable():
            return reason
        kinds = tuple(isinstance(sublayer, Attention) for sublayer in self.sublayers)
        if not self.norm_first or kinds != (True, False):
            return "it is not one attention and one feed-forward, each behind its norm"
        attention, feed_forward = self.sublayers
        if feed_forward.activation_kind != "gelu":
            return "its activation is not the exact GELU"
        for norm in (attention.norm, feed_forward.norm):
            if norm.weight is None:
                return "its norm has no weight"
        if reason := self.why_not_linears():
            return reason
        if any(map(listeners.live, self.dropouts)):
            return "it is in training mode, with dropout"
        head_dim = attention.out.weight.shape[1] // attention.num_heads
        if abs(attention.scale * head_dim**0.5 - 1) >= 1e-6:
            return "its scores are not divided by the square root of the head dimension"
        return ""

    def why_not_linears(self) -> str:
        """Why its linear layers are not all `nn.Linear`, or ""."""
        odd = next((m for m in self.linears if type(m) is not nn.Linear), None)
        return "" if odd is None else self._odd(odd, nn.Linear, "a linear layer")

    def _odd(self, module, usual: type, place: str) -> str:
        """Why a part of the block is not what it usually is."""
        path = next((path for path, inner in self.module.named_modules() if inner is module), "")
        kind = type(module) if isinstance(module, nn.Module) else module  # an activation may be a function
        if kind is type(module) and library(kind.__module__) and (reason := listeners.why_not_own_code(module)):
            return f"of its {path}: {reason}"
        name = getattr(kind, "__name__", type(kind).__name__)
        name = f"{kind.__module__}.{name}" if name == usual.__name__ else name
        reason = f"it has a {name} in place of {place}" + (f" ({path})" if path else "")
        if getattr(kind, "__module__", "").startswith("peft."):
            reason += ": model.merge_and_unload() leaves a plain one"
        return reason


_ELEMENTWISE = (
    nn.GELU, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Identity,
)  # fmt: skip


def activation_kind(activation: Callable) -> str | None:
    """What is known of one of torch's activations.

    "gelu": x * Phi(x), exactly; "elementwise": any other that takes each number by itself; None: nothing.
    """
    if listeners.is_plain(activation, nn.GELU):
        return "gelu" if activation.approximate == "none" else "elementwise"
    if is_function_of(activation, F, "gelu"):
        return "gelu"
    known = listeners.is_plain(activation, *_ELEMENTWISE) or is_function_of(
        activation, F, "relu", "silu", "mish", "leaky_relu", "elu", "tanh", "sigmoid"
    )
    return "elementwise" if known or is_function_of(activation, torch, "relu", "tanh", "sigmoid") else None


_WRAPPERS = ("peft.tuners.lora.layer.Linear",)  # add to a linear layer what is made of the same row


def is_tokenwise(module: nn.Module) -> bool:
    """Whether `module` is known to map each row on its own: torch's linear layer, bare or in a known wrapper.

    That a class derives from `nn.Linear`, or holds one, says nothing of what it computes.
    """
    kind = type(module)
    if kind.forward is nn.Linear.forward:
        return listeners.runs_own_code(module)
    if f"{kind.__module__}.{kind.__qualname__}" not in _WRAPPERS or not listeners.runs_own_code(module):
        return False
    if getattr(module, "lora_variant", None) or any(getattr(module, "use_dora", {}).values()):
        return False
    return is_tokenwise(module.base_layer) and all(
        listeners.is_plain(part, nn.Linear, nn.Dropout, nn.Identity)
        for parts in (module.lora_A, module.lora_B, module.lora_dropout)
        for part in parts.values()
    )


class Described:
    """Blocks, each described when it is first looked at."""

    def __init__(self, modules: Sequence[nn.Module], describe: Callable[[nn.Module], Block]):
        self.modules = list(modules)
        self._describe = describe
        self._known = [None] * len(self.modules)

    def anew(self) -> Described:
        """The same, and nothing looked at yet."""
        return Described(self.modules, self._describe)

    def __len__(self) -> int:
        return len(self.modules)

    def __getitem__(self, place: int) -> Block:
        block = self._known[place]
        if block is None:
            block = self._known[place] = self._describe(self.modules[place])
        return block


_NO_BIAS = torch.empty(0)


def layer_parameters(sublayers: Sequence[Attention | FeedForward]) -> LayerParameters:
    """The tensors of a plain block of these sublayers, as `functional.encoder` takes them."""
    attention, feed_forward = sublayers
    if len(attention.projections) == 3:
        query, key, value = attention.projections
        projections = *_pair(query), *_pair(key), *_pair(value)
    else:
        weight, bias = _pair(*attention.projections)
        biases = bias.chunk(3) if bias.numel() else [bias] * 3
        projections = [t for two in zip(weight.chunk(3), biases, strict=True) for t in two]
    return LayerParameters(
        *_pair(attention.norm), *projections, *_pair(attention.out),
        *_pair(feed_forward.norm), *_pair(feed_forward.fc1), *_pair(feed_forward.fc2),
    )  # fmt: skip


def _pair(module):
    own = module._parameters  # what `module.weight` finds too, after a search that takes ten times as long
    plain = "weight" in own and "bias" in own
    weight, bias = (own["weight"], own["bias"]) if plain else (module.weight, module.bias)
    return weight, _NO_BIAS if bias is None else bias

"""Transformer blocks as adapters describe them, and what an engine asks of modules: who listens, what they compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn.modules import module as module_internals

from ..models.vilt import embedding


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """One pre-norm transformer block, as an adapter describes it."""

    module: nn.Module
    norm1: nn.Module
    qkv: tuple[nn.Module, ...]  #: query, key, value; or one fused module
    attention_dropout: nn.Dropout
    out: nn.Module
    out_dropout: nn.Dropout
    norm2: nn.Module
    fc1: nn.Module
    activation: Callable
    activation_dropout: nn.Dropout | None
    fc2: nn.Module
    fc2_dropout: nn.Dropout
    num_heads: int
    scale: float
    exact_gelu: bool  #: `activation` is x * Phi(x)
    checkpoint: Callable | None  #: `checkpoint(function, x)` where gradient checkpointing is on
    call_padded: Callable  #: (x [B, L, D], plan, want probabilities) -> (x, probabilities or None)

    @classmethod
    def opaque(cls, module: nn.Module, call_padded: Callable) -> Block:
        """A block of unknown make, which can only be called as it is."""
        unknown = dict.fromkeys((f.name for f in dataclasses.fields(cls)), None)
        return cls(**unknown | {"module": module, "call_padded": call_padded})

    @property
    def packable(self) -> bool:
        """No hooks, no replaced parts: calling the submodules on packed rows is calling the block."""
        return (
            self.norm1 is not None
            and all(isinstance(norm, nn.LayerNorm) for norm in (self.norm1, self.norm2))
            and all(map(is_tokenwise, (*self.qkv, self.out, self.fc1, self.fc2)))
            and all(type(d) in (nn.Dropout, nn.Identity) for d in self.dropouts)
            and not any_hooked(self.module)
        )

    @property
    def dropouts(self) -> list[nn.Module]:
        """The dropouts that the block has."""
        every = (self.attention_dropout, self.out_dropout, self.activation_dropout, self.fc2_dropout)
        return [d for d in every if d is not None]


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to the calls of `module`, or of all modules."""
    return _has_own_hooks(module.__dict__) or bool(module_internals._has_any_global_hook())


def is_hooked(module: nn.Module) -> bool:
    """Whether calling `module` does more (or other) than its class's `forward`."""
    return has_hooks(module) or "forward" in module.__dict__


def any_hooked(module: nn.Module) -> bool:
    """`is_hooked` of the module or anything inside it."""
    return bool(module_internals._has_any_global_hook()) or any(
        _has_own_hooks(own) or "forward" in own for own in _inside([module])
    )


def stamp(modules: Iterable[nn.Module]) -> tuple | None:
    """What must be equal for `modules` to compute, on parameters in the same places, what they computed before.

    None where that cannot be told by looking: hooks, training, parameters that are no ordinary tensors.
    """
    if module_internals._has_any_global_hook():
        return None
    found = []
    for own in _inside(modules):
        if _has_own_hooks(own) or "forward" in own or own["training"]:
            return None
        found.append(id(own))
        if "eps" in own:
            found.append(own["eps"])
        for parameter in own["_parameters"].values():
            if type(parameter) is nn.Parameter:
                found.append(parameter.data_ptr())
            elif parameter is not None:
                return None
    return tuple(found)


def _has_own_hooks(own: dict) -> bool:
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


def _inside(modules):
    """The `__dict__` of each module and of all within it; `Module.modules()` takes five times as long."""
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module is not None:
            own = module.__dict__
            yield own
            waiting.extend(own["_modules"].values())


def is_tokenwise(module: nn.Module) -> bool:
    """Whether `module` maps each row on its own, so that padding makes no difference: a linear, plain or wrapped."""
    while not isinstance(module, nn.Linear):
        module = getattr(module, "base_layer", None)
        if module is None:
            return False
    return True


def is_plain(block: Block) -> bool:
    """Whether the block is exactly the textbook block: its parameters tell all that it computes."""
    if not (block.packable and block.exact_gelu):
        return False
    if any(type(norm) is not nn.LayerNorm or norm.weight is None for norm in (block.norm1, block.norm2)):
        return False
    if any(type(m) is not nn.Linear for m in (*block.qkv, block.out, block.fc1, block.fc2)):
        return False
    if any(map(embedding.live, block.dropouts)):
        return False
    head_dim = block.out.in_features // block.num_heads
    return abs(block.scale * head_dim**0.5 - 1) < 1e-6


_NO_BIAS = torch.empty(0)


def parameters(block: Block) -> list[torch.Tensor]:
    """The 16 tensors of a plain block in the order that `functional.encoder` documents."""

    def pair(module):
        return [module.weight, _NO_BIAS if module.bias is None else module.bias]

    if len(block.qkv) == 3:
        qkv = [t for module in block.qkv for t in pair(module)]
    else:
        weights = block.qkv[0].weight.chunk(3)
        biases = [_NO_BIAS] * 3 if block.qkv[0].bias is None else block.qkv[0].bias.chunk(3)
        qkv = [t for two in zip(weights, biases, strict=True) for t in two]
    return [*pair(block.norm1), *qkv, *pair(block.out), *pair(block.norm2), *pair(block.fc1), *pair(block.fc2)]

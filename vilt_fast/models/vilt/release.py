"""What releases of transformers differ in, asked of the classes as they are: arguments, checkpointing, the mask."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Container

import torch
from torch import nn
from transformers.models.vilt import modeling_vilt as hf

from ...engine.genuine import own_methods
from ...engine.packing import Packing

NOT_UNDERSTOOD = (
    "an argument of the call is one that accelerate does not stand for (head_mask, or none of the signature)"
)


def understood(module: nn.Module, known: Container[str], args: tuple, kwargs: dict) -> dict | None:
    """The arguments of the module's `forward`, by name; None for a call that the module itself has to answer.

    That is one of other code than its library's, one with an argument that `known` lacks (`head_mask` of transformers
    4), and one that its signature does not take.
    """
    if not own_methods(type(module)):
        return None
    names, takes_more = _parameters(type(module))
    given = {**dict(zip(names[: len(args)], args[: len(names)], strict=True)), **kwargs}
    if len(given) != len(args) + len(kwargs):
        return None
    for name, value in given.items():
        if (value is not None and name not in known) if name in names else not takes_more:
            return None
    return given


def wants_dict(module: nn.Module, given: dict) -> bool:
    """Whether the outcome is to have names, by the arguments or the config; `torchscript` is one of transformers 4."""
    if given.get("return_dict") is not None:
        return given["return_dict"]
    return getattr(module.config, _switch(type(module)))


@torch.compiler.assume_constant_result
def _parameters(kind: type) -> tuple[tuple[str, ...], bool]:
    """Names of the parameters of the `forward` of a class, in order, and whether it takes others."""
    code = _code(kind.forward)
    names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    return names, bool(code.co_flags & inspect.CO_VARKEYWORDS)


@torch.compiler.assume_constant_result
def _switch(kind: type) -> str:
    """The attribute of its config that a class reads where no `return_dict` is given."""
    return "use_return_dict" if "use_return_dict" in _code(kind.forward).co_names else "return_dict"


@functools.lru_cache(maxsize=64)  # it is asked at every call
def _code(forward: Callable) -> types.CodeType:
    return inspect.unwrap(forward).__code__


def checkpoint(layer: nn.Module, encoder: nn.Module | None) -> Callable | None:
    """The `checkpoint(function, x)` that a layer is run by, if any; up to transformers 4.52 its encoder had it."""
    owner = layer if _checkpoints_itself(layer) else encoder
    if owner is None or not (owner.gradient_checkpointing and owner.training):
        return None
    if hasattr(owner, "_gradient_checkpointing_func"):
        return owner._gradient_checkpointing_func
    return hf.torch.utils.checkpoint.checkpoint


def call_layer(layer: nn.Module, encoder: nn.Module | None, hidden: torch.Tensor, mask, want_attention: bool):
    """(hidden states [B, L, D], probabilities or None) of a layer, called as its encoder calls it: by place."""
    head_mask = (None,) if "head_mask" in _parameters(hf.ViltEncoder)[0] else ()

    def call(hidden):
        return layer(hidden, mask, *head_mask, want_attention)

    outer = None if _checkpoints_itself(layer) else checkpoint(layer, encoder)
    outputs = call(hidden) if outer is None else outer(call, hidden)
    return outputs[0], outputs[1] if want_attention else None


def _checkpoints_itself(layer):
    return hasattr(layer, "gradient_checkpointing")


def additive_mask(packing: Packing, dtype: torch.dtype) -> torch.Tensor | None:
    """The mask that HuggingFace adds to attention scores: the lowest finite number at padded keys.

    [B, 1, L, L], and None where nothing is padded; before transformers had `create_bidirectional_mask`, always
    [B, 1, 1, L].
    """
    by_rows = hasattr(hf, "create_bidirectional_mask")
    if by_rows and packing.dense:
        return None
    key_mask = packing.key_mask()
    width = key_mask.shape[1]
    mask = torch.zeros(key_mask.shape, dtype=dtype, device=key_mask.device)
    mask = mask.masked_fill(~key_mask, torch.finfo(dtype).min)[:, None, None]
    return mask.expand(-1, -1, width, -1) if by_rows else mask

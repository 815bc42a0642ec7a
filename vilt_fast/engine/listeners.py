"""What an engine asks of modules: who listens to them, whose code they run, whether they are what they were before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.nn.modules import module as module_internals

from .genuine import own_methods, why_not_own


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to the calls of `module`, or of all modules."""
    return _has_own_hooks(module.__dict__) or all_are_hooked()


def any_hooked(module: nn.Module, known: Callable[[nn.Module], bool] = lambda _: False) -> bool:
    """Whether calling `module`, or anything inside it, does more (or other) than the `forward` of its class.

    Where hooks are `known`, somebody does for them what they do.
    """
    return all_are_hooked() or any(
        (_has_own_hooks(inner.__dict__) and not known(inner)) or "forward" in inner.__dict__
        for inner in inside([module])
    )


def why_hooked(module: nn.Module, *, inside: bool = True) -> str:
    """Who listens to `module` or, with `inside`, to anything in it; "" for nobody."""
    if not (any_hooked(module) if inside else has_hooks(module)):
        return ""
    if torch.compiler.is_compiling():  # nobody is told; what a hook is called would be a guard
        return "a hook or a wrapper listens to it, or to something inside it"
    for path, inner in module.named_modules() if inside else [("", module)]:
        where = f" of its {path}" if path else ""
        for registered, kind in _HOOKS.items():
            for hook in inner.__dict__[registered].values():
                name = getattr(hook, "__qualname__", type(hook).__qualname__)
                return f"a {kind} ({name}) listens to calls{where}"
        if path and "forward" in inner.__dict__:
            return f"forward{where} is replaced, or wrapped, on the instance"
    if inside and "forward" in module.__dict__:
        return "its forward is replaced, or wrapped, on the instance"
    return "a hook listens to the calls of all modules"


def is_plain(module: nn.Module | None, *kinds: type) -> bool:
    """Whether `module` is itself one of `kinds` and computes as that was written, with ordinary parameters.

    Hooks are not looked for, nor what is inside the module.
    """
    return type(module) in kinds and runs_own_code(module)


def runs_own_code(module: nn.Module) -> bool:
    """Whether `module` computes as the library that its class is from was written, with ordinary parameters."""
    own, methods = module.__dict__, own_methods(type(module))
    for name in methods:  # loops, which take a third of the time of a generator: it is asked of every module
        if name in own:
            return False
    for parameter in own["_parameters"].values():
        if parameter is not None and type(parameter) not in _ORDINARY:
            return False
    return bool(methods)


def why_not_own_code(module: nn.Module) -> str:
    """Why `module` does not compute as the library that its class is from was written, or ""."""
    if runs_own_code(module):
        return ""
    kind, own = type(module), module.__dict__
    if reason := why_not_own(kind):
        return reason
    for name in own_methods(kind):
        if name in own:
            return f"{name} of a {kind.__name__} is replaced on the instance"
    name, odd = next((n, type(p)) for n, p in own["_parameters"].items() if not (p is None or type(p) in _ORDINARY))
    return f"the {name} of a {kind.__name__} is a {odd.__name__}, which is no ordinary parameter"


def why_not_plain(module: nn.Module | None, *kinds: type) -> str:
    """Why `is_plain(module, *kinds)` does not hold, or ""."""
    kind = type(module)
    if kind in kinds:
        return why_not_own_code(module)
    usual, names = kinds[0].__name__, (kind.__name__, f"{kind.__module__}.{kind.__qualname__}")
    return f"it has a {names[kind.__name__ == usual]} in place of a {usual}"


def live(dropout: nn.Module) -> float:
    """The probability that a dropout module drops with now."""
    return getattr(dropout, "p", 0.0) if dropout.training else 0.0


def plain_parameters(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether these are ordinary tensors, which a kernel can read where they lie."""
    return all(type(t) in _ORDINARY for t in tensors)


_HOOKS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}
_ORDINARY = (nn.Parameter, torch.Tensor, FakeTensor)  # the last stands for one where torch.export looks on


def _has_own_hooks(own: dict) -> bool:
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


def all_are_hooked() -> bool:
    """Whether somebody listens to all modules. torch < 2.8 has no function that says so."""
    return bool(
        module_internals._global_forward_hooks
        or module_internals._global_forward_pre_hooks
        or module_internals._global_backward_hooks
        or module_internals._global_backward_pre_hooks
    )


def inside(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Each module and all within it; `Module.modules()` takes five times as long."""
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module is not None:
            yield module
            waiting.extend(module.__dict__["_modules"].values())

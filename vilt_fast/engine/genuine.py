"""Whose code runs: whether the functions behind a class are those that its library was written with.

A swap stands for code that it knows. That a module is an `nn.Linear` says little where somebody has assigned to
`nn.Linear.forward` or to `functional.linear`, or has put a class of their own under the library's name. So each
function that a call goes through must be the one that the library's own file defines under that name: `forward`, the
methods of its class that this uses, and what these find by name in their module, in `torch`, `nn` and `functional`.
They are looked up once; that all are still where they were is asked at every call.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import os
import sys
import types
import weakref
from collections.abc import Iterable

import torch
from torch import nn

from . import unchanged

_LIBRARIES = ("torch", "transformers", "peft")
_CALL = ("__call__", "_wrapped_call_impl", "_call_impl", "__getattr__")  # how torch gets from a call to `forward`


@dataclasses.dataclass(slots=True)
class _Code:
    """What a class was found to compute with."""

    replaced: str = ""  #: what of it is not as its library has written it, if anything
    methods: dict = dataclasses.field(default_factory=dict)  #: of the class, by name
    globals: dict = dataclasses.field(default_factory=dict)  #: by (where, name), where is a module or a class
    names: tuple[str, ...] = ()  #: of the methods
    found: tuple = ()  #: all of it as `unchanged.in_place` takes it, which holds no class that is looked at


_codes: dict[weakref.ref, _Code] = {}  # a WeakKeyDictionary takes three times as long to ask


def _code(kind: type) -> _Code:
    code = _codes.get(weakref.ref(kind))
    if code is None or not unchanged.asked().in_place(code.found, kind):
        code = _codes[weakref.ref(kind, _forget)] = _found(kind)
    return code


def _forget(kind):
    _codes.pop(kind, None)


def found_of(kinds: Iterable[type]) -> tuple:
    """(where, name, value) of all that calls of modules of these classes go through: what `own_methods` hangs on."""
    found = {}
    for kind in kinds:
        for where, name, value in _code(kind).found:
            where = kind if where is None else where
            found[id(where), name] = where, name, value
    return tuple(found.values())


@torch.compiler.assume_constant_result
def own_methods(kind: type) -> tuple[str, ...]:
    """What a call of a module of class `kind` goes through, if it is all as its library has written it; else ().

    These are names of methods: an attribute of that name on an instance would come before them.
    """
    code = _code(kind)
    return () if code.replaced else code.names


@torch.compiler.assume_constant_result
def why_not_own(kind: type) -> str:
    """Why a call of a module of class `kind` does not go through the code of its library alone, or ""."""
    replaced = _code(kind).replaced
    return replaced and f"{replaced} is not as torch, transformers or peft have written it"


@torch.compiler.assume_constant_result
def is_function_of(function, library: types.ModuleType, *names: str) -> bool:
    """Whether `function` is what `library` has written under one of `names`."""
    return any(getattr(library, name, None) is function and _is_own(function, name) for name in names)


def is_own(function, qualified_name: str) -> bool:
    """Whether `function` is what a library has written under this name, be it within another function."""
    own = getattr(function, "__qualname__", None) == qualified_name
    return own and _as_written(function, function.__module__) is not None


# --- looking ----------------------------------------------------------------------------------------------------------


def _found(kind: type) -> _Code:
    code = _Code()
    waiting = ["forward", *_CALL]
    while waiting:
        name = waiting.pop()
        owner = next((c for c in kind.__mro__ if name in vars(c)), None)
        if owner is None or name in code.methods:
            continue
        method = code.methods[name] = getattr(kind, name)
        own = _as_written(method, owner.__module__)
        aliases = (name, "_wrapped_call_impl", "_call_impl") if name == "__call__" else (name,)
        if own is None or own.__qualname__ not in [f"{owner.__qualname__}.{alias}" for alias in aliases]:
            code.replaced = code.replaced or f"{kind.__module__}.{kind.__qualname__}.{name}"
        elif name not in _CALL:
            used = _used(own.__code__)
            for chain in used:
                _look_up(chain, sys.modules[own.__module__], code)
            called = {name for chain in used for name in chain} & set(dir(kind)) - set(dir(nn.Module))
            waiting += [n for n in called if isinstance(getattr(kind, n), types.FunctionType)]
    code.names = tuple(code.methods)
    code.found = (
        *((None, name, method) for name, method in code.methods.items()),
        *((where, name, value) for (where, name), value in code.globals.items()),
    )
    return code


def _look_up(chain, where, code):
    """Notes what a chain of names, as in `nn.functional.pad`, stands for in the module `where`, name by name."""
    for name in chain:
        value = getattr(where, name, None)
        if callable(value):
            code.globals[where, name] = value
            if not _is_own(value, name):
                code.replaced = code.replaced or f"{where.__name__}.{name}"
        if isinstance(value, type) and issubclass(value, nn.Module):
            inner = _code(value)
            code.replaced = code.replaced or inner.replaced
            code.globals |= {(value, n): method for n, method in inner.methods.items()} | inner.globals
        if not isinstance(value, types.ModuleType) or not library(value.__name__):
            return
        code.globals[where, name] = value
        where = value


def _used(code: types.CodeType) -> list[tuple[str, ...]]:
    """The chains of names that a function, and those within it, use: what is global first, or of a local."""
    chains = [chain for inner in code.co_consts if isinstance(inner, types.CodeType) for chain in _used(inner)]
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            chains[-1] += (instruction.argval,)
        else:
            chains.append((instruction.argval,) if instruction.opname == "LOAD_GLOBAL" else ("",))
    return chains


def _is_own(value, name: str) -> bool:
    """Whether a function or class is what a library, or Python, has written under this name."""
    if getattr(value, "__name__", None) != name:
        return False
    if isinstance(value, types.FunctionType):
        return _as_written(value, value.__module__) is not None
    package = (value.__module__ or "").partition(".")[0]
    known = package in _LIBRARIES or package in sys.stdlib_module_names
    return isinstance(value, types.BuiltinFunctionType) or (isinstance(value, type) and known)


def _as_written(function, module: str):
    """The function that `module`, of a library, has in its file, out of the library's own decorators; else None."""
    owner = library(module)
    while owner and isinstance(function, types.FunctionType):
        inner = getattr(function, "__wrapped__", None)
        file = function.__code__.co_filename
        if inner is None:
            return function if file == _file(function.__module__) and function.__module__ == module else None
        # torch's own decorators (`no_grad`) are for others to put on; what is taken off again is for its tracers only.
        if not (file.endswith(_TRACERS) if owner == "torch" else file.startswith(_root(function.__module__))):
            return None
        function = inner
    return None


_TRACERS = os.path.join("torch", "fx", "_symbolic_trace.py"), os.path.join("torch", "_compile.py")


def library(module: str) -> str:
    """The library that a module of Python belongs to, or ""."""
    package = module.partition(".")[0]
    return package if package in _LIBRARIES else ""


def _root(module: str) -> str:
    """The folder of its library, as the module itself has it: the library's own name may have been imported anew."""
    package, folder = library(module), os.path.dirname(_file(module) or "")
    return os.path.join(folder.rpartition(f"{os.sep}{package}")[0], package, "") if package else os.devnull


@functools.lru_cache(maxsize=256)
def _file(module: str) -> str | None:
    return getattr(sys.modules.get(module), "__file__", None)

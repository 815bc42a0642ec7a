"""Which methods of a model are, as code, those that dandelin/ViLT published: `original.py` stands for no others.

The original is no installable package. It is vendored and edited, so neither a class's name nor the names of its parts
say what it computes. What does is the syntax tree of a method's source, without comments, docstrings and annotations,
and with what its global names stand for in their place (`F` may be anything). A tree is the same in every version of
Python, which bytecode is not, and whatever the formatting. The source is believed only as far as it compiles to the
code that runs: a file may have been edited after its import.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import inspect
import textwrap
import types

import torch
from torch import nn

#: name -> fingerprints: dandelin/ViLT's (no commit has ever changed one of these), and those of the tests' stand-in
_PUBLISHED = {
    "ViLTransformerSS.infer": ("9e20e70dd8467f61", "0ada259c6fe844ac"),
    "VisionTransformer.visual_embed": ("c6c5578e0529fc0f", "ff8c7b33eb9e94c3"),
    "PatchEmbed.forward": ("7e350488bbcf5acd", "189e56716b3f2d41"),
    "Block.forward": ("0347bfc84e593d4c", "ae1e7f12a432b366"),
    "Attention.forward": ("e570e80dd81f320b", "36510a6d33fc7825"),
    "Mlp.forward": ("84e3827957d0ae6a", "a2e06a367b15509b"),
    "Pooler.forward": ("107739dd0522f18d", "2277f01b8a615faa"),
}

_seen: dict[types.FunctionType, tuple[types.CodeType, str]] = {}


def is_published(module, name: str) -> bool:
    """Whether the method of `module` that `name` ("Block.forward") ends in runs the code published as `name`."""
    return name.rpartition(".")[2] not in getattr(module, "__dict__", ()) and is_published_in(type(module), name)


@torch.compiler.assume_constant_result
def is_published_in(kind: type, name: str) -> bool:
    """The same of a class, whatever an instance puts in its place."""
    function = getattr(kind, name.rpartition(".")[2], None)
    if type(function) is not types.FunctionType or kind.__call__ is not nn.Module.__call__:
        return False
    seen = _seen.get(function)
    if seen is None or seen[0] is not function.__code__:
        seen = _seen[function] = function.__code__, fingerprint(function)
    return seen[1] in _PUBLISHED[name]


def is_text_embedding(module) -> bool:
    """Whether `module` embeds text as transformers' `BertEmbeddings` does, with absolute positions."""
    function = getattr(type(module), "forward", None)
    code = getattr(function, "__code__", None)
    return (
        code is not None
        and (function.__module__, code.co_name) == ("transformers.models.bert.modeling_bert", "forward")
        and code.co_filename == function.__globals__.get("__file__")
        and function.__qualname__ == "BertEmbeddings.forward"
        and type(module).__call__ is nn.Module.__call__
        and getattr(module, "position_embedding_type", "absolute") == "absolute"  # transformers 4 has others
    )


def fingerprint(function: types.FunctionType) -> str:
    """A hash of what a function computes, as its source says; "" where the source is missing or is not what runs."""
    code = function.__code__
    try:
        # Of the code: of the function, it would be the source of what a decorator wraps.
        source = "".join(inspect.findsource(code)[0])
        tree = ast.parse(textwrap.dedent(inspect.getsource(code))).body[0]
        running = code in _codes(compile(source, code.co_filename, "exec", dont_inherit=True))
    except (OSError, TypeError, SyntaxError, IndexError):
        return ""
    if not running or not isinstance(tree, ast.FunctionDef) or tree.decorator_list or function.__closure__:
        return ""
    stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    local = stored | {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}

    def meaning(name):
        if name in local:
            return name
        value = function.__globals__.get(name, getattr(builtins, name, None))
        if isinstance(value, types.ModuleType):
            return value.__name__
        return getattr(value, "__module__", None), getattr(value, "__qualname__", name)

    return hashlib.sha256(repr((_tree(tree, meaning), function.__defaults__)).encode()).hexdigest()[:16]


_UNSAID = ("ctx", "annotation", "returns", "type_comment", "type_params", "kind", "name", "decorator_list")


def _tree(node, meaning):
    """A syntax tree as nested tuples, without what says nothing or differs between versions of Python."""
    if isinstance(node, list):
        said = [n for n in node if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
        return [_tree(n, meaning) for n in said]
    if isinstance(node, ast.Name):
        return meaning(node.id)
    if isinstance(node, ast.AST):
        fields = [(f, getattr(node, f, None)) for f in node._fields if f not in _UNSAID]
        return type(node).__name__, [(f, _tree(v, meaning)) for f, v in fields if v not in (None, [])]
    return node


def _codes(code):
    """The code of a file, and of everything that is defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)

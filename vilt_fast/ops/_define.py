"""How an op is registered with torch and how its launchers are called: once, for all of them.

An op is described by its *fake*: a function with the arguments of its launchers, annotated, that makes what a launcher
returns, ``(outputs, kept)``, without computing it. If it has a backward of its own, a second fake does the same for
that. Everything else follows from the two: the schema, what autograd saves, the checks of what a launcher returns.

    def _fake(x: Tensor, weight: Tensor, bias: Tensor | None):
        return (x.new_empty(*x.shape[:-1], len(weight)),), (x.new_empty(...),)

    def _fake_backward(needs: list[bool], grad_out: Tensor, x: Tensor, weight: Tensor, pre: Tensor):
        return (torch.empty_like(x), ...), ()

    _OP = Op("linear_gelu", _fake, _fake_backward, outputs=("out",), kept=("pre",), differentiable=("x", "weight", ...))

The arguments of a backward are known by name: ``needs`` (which gradients are wanted, in the order of
``differentiable``), ``grad_<output>`` (None where there is none), an argument, output or kept tensor of the forward, or
``<argument>_dtype``. It returns one gradient a differentiable argument.

A gradient of such a gradient (``create_graph=True``) is that of the op's reference, run anew on what the backward was
given. Where that is another function (a mask of dropout was drawn in a kernel, a plan counts as a constant), it is an
error that names the op.

A call without a gradient, in plain eager mode, goes straight to the launcher: torch.library takes several times as long
as a small kernel. Everything else (autograd, torch.compile, export, transforms) goes through ``torch.ops.vilt_fast``.
"""

import contextlib
import inspect
import os
import threading
import typing

import torch
from torch import Tensor

from ..remembered import once
from . import _check, registry
from ._twice import TWICE, differentiable_once, gradients_of

_inside = threading.local()  #: `validated`: this thread is within a call whose arguments have been looked at
OPS = {}  #: {name: Op} of all that have been imported


class Op:
    """An op with launchers in the registry.

    Args:
        name: of the op in the registry and in ``torch.ops.vilt_fast``.
        fake: see above. If it has an argument ``backend``, it is told which one.
        fake_backward: see above; the launchers of ``<name>_bwd`` are then called for gradients.
        backward: in place of ``fake_backward``, the gradient in ordinary PyTorch, the same for every backend.
        outputs, kept: names of what the fake returns. Kept tensors are there for the backward alone.
        differentiable: names of the arguments that have a gradient.
        differentiable_outputs: names of the outputs that have one; by default all.
        validate: takes the arguments of the fake that it names and raises for what no launcher could be given. The
            public function calls it before it chooses a backend; for calls of ``torch.ops`` it is called here.
        facts: takes the arguments of the fake that it names, and `requires_grad` if it does, and makes the op's
            `registry.Facts`. The public function asks with them which backend it is to be; for calls of ``torch.ops``,
            which name one, it is asked here whether it can.
        validate_backward: as `validate`, of the arguments of the backward's fake and ``backend``, for calls of
            ``torch.ops.vilt_fast.<name>_bwd``.
        equal: {argument: other}: a gradient that a backward gives as None although it is needed is that of the other
            argument, or the incoming ``grad_<output>``.
        again: for a gradient of a gradient, what the reference takes besides what the backward was given: a function of
            that, by keyword. None: there is no such gradient.
    """

    def __init__(
        self, name, fake, fake_backward=None, *, outputs, kept=(), differentiable=(), differentiable_outputs=None,
        equal=None, backward=None, validate=None, facts=None, validate_backward=None, again=lambda **_: {},
    ):  # fmt: skip
        OPS[name] = self
        self.name, self.outputs, self.kept = name, outputs, kept
        self.differentiable = differentiable
        self.arguments = tuple(n for n in inspect.signature(fake).parameters if n != "backend")
        self._equal = equal or {}
        self._validate, self._facts = validate, facts
        self._validate_backward = validate_backward
        asked = filter(None, (validate, facts, validate_backward))
        self._named_by = {function: tuple(inspect.signature(function).parameters) for function in asked}
        self._fake = fake
        self._fake_backward, self._backward, self._again = fake_backward, backward, again
        self._told = "backend" in inspect.signature(fake).parameters
        self._seen = set()  # backends whose launcher has been looked at
        self._op = _register(name, self._schema(fake, len(outputs) + len(kept), keep=True), self._run, self._run_fake)
        if fake_backward or backward:
            silent = set(outputs) - set(differentiable_outputs or outputs)
            self._silent = [i for i, n in enumerate((*outputs, *kept)) if n in silent or n in kept]
            self._wanted = tuple(inspect.signature(fake_backward or backward).parameters)
            if fake_backward:
                plain = [p for p in inspect.signature(fake).parameters.values() if p.annotation not in _TENSORS]
                also = () if again is None else (p.name for p in plain)
                self._also = tuple(name for name in also if name not in (*self._wanted, "backend"))
                schema = self._schema(fake_backward, None, also=[p for p in plain if p.name in self._also])
                self._op_bwd = _register(f"{name}_bwd", schema, self._run_backward, self._run_fake_backward)
                torch.library.register_autograd(
                    f"vilt_fast::{name}_bwd", self._differentiate_again, setup_context=self._setup_again
                )
            torch.library.register_autograd(f"vilt_fast::{name}", self._differentiate, setup_context=self._setup)

    # --- calls --------------------------------------------------------------------------------------------------------

    def resolve(self, backend, facts):
        """Name of the backend that computes a call; see :func:`registry.resolve`.

        Within torch.func and forward-mode AD that is the reference, which is differentiable in every way, and in an
        export to ONNX too, which has no op of ours.
        """
        ordinary = _check.transforming() or (_check.exporting() and _for_onnx())
        if backend is None and ordinary and "reference" in registry.backends(self.name):
            backend = "reference"
        return registry.resolve(self.name, backend, facts)

    def plain(self, backend, **arguments):
        """What an ordinary PyTorch backend gives."""
        return registry.launcher(self.name, backend)(**arguments)

    def __call__(self, backend, **arguments):
        """The outputs, by a backend that is not plain."""
        values = [arguments[name] for name in self.arguments]
        keep = torch.is_grad_enabled() and _check.needs_grad(*(arguments[name] for name in self.differentiable))
        if not keep and _plain_eager(values):
            launch = registry.launcher(self.name, backend)
            result = launch(**arguments, keep=False)
            if backend not in self._seen or os.environ.get("VILT_FAST_CHECK") == "1":
                self._check(backend, result, arguments, keep=False)
            return result[0]
        if torch.compiler.is_compiling():
            results = self._op(*values, backend, keep)
        else:
            with _validated():
                results = self._op(*values, backend, keep)
        return (results,) if isinstance(results, Tensor) else results[: len(self.outputs)]

    # --- behind torch.ops ---------------------------------------------------------------------------------------------

    def _schema(self, fake, returned, keep=False, also=()):
        parameters = [
            p.replace(kind=p.POSITIONAL_OR_KEYWORD, default=p.empty, annotation=_for_schema(p.annotation))
            for p in (*inspect.signature(fake).parameters.values(), *also)
            if p.name != "backend"
        ]
        parameters.append(inspect.Parameter("backend", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=str))
        if keep:
            parameters.append(
                inspect.Parameter("keep", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=bool, default=False)
            )
        result = list[Tensor] if returned is None else Tensor if returned == 1 else tuple[(Tensor,) * returned]

        def prototype():
            pass

        prototype.__signature__ = inspect.Signature(parameters, return_annotation=_for_schema(result))
        return torch.library.infer_schema(prototype, mutates_args=())

    def _faked(self, arguments, backend, keep):
        outputs, kept = self._fake(**arguments, **({"backend": backend} if self._told else {}))
        return outputs, kept if keep else ()

    def _flat(self, outputs, kept):
        if len(kept) < len(self.kept):  # the schema has a place for each
            kept = tuple(outputs[0].new_empty(0) for _ in self.kept)
        results = (*outputs, *kept)
        return results[0] if len(results) == 1 else results

    def _named(self, values):
        """(arguments, backend, keep) of a call; the dispatcher leaves out a last value that is a default."""
        count = len(self.arguments)
        arguments = dict(zip(self.arguments, values[:count], strict=True))
        return arguments, values[count], values[count + 1] if len(values) > count + 1 else False

    def _run(self, *values):
        arguments, backend, keep = self._named(values)
        if backend in registry.PLAIN:
            raise ValueError(f"{self.name}: {backend!r} is ordinary PyTorch; call vilt_fast.functional.{self.name}.")
        if not getattr(_inside, "validated", False):
            known = arguments | {"requires_grad": keep}
            if self._validate:
                self._ask(self._validate, known)
            if self._facts:
                self.resolve(backend, self._ask(self._facts, known))
            _check.seeded(self.name, **arguments)
        self._refuse_tangents(backend, arguments.values())
        result = registry.launcher(self.name, backend)(**arguments, keep=keep)
        if (backend, keep) not in self._seen or os.environ.get("VILT_FAST_CHECK") == "1":
            self._check(backend, result, arguments, keep)
        return self._flat(*result)

    def _ask(self, function, known):
        return function(**{name: known[name] for name in self._named_by[function] if name in known})

    def _run_fake(self, *values):
        arguments, backend, keep = self._named(values)
        self._refuse_tangents(backend, arguments.values())
        return self._flat(*self._faked(arguments, backend, keep))

    def _refuse_tangents(self, backend, values):
        """RuntimeError for a tangent of forward-mode AD, which would end here unnoticed."""
        if not _check.transforming():
            return
        tensors = (t for value in values for t in (value if isinstance(value, list) else [value]))
        if any(isinstance(t, Tensor) and _check.has_tangent(t) for t in tensors):
            raise RuntimeError(
                f"{self.name}: backend {backend!r} has no derivative in forward mode; backend='reference' has one."
            )

    def _check(self, backend, result, arguments, keep):
        """TypeError unless a launcher keeps to the contract: what it is called the first time, it is looked at."""
        who = f"{self.name}: the launcher of backend {backend!r}"
        if not (isinstance(result, tuple) and len(result) == 2 and all(isinstance(part, tuple) for part in result)):
            raise TypeError(f"{who} returned {_shape_of(result)}, expected (outputs, kept), two tuples of tensors.")
        names = (self.outputs, self.kept if keep else ())
        for what, named, got, expected in zip(
            ("outputs", "kept"), names, result, self._faked(arguments, backend, keep), strict=True
        ):
            if len(got) != len(expected):
                raise TypeError(
                    f"{who} returned {len(got)} {what}, expected {len(expected)}: {', '.join(named) or 'none'}."
                )
            for name, tensor, like in zip(named, got, expected, strict=True):
                if not isinstance(tensor, Tensor) or (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
                    raise TypeError(f"{who} returned {name} as {_shape_of(tensor)}, expected {_shape_of(like)}.")
        self._seen |= {(backend, keep)} if keep else {(backend, keep), backend}

    # --- gradients ----------------------------------------------------------------------------------------------------

    def _setup(self, ctx, inputs, output):
        known, ctx.backend, ctx.keep = self._named(inputs)
        results = (output,) if isinstance(output, Tensor) else output
        known |= zip((*self.outputs, *self.kept), results, strict=True)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(results[i] for i in self._silent))
        tensors, ctx.others = {}, {}
        for name in self._wanted:
            if name in known:
                place = tensors if isinstance(known[name], Tensor) else ctx.others
                place[name] = known[name]
            elif name.endswith("_dtype"):
                ctx.others[name] = known[name.removesuffix("_dtype")].dtype
        if self._fake_backward:
            ctx.others |= {name: known[name] for name in self._also}
        ctx.names = tuple(tensors)
        ctx.shapes = [None if known[name] is None else known[name].shape for name in self.differentiable]
        ctx.save_for_backward(*tensors.values())

    def _differentiate(self, ctx, *grads):
        given = dict(zip((f"grad_{name}" for name in self.outputs), grads, strict=False))
        nothing = (None,) * len(ctx.needs_input_grad)
        if all(grad is None for grad in given.values()):
            return nothing
        if not ctx.keep:
            raise RuntimeError(f"{self.name}: called with keep=False, so there is nothing to differentiate with.")
        needed = dict(zip(self.arguments, ctx.needs_input_grad, strict=False))
        also = {self._equal[name] for name in self._equal if needed[name]}
        needs = [needed[name] or name in also for name in self.differentiable]
        known = ctx.others | dict(zip(ctx.names, ctx.saved_tensors, strict=True)) | given | {"needs": needs}
        arguments = {name: known[name] for name in self._wanted}
        if self._backward:
            gradients = self._backward(**arguments)
            gradients = differentiable_once(self.name, arguments.values(), gradients)
        else:
            with _validated():
                made = iter(self._op_bwd(*arguments.values(), *(known[name] for name in self._also), ctx.backend))
            gradients = [next(made) if need else None for need in needs]
            # An empty gradient of something that is not empty stands for None, which the schema has no word for.
            gradients = [
                None if g is None or g.shape != shape else g for g, shape in zip(gradients, ctx.shapes, strict=True)
            ]
        found = dict(zip(self.differentiable, gradients, strict=True))
        for name, other in self._equal.items():
            if needed[name] and found[name] is None:
                found[name] = given[other] if other in given else found[other]
        return tuple(
            found.get(name) if need else None
            for name, need in zip((*self.arguments, None, None), ctx.needs_input_grad, strict=False)
        )

    def _named_backward(self, values):
        """(arguments, those for another derivative only, backend) of a call of the backward."""
        *values, backend = values
        arguments = dict(zip((*self._wanted, *self._also), values, strict=True))
        return arguments, {name: arguments.pop(name) for name in self._also}, backend

    def _run_backward(self, *values):
        arguments, _, backend = self._named_backward(values)
        if self._validate_backward and not getattr(_inside, "validated", False):
            self._ask(self._validate_backward, arguments | {"backend": backend})
            _check.seeded(f"{self.name}_bwd", **arguments)
        return self._listed(registry.launcher(f"{self.name}_bwd", backend)(**arguments), arguments)

    def _run_fake_backward(self, *values):
        arguments, _, _ = self._named_backward(values)
        return self._listed(self._fake_backward(**arguments), arguments)

    def _listed(self, result, arguments):
        gradients, _ = result
        like = next(v for v in arguments.values() if isinstance(v, Tensor))
        needed = (g for g, need in zip(gradients, arguments["needs"], strict=True) if need)
        return [like.new_empty(0) if g is None else g for g in needed]

    # --- gradients of gradients ---------------------------------------------------------------------------------------

    def _setup_again(self, ctx, inputs, output):
        arguments, also, _ = self._named_backward(inputs)
        ctx.set_materialize_grads(False)
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        ctx.names = tuple(tensors)
        ctx.others = also | {name: value for name, value in arguments.items() if name not in tensors}
        ctx.save_for_backward(*tensors.values())

    def _differentiate_again(self, ctx, grads):
        """Of the gradients that autograd finds for the reference, on what the backward was given."""
        if self._again is None or ctx.others.get("dropout_p", 0) > 0:
            raise RuntimeError(TWICE.format(self.name))
        reference = registry.launcher(self.name, "reference")
        needed = dict(zip((*self._wanted, *self._also), ctx.needs_input_grad, strict=False))
        with torch.enable_grad():  # views, so that the gradient of one argument does not pass through another
            known = {name: t.view_as(t) for name, t in zip(ctx.names, ctx.saved_tensors, strict=True)}
            given = ctx.others | known
            given |= self._again(**given)
            sources = [given[n] for n, need in zip(self.differentiable, given["needs"], strict=True) if need]
            for source in sources:
                source.requires_grad_()
            outputs = reference(**{n: given[n] for n in inspect.signature(reference).parameters if n in given})
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            first = gradients_of(outputs, [given.get(f"grad_{n}") for n in self.outputs], sources)
        names = [name for name in known if needed[name]]
        # What the kernel left out is the gradient of another argument, and nobody asks for it here.
        found = dict(zip(names, gradients_of(first, grads, [known[name] for name in names]), strict=True))
        return tuple(map(found.get, (*self._wanted, *self._also, "backend")))


@contextlib.contextmanager
def _validated():
    """What is called within has been looked at."""
    before = getattr(_inside, "validated", False)
    _inside.validated = True
    try:
        yield
    finally:
        _inside.validated = before


_TENSORS = (Tensor, Tensor | None, list[Tensor])  #: annotations


def _for_schema(annotation):
    """torch 2.6 reads lists in their old spelling only."""
    return typing.List[typing.get_args(annotation)] if typing.get_origin(annotation) is list else annotation  # noqa: UP006


def _register(name, schema, run, fake):
    torch.library.define(f"vilt_fast::{name}", schema)
    torch.library.impl(f"vilt_fast::{name}", "CompositeExplicitAutograd")(run)
    torch.library.register_fake(f"vilt_fast::{name}")(fake)
    return getattr(torch.ops.vilt_fast, name).default


@torch.compiler.assume_constant_result
def _for_onnx():
    return torch.onnx.is_in_onnx_export()


def _shape_of(value):
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_shape_of, value))})"
    return f"a {type(value).__name__}"


# What stands between a call in Python and a kernel, as far as this torch lets it be asked: modes (fake tensors, FLOP
# counters), functorch transforms, tangents of forward-mode AD, tracers, profilers that want to see the op.
_NO_TENSORS = {type(None), int, float, bool}
_INTERNALS = (
    getattr(torch._C, "_len_torch_dispatch_stack", None),
    getattr(torch._C, "_are_functorch_transforms_active", None),
    getattr(torch._C, "_get_tracing_state", None),
    getattr(torch.autograd, "_profiler_enabled", None),
)
_KNOWN = None not in _INTERNALS and hasattr(torch.autograd.forward_ad, "_current_level")
_PLAIN_TYPES = {Tensor, torch.nn.Parameter}


def _plain_eager(values):
    """Whether nothing but a launcher is to see this call: plain tensors, no mode, no transform, no tracer."""
    if not _KNOWN or torch.compiler.is_compiling() or torch.autograd.forward_ad._current_level >= 0:
        return False
    for ask in _INTERNALS:
        if ask():
            return False
    for value in values:
        kind = type(value)
        if kind in _PLAIN_TYPES or kind in _NO_TENSORS:
            continue
        if isinstance(value, Tensor):
            return False
        if isinstance(value, list) and not once(value, "plain", lambda value=value: _are_plain(value)):
            return False
    return True


def _are_plain(values):
    return not any(isinstance(value, Tensor) and type(value) not in _PLAIN_TYPES for value in values)

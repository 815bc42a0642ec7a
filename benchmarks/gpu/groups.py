"""What groups of providers share: the arguments that a forward of the model gives its ops, inputs, names, times."""

import contextlib
from functools import partial
from unittest import mock

import torch

import vilt_fast
from vilt_fast import functional

from . import timing


def lengths(context, case):
    """Real rows of each sample."""
    return case.lengths(context.config.patch_size)


def recorded(context, case):
    """{op: (arguments, keyword arguments)} of the first call of each op in a forward of the accelerated model."""
    return context.once(("calls", case.name), partial(_record, context, case))


def _record(context, case):
    model = vilt_fast.accelerate(context.model().to(context.dtype))
    calls = {}

    def note(op, function, *arguments, **keywords):
        calls.setdefault(op, (arguments, keywords))
        return function(*arguments, **keywords)

    with contextlib.ExitStack() as stack, torch.no_grad():
        for op in ("attention", "patch_embed", "text_embed"):
            own = getattr(functional, op)
            stack.enter_context(mock.patch.object(functional, op, partial(note, op, own)))
        model(**context.inputs(case))
    missing = {"attention", "patch_embed", "text_embed"} - set(calls)
    if missing:
        raise RuntimeError(f"the accelerated model did not call {', '.join(sorted(missing))}")
    return calls


def rows_of(real):
    """Numbers of the real rows of a padded batch, so that they can be taken without looking for them."""
    return real.flatten().nonzero().flatten()


def double(value):
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.detach().double() if floating else value


def detached(value):
    return value.detach() if isinstance(value, torch.Tensor) else value


def compiled(context, case, function):
    """{"compiled": ...} at the largest batch: compiling takes seconds, at every shape anew."""
    if case.batch < max(context.batches[:3]):
        return {}
    return {"compiled": torch.compile(function, backend=context.compiler, dynamic=False)}


def with_each(functions, *arguments):
    return {name: partial(function, *arguments) for name, function in functions.items()}


def dtype_of(context):
    return str(context.dtype).removeprefix("torch.")


@torch.no_grad()
def group(context, op, case, calls, truth, work, dtype=None, **options):
    name = f"{op} {case.name}"
    timing.group(context, "kernels", name, case.shape, dtype or dtype_of(context), calls, truth, work, **options)


def group_with_gradients(context, op, case, calls, truth, work):
    timing.group(context, "kernels", f"{op}_bwd {case.name}", case.shape, dtype_of(context), calls, truth, work)


def random(context, *shape, scale=1.0):
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(context.device, context.dtype)

"""Checks of shapes and dtypes at the public edge; values are looked at only where `readable` says so."""

import functools
import inspect
import os

import torch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INDICES = (torch.int64, torch.int32)


def shapes(op, **expected):
    """Bind dimension names over all tensors; raise on the first that does not fit.

    Each keyword is ``name=(tensor_or_None, "B M D")``; a dimension is a name, a number, a name plus a number ("B+1"),
    and "..." in front stands for any leading dimensions. Returns {name: size}.
    """
    sizes = {}
    for name, (tensor, spec) in expected.items():
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} is a {type(tensor).__name__}, expected a tensor [{spec}].")
        # torch.compile traces through a cache, and warns of it.
        dims, leading = (_dims if torch.compiler.is_compiling() else _known_dims)(spec)
        shape = tuple(tensor.shape)
        if leading:
            shape = shape[len(shape) - len(dims) :] if len(shape) >= len(dims) else shape
        fits = len(shape) == len(dims)
        for (symbol, number), size in zip(dims, shape, strict=False):
            if symbol is None:
                fits = fits and size == number
            elif symbol not in sizes:
                sizes[symbol] = size - number
                fits = fits and sizes[symbol] >= 0
            else:
                fits = fits and size == sizes[symbol] + number
        if not fits:
            known = ", ".join(f"{key}={value}" for key, value in sizes.items())
            raise ValueError(
                f"{op}: {name} has shape {list(tensor.shape)}, expected [{', '.join(spec.split())}] with {known} "
                "(sizes taken from the arguments before it)."
            )
    return sizes


def _dims(spec):
    """([(symbol, what is added) or (None, number), ...], whether any dimensions may come before)."""
    names = spec.split()
    leading = names[:1] == ["..."]
    parts = [name.partition("+") for name in names[leading:]]
    return [(None, int(s)) if s.isdigit() else (s, int(extra or 0)) for s, _, extra in parts], leading


_known_dims = functools.cache(_dims)


def of_forms(look, **given):
    """`look(**given)`, which looks at no values, or what it gave for the like before; not where it raised.

    Alike are tensors of one shape, dtype and device, and all else that is the same.
    """
    if torch.compiler.is_compiling():
        return look(**given)
    key = [look]
    for value in given.values():
        kind = type(value)
        if kind in _ORDINARY:
            key += (value.shape, value.dtype, value.device)
        elif kind in _PLAIN:
            key += (kind, value)
        else:
            return look(**given)
    key = tuple(key)
    found = _found.get(key, _found)
    if found is _found:
        found = look(**given)
        if len(_found) >= 4096:  # batches of ever other sizes
            _found.clear()
        _found[key] = found
    return found


def both(validate, facts):
    """For `of_forms`: the facts of a call that `validate` lets pass; each is given what it names."""
    names = [tuple(inspect.signature(function).parameters) for function in (validate, facts)]

    def look(**given):
        validate(**{name: given[name] for name in names[0]})
        return facts(**{name: given[name] for name in names[1]})

    return look


_ORDINARY = {torch.Tensor, torch.nn.Parameter}
_PLAIN = {int, float, bool, str, torch.dtype, type(None)}
_found = {}  # which types of device count as GPUs is among it: what plays one in a process that went on forgets it all


def dtypes(op, allowed, **tensors):
    """TypeError unless every tensor that is not None has one of the allowed dtypes."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in allowed:
            expected = " or ".join(str(dtype) for dtype in allowed)
            raise TypeError(f"{op}: {name} is {tensor.dtype}, expected {expected}; convert it with .to(...).")


def like(op, shape, dtype, **tensors):
    """ValueError or TypeError unless every tensor that is not None has this shape, and this dtype if one is given."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, expected {list(shape)}.")
        if tensor is not None and dtype is not None and tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} is {tensor.dtype}, expected {dtype}.")


def padding_masks(op, **masks):
    """TypeError unless every mask is bool; what converts one of HuggingFace's must turn it around, too."""
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise TypeError(
                f"{op}: {name} is {mask.dtype}, expected torch.bool, True where padded: `attention_mask == 0` of one "
                "that is 1 where real."
            )


def same_dtype(op, **tensors):
    """TypeError unless all tensors that are not None share one dtype."""
    given = [(name, tensor.dtype) for name, tensor in tensors.items() if tensor is not None]
    for name, dtype in given[1:]:
        if dtype != given[0][1]:
            raise TypeError(f"{op}: {name} is {dtype} but {given[0][0]} is {given[0][1]}; give both the same dtype.")


def linear_dtypes(op, x, **parameters):
    """As `same_dtype`, but float32 parameters may be rounded to the dtype of x as they are read."""
    wide = x.dtype in (torch.bfloat16, torch.float16)
    exact = {name: t for name, t in parameters.items() if t is None or not (wide and t.dtype == torch.float32)}
    same_dtype(op, x=x, **exact)


def other_dtype(x, *parameters):
    """The first dtype of these that is not that of x, or None."""
    return next((t.dtype for t in parameters if t is not None and t.dtype != x.dtype), None)


def same_device(op, **tensors):
    """ValueError unless all tensors that are not None live on one device."""
    given = [(name, tensor.device) for name, tensor in tensors.items() if tensor is not None]
    for name, device in given[1:]:
        if device != given[0][1]:
            raise ValueError(f"{op}: {name} is on {device} but {given[0][0]} is on {given[0][1]}; move them together.")


def offsets(op, name, cu_seqlens, rows):
    """ValueError where values may be looked at, unless these are the offsets of samples that lie end to end."""
    if not readable(cu_seqlens):
        return
    values = cu_seqlens.tolist()
    # On a device rows may lie beyond the last sample: what is captured for a bucket of sizes has some to spare.
    ends = values[-1] == rows if cu_seqlens.device.type == "cpu" else values[-1] <= rows
    if values[0] != 0 or not ends or any(a > b for a, b in zip(values, values[1:], strict=False)):
        raise ValueError(
            f"{op}: {name} is {values}, expected to start at 0, not to decrease and to end at {rows} rows."
        )


def used(op, seqused_k, cu_seqlens):
    """ValueError where values may be looked at, unless every sample has as many rows as are to be its keys."""
    if seqused_k is None or not readable(seqused_k) or not readable(cu_seqlens):
        return
    starts = cu_seqlens.tolist()
    for sample, (keys, start, end) in enumerate(zip(seqused_k.tolist(), starts, starts[1:], strict=False)):
        if not 0 <= keys <= end - start:
            raise ValueError(
                f"{op}: seqused_k is {keys} for sample {sample}, expected 0 to {end - start}, the rows it has."
            )


def seeded(op, dropout_p=0.0, seed=None, **_):
    """ValueError where there is nothing that a mask of dropout would be a function of."""
    if dropout_p > 0 and (seed is None or seed.shape != (1,) or seed.dtype != torch.int64):
        given = "none" if seed is None else f"{seed.dtype} {list(seed.shape)}"
        raise ValueError(f"{op}: dropout takes a seed, int64 [1], in a backward that of the forward; it is {given}.")


def probability(op, dropout_p):
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{op}: dropout_p is {dropout_p}, expected a probability in [0, 1).")


def positive(op, **numbers):
    """ValueError unless every number is > 0 and finite."""
    for name, number in numbers.items():
        if not 0 < number < float("inf"):
            raise ValueError(f"{op}: {name} is {number}, expected a finite number > 0.")


def counts(op, **numbers):
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{op}: {name} is {number!r}, expected an integer >= 1.")


def readable(tensor):
    """May its values be looked at?

    On the CPU; elsewhere it would wait for the device, so only under VILT_FAST_CHECK=1. Never while torch.compile is
    tracing or a CUDA graph is being captured.
    """
    if torch.compiler.is_compiling():
        return False
    if tensor.device.type == "cpu":
        return True
    capturing = tensor.is_cuda and torch.cuda.is_current_stream_capturing()
    return os.environ.get("VILT_FAST_CHECK") == "1" and not capturing


def limits(values):
    """(smallest, largest) as numbers; None where there are none, or where looking would wait."""
    if not values.numel() or not readable(values):
        return None
    return tuple(bound.item() for bound in values.aminmax())


def needs_grad(*tensors):
    # What is no tensor is found by `shapes`.
    return torch.is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in tensors)


_functorch = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def transforming():
    """Whether a transform of torch.func, or forward-mode AD, is under way in this thread. Takes 1 us."""
    if torch.compiler.is_compiling():  # which takes transforms apart itself
        return False
    return _functorch() or getattr(torch.autograd.forward_ad, "_current_level", 0) >= 0


def exporting():
    """Whether `torch.export` is under way, by its flag: torch 2.11's `is_exporting` is true of torch.compile, too."""
    if hasattr(torch.compiler, "_is_exporting_flag"):
        return torch.compiler._is_exporting_flag
    # torch 2.6: export that is not strict; the strict one stops by itself where a plan would be made.
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def transformed(tensors):
    """Whether what is computed with these is for torch.func, which wraps all that is computed, or has a tangent."""
    return transforming() and (_functorch() or any(map(has_tangent, tensors)))


def has_tangent(tensor):
    """Whether forward-mode AD is to find a derivative of what is computed with this tensor."""
    return torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None


def autocast(*tensors):
    """What autocast would do to the inputs of a matrix product: cast float32 to its dtype; no-op when it is off."""
    kind = getattr(tensors[0], "device", torch.device("cpu")).type  # what is no tensor is found by `shapes`
    if not torch.is_autocast_enabled(kind):
        return tensors
    to = torch.get_autocast_dtype(kind)
    return tuple(t.to(to) if t is not None and t.dtype == torch.float32 else t for t in tensors)


def autocast_linear(backend, x, weight, bias):
    """As `autocast`, but parameters stay as they are where native kernels are asked, which round what they read."""
    if backend in (None, "cpp") and getattr(x, "device", None) == torch.device("cpu"):
        return *autocast(x), weight, bias
    return autocast(x, weight, bias)


def seed(device, dropout_p):
    """What a dropout mask is a function of, int64 [1] on the device; None without dropout."""
    return torch.randint(2**62, (1,), device=device) if dropout_p > 0 else None

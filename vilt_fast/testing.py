"""What a test of a backend needs: the error budget, and inputs that are hard on purpose.

The budget: against float64, a result may be at most `factor` times as wrong as plain PyTorch in the same dtype, plus
one rounding of the result. No tolerance is chosen by hand: the data decide.
"""

import torch

from .ops import _define
from .reference.encoder import LayerParameters


def _measures(error, exact):
    """(largest absolute error, relative L2 error); 0 for empty tensors."""
    if exact.numel() == 0:
        return 0.0, 0.0
    norm = exact.norm().item()
    return error.abs().max().item(), error.norm().item() / norm if norm else error.norm().item()


def assert_within_budget(actual, same_dtype_reference, exact, *, factor=2.0, what=""):
    """AssertionError unless error(actual) <= factor * error(same_dtype_reference) + one rounding band.

    Both errors are against ``exact``, as largest absolute error and as relative L2 error. The band is one rounding to
    the dtype of ``actual``: ``eps * max|exact|`` for the first, ``eps`` for the second. Where ``exact`` is NaN or
    infinite, ``actual`` must be the same.

    Args:
        actual: the result under test.
        same_dtype_reference: plain PyTorch's result for the same inputs in the same dtype.
        exact: the float64 result, for inputs cast up from the very same values.
        factor: how many times plain PyTorch's error is allowed.
        what: name of the quantity, for the message.
    """
    what = what or "result"
    for name, tensor in (("actual", actual), ("same_dtype_reference", same_dtype_reference)):
        assert tensor.shape == exact.shape, f"{what}: {name} has shape {list(tensor.shape)}, exact {list(exact.shape)}"
    assert exact.dtype == torch.float64, f"{what}: exact is {exact.dtype}, expected torch.float64"
    eps = torch.finfo(actual.dtype).eps
    actual, reference, exact = (t.detach().double().cpu() for t in (actual, same_dtype_reference, exact))
    finite = exact.isfinite()
    odd = ~torch.isclose(actual, exact, equal_nan=True) & ~finite
    assert not odd.any(), f"{what}: {int(odd.sum())} of {int((~finite).sum())} NaN or infinite values differ from exact"
    broken = finite & ~actual.isfinite()
    assert not broken.any(), f"{what}: {int(broken.sum())} values are NaN or infinite; first at {_first(broken)}"
    error, reference_error, exact = (torch.where(finite, t, 0) for t in (actual - exact, reference - exact, exact))
    biggest = exact.abs().max().item() if exact.numel() else 0.0
    rows = zip(
        ("max abs", "relative L2"), _measures(error, exact), _measures(reference_error, exact), (eps * biggest, eps),
        strict=True,
    )  # fmt: skip
    lines, within = [], True
    for name, got, plain, band in rows:
        allowed = factor * plain + band
        ok = got <= allowed
        within = within and ok
        lines.append(
            f"  {name:<12} {got:.3e} {'<=' if ok else '>'} {allowed:.3e} = {factor:g} x {plain:.3e} (PyTorch) + "
            f"{band:.3e} (rounding)"
        )
    if not within:
        worst = _first(error.abs() == error.abs().max())
        raise AssertionError(
            f"{what}: error budget exceeded, worst at {worst}: "
            f"{actual[worst].item():.9g} instead of {exact[worst].item():.9g}\n" + "\n".join(lines)
        )


def _first(mask):
    return tuple(mask.nonzero()[0].tolist())


def opcheck(op, backend, *, keep=False, **arguments):
    """``torch.library.opcheck`` of ``torch.ops.vilt_fast.<op>`` with one of its backends.

    Args:
        keep: with what the backward needs. arguments: those of the op's launchers, by name; None if missing.
    """
    values = [arguments.pop(name, None) for name in _define.OPS[op].arguments]
    assert not arguments, f"{op} has no arguments {', '.join(arguments)}"
    torch.library.opcheck(getattr(torch.ops.vilt_fast, op).default, (*values, backend, keep))


def random_weights(module, *, std=0.3, seed=0):
    """Fill every parameter of ``module`` with normal noise, in place; returns it. Zero-initialised tables hide bugs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return module


def offsets(lengths):
    """cu_seqlens, int32 [B + 1], of a list of lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def strided(tensor):
    """The same values, non-contiguous: every other row and column of a bigger tensor, whose gaps are NaN."""
    big = torch.full([2 * size + 1 for size in tensor.shape], float("nan")).to(tensor.dtype)
    view = big[tuple(slice(1, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor).requires_grad_(False)


def sliced(tensor):
    """The same values as a column slice of a wider NaN-filled tensor: rows are apart, the last dimension is dense."""
    wide = torch.full((*tensor.shape[:-1], 3 * tensor.shape[-1]), float("nan"), dtype=tensor.dtype)
    view = wide[..., tensor.shape[-1] : 2 * tensor.shape[-1]]
    return view.copy_(tensor)


def poisoned(tensor, pad):
    """A copy with NaN wherever ``pad`` (bool, True where padded, leading dimensions of ``tensor``) is True."""
    return tensor.masked_fill(pad.reshape(*pad.shape, *[1] * (tensor.dim() - pad.dim())), float("nan"))


def padding_masks(lengths, size=None):
    """[B, size] bool, True where padded, for a list of lengths; size is the longest by default."""
    size = max(lengths) if size is None else size
    return torch.arange(size) >= torch.tensor(lengths).unsqueeze(1)


def encoder_parameters(layers, width, inner, *, std=0.3, bias=True, seed=0, dtype=torch.float32):
    """Random parameters for `functional.encoder`, LayerNorm scales near 1; with bias=False linear biases are empty."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=std, shift=0.0):
        return (torch.randn(*shape, generator=generator) * scale + shift).to(dtype)

    def one(name):
        kind, _, what = name.partition("_")
        if kind.startswith("norm"):
            return draw(width, shift=float(what == "weight"))
        rows, columns = inner if kind == "fc1" else width, inner if kind == "fc2" else width
        if what == "weight":
            return draw(rows, columns, scale=std / columns**0.5 * 3)
        return draw(rows) if bias else torch.empty(0, dtype=dtype)

    return [one(name) for _ in range(layers) for name in LayerParameters._fields]


def packing_indices(lengths_text, grids, *, canvas, table=(3, 3), chosen=None, query_rows=0, seed=0):
    """Index tensors of `functional.patch_embed` for a batch, written plainly (no plan): a dict of its arguments.

    Args:
        lengths_text: text rows of each sample. grids: (h, w) patches of each sample, anchored at the top left.
        canvas: (gh, gw) patches of the pixel tensor. table: (rows, columns) of the position grid.
        chosen: at most so many patches of each sample, drawn at random (None: all, in raster order).
        query_rows: rows left over at the end of each sample, which nobody writes.
    """
    generator = torch.Generator().manual_seed(seed)
    names = ("text_rows", "patch_source", "patch_rows", "patch_sample", "pos_index", "cls_rows")
    lists = {name: [] for name in names}
    weights, row = [], 0
    for b, (text, (h, w)) in enumerate(zip(lengths_text, grids, strict=True)):
        lists["text_rows"] += range(row, row + text)
        lists["cls_rows"].append(row + text)
        row += text + 1
        cells = torch.cartesian_prod(torch.arange(h), torch.arange(w)).reshape(-1, 2)
        if chosen is not None:
            cells = cells[torch.randperm(len(cells), generator=generator)[:chosen]]
        for y, x in cells.tolist():
            lists["patch_source"].append(b * canvas[0] * canvas[1] + y * canvas[1] + x)
            lists["patch_rows"].append(row)
            lists["patch_sample"].append(b)
            at = [0.0 if n == 1 else p * (size - 1) / (n - 1) for p, n, size in ((y, h, table[0]), (x, w, table[1]))]
            top, left = int(at[0]), int(at[1])
            fy, fx = at[0] - top, at[1] - left
            corners, shares = [], []
            for i, share_y in ((top, 1 - fy), (min(top + 1, table[0] - 1), fy)):
                for j, share_x in ((left, 1 - fx), (min(left + 1, table[1] - 1), fx)):
                    corners.append(1 + i * table[1] + j)
                    shares.append(share_y * share_x)
            lists["pos_index"].append(corners)
            weights.append(shares)
            row += 1
        row += query_rows
    result = {name: torch.tensor(values, dtype=torch.int64) for name, values in lists.items()}
    result["pos_index"] = result["pos_index"].reshape(-1, 4)
    result["pos_weight"] = torch.tensor(weights, dtype=torch.float32).reshape(-1, 4)
    result["modality_index"] = torch.ones(len(grids), dtype=torch.int64)
    result["total_rows"] = row
    return result

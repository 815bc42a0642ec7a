"""Parity and speed: run models on one input, compare with float64, time them interleaved, print and write tables.

Error of an output: ||x - y||_2 / ||y||_2 over real rows, y being HuggingFace's own model in float64 with the same
random draws of patches. Budgets (x = ours, h = HuggingFace's own model in the same precision):

    float32    x <= 2 h c + one rounding
    bfloat16   x <= h c + one rounding
    int8       x <= 3e-2 on the pooled output

One rounding is what writing the exact answer down in that precision costs: u / sqrt(3) in root mean square, u the
unit roundoff (2^-24, 2^-8). c = 1 + 3 / sqrt(n) for an output of n numbers: the ratio of two norms of n rounding errors
varies by about 1 / sqrt(n), which matters for the two logits of a classifier and not for a hidden state.
"""

import copy
import statistics
import time
from typing import NamedTuple

import torch

from .samples import real_rows

ROUNDING = {"float32": 2.0**-24 / 3**0.5, "bfloat16": 2.0**-8 / 3**0.5}
INT8_LIMIT = 3e-2
PRECISIONS = ("float32", "bfloat16", "int8")


class Parity(NamedTuple):
    """One line of the parity table. `limit` is None where no budget is set; `reference_error` is HuggingFace's own."""

    output: str
    precision: str
    error: float
    max_error: float
    reference_error: float | None
    limit: float | None

    @property
    def ok(self):
        """False when the budget is broken; NaN breaks every budget."""
        return self.error == self.error and (self.limit is None or self.error <= self.limit)


def unavailable(precision):
    """Why this machine cannot accelerate a model in `precision`, or ""."""
    from ..ops import registry

    return registry.why_unavailable("quantize_linear", "cpp") if precision == "int8" else ""


def accelerated(model, precision, **options):
    """An accelerated deep copy of `model` in "float32", "bfloat16" or "int8"; the model given is left alone."""
    import vilt_fast

    model = copy.deepcopy(model)
    if precision == "bfloat16":
        model = model.to(torch.bfloat16)
    return vilt_fast.accelerate(model, quantize="int8" if precision == "int8" else None, **options)


def trunk(model):
    """The `ViltModel` inside a task model (or the model itself)."""
    return getattr(model, "vilt", model)


@torch.inference_mode()
def outputs(model, inputs, seed=0):
    """`{name: float64 tensor}` of everything a model says about `inputs`: real rows of `last_hidden_state`, the pooled
    output (both of the first image, where a sample has several), and the logits of its head. Every forward starts from
    `seed`, because the reference draws its patch order.
    """
    found = {}
    # transformers 4.30 does not cast pixels itself.
    inputs = {**inputs, "pixel_values": inputs["pixel_values"].to(model.dtype)}
    first = inputs
    if inputs["pixel_values"].dim() == 5:
        first = {**inputs, **{name: inputs[name][:, 0] for name in ("pixel_values", "pixel_mask")}}
    torch.manual_seed(seed)
    result = trunk(model)(**first, return_dict=True)
    found["last_hidden_state"] = result.last_hidden_state[real_rows(first, model.config)].double()
    if result.pooler_output is not None:
        found["pooler_output"] = result.pooler_output.double()
    if trunk(model) is not model:
        torch.manual_seed(seed)
        logits = model(**inputs, return_dict=True).logits
        per_token = logits.dim() == 3
        found["logits"] = (logits[inputs["attention_mask"] != 0] if per_token else logits).double()
    return found


def relative_error(value, truth):
    """||value - truth|| / ||truth||; 0 when both are zero, NaN when either is."""
    difference, scale = torch.linalg.vector_norm(value - truth).item(), torch.linalg.vector_norm(truth).item()
    return difference / scale if scale else difference


def compare(found, truth, precision, reference=None):
    """Parity lines for one model: `found` and `truth` from `outputs`, `reference` = HuggingFace's own outputs in the
    same precision (None for int8, which it does not have)."""
    pooled = "pooler_output" if "pooler_output" in truth else "logits"
    lines = []
    for name, expected in truth.items():
        own = relative_error(reference[name], expected) if reference else None
        limit = None
        if precision == "int8":
            limit = INT8_LIMIT if name == pooled else None
        elif own is not None:
            chance = 1 + 3 / max(expected.numel(), 1) ** 0.5
            limit = (2 if precision == "float32" else 1) * own * chance + ROUNDING[precision]
        worst = (found[name] - expected).abs().max().item()
        lines.append(Parity(name, precision, relative_error(found[name], expected), worst, own, limit))
    return lines


def parity(model, inputs, precisions=PRECISIONS, seed=0, step=lambda what: None):
    """Parity lines of the accelerated model in each precision, HuggingFace's own error beside each.

    `model` is a HuggingFace model in float32, eval mode; it is not modified. `step(what)` is called before each stage,
    for a progress bar.
    """
    step("HuggingFace, float64")
    double = copy.deepcopy(model).double()
    truth = outputs(double, inputs, seed)
    del double
    lines = []
    for precision in precisions:
        reference = None
        if precision != "int8":
            step(f"HuggingFace, {precision}")
            own = model if precision == "float32" else copy.deepcopy(model).to(torch.bfloat16)
            reference = outputs(own, inputs, seed)
        step(f"vilt_fast, {precision}")
        ours = accelerated(model, precision, patch_order="reference")
        lines += compare(outputs(ours, inputs, seed), truth, precision, reference)
    return lines


def interleave(calls, repeats, warmup=1, step=lambda what: None):
    """Seconds of each call: `{name: [repeats values]}`. A round calls each once: a busy machine slows all alike.

    `calls` maps names to functions without arguments; `step(name)` is called before each.
    """
    times = {name: [] for name in calls}
    for i in range(warmup + repeats):
        for name, call in calls.items():
            step(name)
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
            if i >= warmup:
                times[name].append(elapsed)
    return times


def quantiles(values):
    """(p20, p50, p80) of a list, linear interpolation."""
    if len(values) == 1:
        return (values[0],) * 3
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], statistics.median(values), cuts[7]


def parity_rows(lines):
    """Header and string rows of the parity table."""
    header = ("output", "precision", "error", "HF's", "allowed", "largest", "")
    rows = []
    for line in lines:
        rows.append(
            (
                line.output,
                line.precision,
                f"{line.error:.1e}",
                "-" if line.reference_error is None else f"{line.reference_error:.1e}",
                "-" if line.limit is None else f"{line.limit:.1e}",
                f"{line.max_error:.1e}",
                "ok" if line.ok else "OVER",
            )
        )
    return header, rows


def rich_table(title, header, rows, text_columns=2):
    """A rich table: the first `text_columns` columns to the left, figures to the right, verdicts coloured."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(title),
        title_style="bold",
        title_justify="left",
        header_style="bold cyan",
        show_header=any(header),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < text_columns else "right", no_wrap=True)
    colours = {"ok": "[green]ok", "OVER": "[bold red]OVER"}
    for row in rows:
        table.add_row(*(colours.get(cell, escape(cell)) for cell in row))
    return table


def markdown_table(header, rows, text_columns=2):
    """The same table in Markdown."""
    rule = ["---" if i < text_columns else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def progress(console=None):
    """A rich progress bar that says what runs, how far it is and how long it has taken."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)

"""`vilt-fast demo`: photographs through HuggingFace's ViLT and the accelerated one; parity, speed, a picture."""

import copy
import math
from pathlib import Path

import torch

from . import checkpoint as checkpoints
from . import report, samples
from .arguments import add_model, add_threads, set_threads, whole

LABELS = {
    "hf": "HuggingFace, float32",
    "hf_bfloat16": "HuggingFace, bfloat16",
    "float32": "vilt_fast, float32",
    "bfloat16": "vilt_fast, bfloat16",
    "int8": "vilt_fast, int8",
}


def add(commands):
    """The subcommand and its arguments."""
    parser = commands.add_parser("demo", help="photographs through HuggingFace's ViLT and the accelerated one")
    add_model(parser)
    parser.add_argument("--out", default="demo", help="where report.md and report.png go (default: demo)")
    parser.add_argument("--batch", type=whole(1, 1024), default=8, help="photographs in the batch (default: 8)")
    parser.add_argument("--repeats", type=whole(1, 10_000), default=5, help="timed runs of each model (default: 5)")
    add_threads(parser)
    parser.set_defaults(run=_run)


def _run(arguments, rest):
    set_threads(arguments.threads)
    return 0 if run(arguments.model, arguments.out, arguments.batch, arguments.repeats) else 1


def run(checkpoint=None, out="demo", count=8, repeats=5, console=None, model=None):
    """Print the parity and the speed table, write `out`/report.md and `out`/report.png.

    `checkpoint` is a folder or hub id; None draws ViLT-B/32 at random (`model` supplies a ready one instead). Returns
    True if every error budget holds.
    """
    import matplotlib  # noqa: F401  missing packages are to be named before minutes of work, not after
    from rich.console import Console
    from rich.markup import escape

    console = console or Console()
    if model is None:
        with console.status(
            "Building ViLT-B/32 with random weights" if checkpoint is None else f"Loading {escape(checkpoint)}"
        ):
            model = checkpoints.random_vqa() if checkpoint is None else checkpoints.load(checkpoint)
    pairs = samples.scenes(count)
    flat = samples.model_inputs(model.config, pairs, checkpoint)
    several = type(model).__name__ == checkpoints.TASKS["nlvr2"]
    inputs = samples.group_images(flat, model.config.num_images) if several else flat
    tokens = samples.token_counts(flat, model.config)

    precisions = [p for p in report.PRECISIONS if not report.unavailable(p)]
    for precision in report.PRECISIONS:
        if precision not in precisions:
            console.print(f"{precision} is left out: {report.unavailable(precision)}", markup=False)

    with report.progress(console) as bar:
        stages = 1 + sum(1 if p == "int8" else 2 for p in precisions)
        task = bar.add_task("", total=stages + (2 + len(precisions)) * (repeats + 1))
        lines = report.parity(model, inputs, precisions, step=_stepper(bar, task))
        times = _times(model, inputs, precisions, repeats, _stepper(bar, task))

    what = f"{type(model).__name__}, {checkpoint or 'random weights'}, batch {len(inputs['input_ids'])}"
    parity = report.parity_rows(lines)
    speed = _speed_rows(times, tokens)
    console.print(f"[bold]{escape(what)}[/], {torch.get_num_threads()} threads")
    console.print(report.rich_table("Parity: error against float64", *parity))
    console.print(report.rich_table("Speed: median of interleaved runs", *speed, text_columns=1))
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    draw(out / "report.png", pairs, flat, model.config, times, lines)
    (out / "report.md").write_text(_markdown(what, parity, speed), encoding="utf-8")
    console.print(f"Wrote {out / 'report.md'} and {out / 'report.png'}", soft_wrap=True, markup=False)
    return all(line.ok for line in lines)


def _stepper(bar, task):
    """A function that shows what begins now and counts what is done."""

    def step(what):
        bar.update(task, description=LABELS.get(what, what), advance=1)

    return step


def _times(model, inputs, precisions, repeats, step):
    """Interleaved seconds of HuggingFace's model in float32 and bfloat16, and of each precision of ours."""
    models = {"hf": model, "hf_bfloat16": copy.deepcopy(model).to(torch.bfloat16)}
    for precision in precisions:
        models[precision] = report.accelerated(model, precision)

    def call(which):
        with torch.inference_mode():
            models[which](**inputs)

    return report.interleave({name: lambda name=name: call(name) for name in models}, repeats, step=step)


def _speed_rows(times, tokens):
    """Header and rows of the speed table. `tokens` = (real, padded)."""
    real, padded = tokens
    base = report.quantiles(times["hf"])[1]
    rows = []
    for name, values in times.items():
        median = report.quantiles(values)[1]
        computed = padded if name.startswith("hf") else real
        rows.append(
            (LABELS[name], f"{median * 1e3:.0f} ms", f"{base / median:.2f}x", str(computed), str(padded - computed))
        )
    return ("model", "median", "speed-up", "tokens computed", "padding skipped"), rows


def _markdown(what, parity, speed):
    """The report as Markdown."""
    return (
        f"# vilt_fast demo\n\n{what}, torch {torch.__version__}, {torch.get_num_threads()} threads.\n\n"
        "![Photographs, texts, speed and error](report.png)\n\n"
        "## Parity\n\nError of each output against HuggingFace's own model in float64: relative (Euclidean norm, real "
        "rows), and the largest single difference.\n\n"
        f"{report.markdown_table(*parity)}\n\n"
        "## Speed\n\nMedian of interleaved runs in one process; the speed-up is over HuggingFace's own model in "
        "float32.\n\n"
        f"{report.markdown_table(*speed, text_columns=1)}\n"
    )


def draw(path, pairs, flat, config, times, lines):
    """The picture of the report: every photograph on the patch grid it gets, its text, and speed and error bars."""
    import textwrap

    from matplotlib.figure import Figure

    columns = 4
    rows = -(-len(pairs) // columns)
    figure = Figure(figsize=(14, 3.9 * rows + 3.4), facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    top, bottom = figure.subfigures(2, 1, height_ratios=(3.9 * rows, 3.4))
    axes = top.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    words = flat["attention_mask"].sum(1).tolist()
    patch = config.patch_size
    for axis, (image, text), mask, length in zip(axes, pairs, flat["pixel_mask"], words, strict=False):
        height, width = int(mask[:, 0].sum()), int(mask[0].sum())
        axis.set_anchor("S")
        axis.imshow(image, extent=(0, width, height, 0), aspect="equal")
        axis.vlines(range(patch, width, patch), 0, height, colors="white", linewidth=0.4, alpha=0.5)
        axis.hlines(range(patch, height, patch), 0, width, colors="white", linewidth=0.4, alpha=0.5)
        grid = f"{length} text tokens + {height // patch} x {width // patch} patches"
        axis.set_title(textwrap.fill(text, 50), fontsize=9)
        axis.text(width / 2, height * 1.02, grid, ha="center", va="top", fontsize=8.5, color="0.4")
    left, right = bottom.subplots(1, 2)
    _speed_bars(left, times)
    _error_bars(right, lines)
    figure.savefig(path, dpi=110)


def _speed_bars(axis, times):
    """Horizontal bars of the medians, the ratio written at the end of each."""
    names = list(times)[::-1]
    medians = [report.quantiles(times[name])[1] * 1e3 for name in names]
    colours = ["0.65" if name.startswith("hf") else "#1f6f8b" for name in names]
    axis.barh([LABELS[name] for name in names], medians, color=colours, height=0.62)
    for i, value in enumerate(medians):
        axis.text(value, i, f"  {value:.0f} ms, {medians[-1] / value:.2f}x", va="center", fontsize=10)
    axis.set_xlim(0, max(medians) * 1.28)
    axis.set_title("Time of one batch (median, ms)", fontsize=11, loc="left")
    _clean(axis)


def _error_bars(axis, lines):
    """Pooled error of each precision beside HuggingFace's own, log scale, the budget as a tick."""
    pooled = "pooler_output" if any(line.output == "pooler_output" for line in lines) else lines[0].output
    chosen = [line for line in lines if line.output == pooled][::-1]
    tiny = 1e-9
    for i, line in enumerate(chosen):
        place = i if line.reference_error is None else i - 0.17
        label = "vilt_fast" if i == 0 else None
        axis.barh(place, max(line.error, tiny), height=0.3, color="#1f6f8b", label=label)
        if line.reference_error is not None:
            label = "HuggingFace" if line.precision == "float32" else None
            axis.barh(i + 0.17, max(line.reference_error, tiny), height=0.3, color="0.65", label=label)
        if line.limit is not None:
            label = "allowed" if i == 0 else None
            axis.plot([line.limit] * 2, [i - 0.36, i + 0.36], color="#c0392b", linewidth=2, label=label)
    axis.set_yticks(range(len(chosen)), [line.precision for line in chosen])
    axis.set_xscale("log")
    smallest = min(max(line.error, tiny) for line in chosen)
    axis.set_xlim(10.0 ** math.floor(math.log10(smallest) - 0.3))
    axis.set_title(f"Error of {pooled} against float64 (relative)", fontsize=11, loc="left")
    axis.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(1.0, 0.3))
    _clean(axis)


def _clean(axis):
    """No frame where it says nothing."""
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.tick_params(length=0)

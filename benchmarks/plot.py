"""`python -m benchmarks.plot`: draw benchmarks/results/model.csv as a PNG, with --readme put its figures there.

Nobody types a figure: the table between the two `figures` marks of README.md comes from the committed CSV.
"""

import argparse
import sys
from pathlib import Path

from . import destination, table

NAMES = {
    "hf_eager": "HuggingFace float32",
    "hf_bf16": "HuggingFace bfloat16",
    "ours_float32": "vilt_fast float32",
    "ours_bfloat16": "vilt_fast bfloat16",
    "ours_int8": "vilt_fast int8",
    "compile_float32": "HuggingFace + torch.compile float32",
    "compile_bf16": "HuggingFace + torch.compile bfloat16",
    "openvino_f32": "OpenVINO float32, padded",
    "openvino_bf16": "OpenVINO bfloat16, padded",
    "openvino_unpadded_f32": "OpenVINO float32, one by one on a thread each",
    "openvino_unpadded_bf16": "OpenVINO bfloat16, one by one on a thread each",
    "torchao_int8": "torchao int8 + torch.compile",
    "onnxruntime_int8": "ONNX Runtime int8, padded",
}
MARKS = ("<!-- figures -->", "<!-- /figures -->")
SHADES = {"float32": "#7fb3c8", "bfloat16": "#1f6f8b", "int8": "#0b3948"}
GREYS = {"float32": "0.78", "bfloat16": "0.62", "int8": "0.5"}


def draw(rows, path):
    """One panel a case, one bar a provider: the ratio of medians, its spread from p20 to p80, the floor as a tick."""
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(row["case"] for row in rows))
    height = max(sum(row["case"] == case for row in rows) for case in cases)
    label = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
    whisker = {"elinewidth": 1, "ecolor": "0.3"}
    size = max(4.8 * len(cases) + 1.5, 9), 0.44 * height + 1.6
    figure = Figure(figsize=size, facecolor="white", layout="constrained")
    axes = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    for axis, case in zip(axes, cases, strict=True):
        chosen = [row for row in rows if row["case"] == case][::-1]
        base = next(float(row["p50_ms"]) for row in chosen if row["provider"] == "hf_eager")
        for i, row in enumerate(chosen):
            ratio = base / float(row["p50_ms"])
            colours = SHADES if row["provider"].startswith("ours") else GREYS
            low, high = base / float(row["p80_ms"]), base / float(row["p20_ms"])
            spread = [[max(ratio - low, 0)], [max(high - ratio, 0)]]
            axis.barh(i, ratio, height=0.66, color=colours[row["dtype"]], xerr=spread, error_kw=whisker)
            said = f"  {ratio:.2f}x, {float(row['p50_ms']):.0f} ms"
            axis.text(max(ratio, high), i, said, va="center", fontsize=9, bbox=label)
            if row["floor_ms"] and float(row["floor_ms"]):
                axis.plot([base / float(row["floor_ms"])] * 2, [i - 0.33, i + 0.33], color="#c0392b", linewidth=1.5)
        axis.set_yticks(range(len(chosen)), [NAMES.get(row["provider"], row["provider"]) for row in chosen])
        axis.set_title(chosen[0]["shape"], fontsize=10.5, loc="left")
        axis.set_xlim(0, axis.get_xlim()[1] * 1.22)
        axis.axvline(1, color="0.4", linewidth=0.8, linestyle=":")
        axis.tick_params(length=0)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    last = rows[-1]
    figure.supxlabel(
        "speed-up over HuggingFace eager float32 (ratio of interleaved medians; red: floor at the measured peak)\n"
        f"{last['device']}; {last['versions']}; commit {last['commit'] or 'none'}, {last['date']}",
        fontsize=8.5,
        color="0.35",
    )
    figure.savefig(path, dpi=120)


def markdown(rows):
    """The README's table: a line a provider, a column a case, `speed-up (median ms)`, and the largest pooled error."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    shapes = [next(row["shape"] for row in rows if row["case"] == case) for case in cases]
    lines = ["| | " + " | ".join(f"{c}: {s}" for c, s in zip(cases, shapes, strict=True)) + " | error |"]
    lines.append("|---|" + "---:|" * (len(cases) + 1))
    for provider in dict.fromkeys(row["provider"] for row in rows):
        mine = {row["case"]: row for row in rows if row["provider"] == provider}
        cells = [
            f"{float(mine[c]['ratio']):.2f} ({float(mine[c]['p50_ms']):.0f} ms)" if c in mine else "-" for c in cases
        ]
        error = max(float(row["error"]) for row in mine.values())
        lines.append(f"| {NAMES.get(provider, provider)} | " + " | ".join(cells) + f" | {error:.1e} |")
    last = rows[-1]
    where = f"{last['device']}; {last['versions']}; commit {last['commit'] or 'none'}; {last['date']}"
    said = f"Speed-up over HuggingFace eager float32 (median of {last['repeats']}). {where}."
    return "\n".join([*lines, "", said, *_memory(rows, cases[-1])])


def _memory(rows, case):
    """A paragraph on what a forward of `case` allocates, if that was measured."""
    measured = [row for row in rows if row["case"] == case and row["forward_mib"]]
    told = [f"{NAMES.get(row['provider'], row['provider'])} {float(row['forward_mib']):.0f}" for row in measured]
    start = f"Memory that the first forwards of {case} take beside the model, quantised copies included, in MiB"
    return ["", f"{start}: {', '.join(told)}."] if told else []


def put(text, figures):
    """`text` with whatever stands between its two figures marks replaced. ValueError if the marks are missing, or if
    the table there has lines or columns that `figures` has not."""
    for mark in MARKS:
        if text.count(mark) != 1:
            raise ValueError(f"expected exactly one {mark} in the README")
    before, rest = text.split(MARKS[0])
    old, after = rest.split(MARKS[1])
    gone = [name for name in _names(old) if name not in _names(figures)]
    if gone:
        raise ValueError(
            f"the table in the README has {', '.join(gone)}, which these figures have not. Measure all of it; to drop "
            "them on purpose, empty the space between the marks first."
        )
    return f"{before}{MARKS[0]}\n{figures}\n{MARKS[1]}{after}"


def _names(figures):
    """The names of the columns and lines of a Markdown table: its cases and providers."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in figures.splitlines() if line.startswith("|")]
    columns = [cell.split(":")[0] for cell in lines[0][1:]] if lines else []
    return columns + [line[0] for line in lines[2:]]


def main(argv=None):
    """Draw one CSV; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("csv", nargs="?", type=Path, default=destination.RESULTS / "model.csv")
    parser.add_argument("--out", type=Path, help="PNG to write (default: beside the CSV)")
    parser.add_argument("--readme", type=Path, help="also put the table between the figures marks of this file")
    arguments = parser.parse_args(argv)
    if not arguments.csv.is_file():
        parser.error(f"there is no {arguments.csv}; run: python -m benchmarks.run model")
    out = arguments.out or arguments.csv.with_suffix(".png")
    rows = table.read(arguments.csv)
    if not rows or rows[0]["subject"] != "model":
        parser.error(f"{arguments.csv} has no rows of a model; run: python -m benchmarks.run model")
    if arguments.readme:
        try:
            text = put(arguments.readme.read_text(encoding="utf-8"), markdown(rows))
        except ValueError as error:
            parser.error(str(error))
        arguments.readme.write_text(text, encoding="utf-8")
        print(f"Wrote the figures into {arguments.readme}")
    draw(rows, out)
    print(f"Wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

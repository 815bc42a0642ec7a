"""Plots of a GPU campaign, drawn from its CSVs alone."""

import importlib.util
from functools import partial

from .. import table
from .tables import OURS

TITLES = {
    "kernels": "Ops beside what a user would call instead",
    "models": "A forward, batch 1 to 256, mixed sizes",
    "models_compiled": "The same after torch.compile",
    "models_winners": "The same with the variants that won",
    "models_launches": "The same, launched otherwise",
    "training": "A training step",
    "alignment": "Optimal transport between words and patches",
    "retrieval": "Every text against every image",
}


def plots(context):
    """A PNG beside every CSV that is there, an item each."""
    if not importlib.util.find_spec("matplotlib"):
        context.note("matplotlib is not on this machine")
        return
    for subject, title in TITLES.items():
        rows = table.read(context.out / f"{subject}.csv")
        if rows:
            path = context.out / f"{subject}.png"
            context.item(subject, partial(draw, rows, path, title), 3.0, 30.0)


def draw(rows, path, title):
    """One panel a case: median times on a logarithmic axis, their spread from p20 to p80, the floor in red."""
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(row["case"] for row in rows))
    columns = min(len(cases), 3)
    lines = -(-len(cases) // columns)
    most = max(sum(row["case"] == case for row in rows) for case in cases)
    wide, high = 6.4 * columns, (0.3 * most + 0.9) * lines + 1.3  # inches; a layout engine would take a minute
    figure = Figure(figsize=(wide, high), facecolor="white")
    figure.subplots_adjust(2.3 / wide, 0.8 / high, 1 - 0.1 / wide, 1 - 0.7 / high, 2.4 / 4.0, 0.6 / (0.3 * most + 0.3))
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, case in zip(axes, cases, strict=False):
        chosen = [row for row in rows if row["case"] == case][::-1]
        for i, row in enumerate(chosen):
            low, middle, high = (float(row[f"p{p}_ms"]) for p in (20, 50, 80))
            ours = row["provider"].startswith(OURS)
            spread = [[max(middle - low, 0)], [max(high - middle, 0)]]
            axis.barh(
                i, middle, height=0.66, color="#1f6f8b" if ours else "0.72", xerr=spread, error_kw={"ecolor": "0.3"}
            )
            floor = float(row["floor_ms"] or 0)
            gap = f", {middle / floor:.1f}x the floor" if floor else ""
            axis.text(middle, i, f"  {middle:.3g} ms, {float(row['ratio']):.2f}x{gap}", va="center", fontsize=7.5)
            if floor:
                axis.plot([floor] * 2, [i - 0.33, i + 0.33], color="#c0392b", linewidth=1.5)
        axis.set_xscale("log")
        axis.minorticks_off()
        left, right = axis.get_xlim()
        axis.set_xlim(right=left * (right / left) ** 1.9)  # the other half is for what is written beside the bars
        names = [f"{row['provider']} ({row['dtype']})" for row in chosen]
        axis.set_yticks(range(len(chosen)), names, fontsize=7.5)
        axis.set_title(f"{case}: {chosen[0]['shape']}", fontsize=8.5, loc="left")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    for axis in axes[len(cases) :]:
        axis.set_visible(False)
    last = rows[-1]
    figure.suptitle(title, fontsize=11, y=1 - 0.2 / high)
    figure.supxlabel(
        "milliseconds, median; red: the floor at the ceilings measured in the same run\n"
        f"{last['device']}; {last['versions']}; commit {last['commit'] or 'none'}, {last['date']}",
        fontsize=8,
    )
    figure.savefig(path, dpi=110)

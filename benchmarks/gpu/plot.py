"""Plots of a GPU campaign, drawn from its CSVs alone."""

import importlib.util

from .. import destination
from .timing import OURS

TITLES = {
    "kernels": "Ops beside what a user would call instead",
    "models": "A forward, batch 1 to 256, mixed sizes",
    "models_compiled": "The same after torch.compile",
    "training": "A training step",
    "alignment": "Optimal transport between words and patches",
    "retrieval": "Every text against every image",
}


def draw_all(out):
    """A PNG beside every CSV that is there; the paths written. None without matplotlib."""
    if not importlib.util.find_spec("matplotlib"):
        return []
    written = []
    for subject, title in TITLES.items():
        path = out / f"{subject}.csv"
        rows = destination.read(path) if path.is_file() else []
        if rows:
            draw(rows, path.with_suffix(".png"), title)
            written.append(path.with_suffix(".png"))
    return written


def draw(rows, path, title):
    """One panel a case: median times on a logarithmic axis, their spread from p20 to p80, the floor in red."""
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(row["case"] for row in rows))
    columns = min(len(cases), 3)
    lines = -(-len(cases) // columns)
    most = max(sum(row["case"] == case for row in rows) for case in cases)
    figure = Figure(figsize=(5.6 * columns, (0.3 * most + 1.1) * lines + 0.9), facecolor="white", layout="constrained")
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
        axis.set_xlim(right=axis.get_xlim()[1] * 12)
        names = [f"{row['provider']} ({row['dtype']})" for row in chosen]
        axis.set_yticks(range(len(chosen)), names, fontsize=7.5)
        axis.set_title(f"{case}: {chosen[0]['shape']}", fontsize=8.5, loc="left")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    for axis in axes[len(cases) :]:
        axis.set_visible(False)
    last = rows[-1]
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(
        "milliseconds, median; red: the floor at the ceilings measured in the same run\n"
        f"{last['device']}; {last['versions']}; commit {last['commit'] or 'none'}, {last['date']}",
        fontsize=8,
    )
    figure.savefig(path, dpi=110)

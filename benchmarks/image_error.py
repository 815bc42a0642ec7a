"""`python -m benchmarks.image_error`: what `decode="fast"` changes, to a CSV and a histogram beside it.

Of each photograph, a JPEG of quality 90 in memory: the difference of its pixels (which lie in -1 to 1) to the exact
ones, and of the pooled output of ViLT-B/32 with random weights in float64 (relative). `drawn` ones are
`samples.photograph` at the sizes of cameras, resized to 384; real ones ship with scikit-image and are small, so they
are resized to 128, which is as many times smaller.
"""

import argparse
import io
import sys
from datetime import date

import numpy as np
import torch
from PIL import Image

from vilt_fast import ImageProcessor
from vilt_fast.commands import checkpoint as checkpoints
from vilt_fast.commands import report, samples

from . import destination, measure

FIELDS = (
    "photograph", "pixels", "result", "mean", "p99", "max", "pooled_error", "device", "versions", "commit", "date",
)  # fmt: skip
KEYS = ("photograph", "pixels")
DRAWN = ((3000, 4000), (4032, 3024), (2448, 3264), (4000, 6000), (1080, 1920), (1200, 1600))  #: (height, width)
REAL = ("astronaut", "coffee", "chelsea", "rocket", "hubble_deep_field", "stereo_motorcycle")
STEPS = 16  #: of 2 / 255, one byte, to either side of the histogram


def photographs(drawn=DRAWN, real=REAL):
    """(name, uint8 RGB [height, width, 3], shorter side to resize to) of each."""
    for seed, (height, width) in enumerate(drawn):
        yield f"drawn {seed}", samples.photograph(seed, height, width), 384
    if real:
        from skimage import data

        for name in real:
            image = getattr(data, name)()
            yield name, image[0] if isinstance(image, tuple) else image, 128


def differences(model, chosen, step=lambda what: None):
    """(rows without the machine's columns, `{name: differences of pixels}`); `model` is a ViltModel in float64."""
    rows, found = [], {}
    for name, picture, shorter in chosen:
        step(name)
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=90)
        exact, fast = (
            ImageProcessor(size={"shortest_edge": shorter}, decode=decode)(file.getvalue(), return_tensors="pt")
            for decode in ("exact", "fast")
        )
        away = (fast["pixel_values"] - exact["pixel_values"]).numpy().ravel()
        ids = torch.arange(100, 112)[None] % model.config.vocab_size
        with torch.inference_mode():
            truth, pooled = (
                model(ids, pixel_values=one["pixel_values"].double(), pixel_mask=one["pixel_mask"]).pooler_output
                for one in (exact, fast)
            )
        found[name] = away
        rows.append(
            {
                "photograph": name,
                "pixels": "x".join(map(str, picture.shape[:2])),
                "result": "x".join(map(str, exact["pixel_values"].shape[2:])),
                "mean": float(np.abs(away).mean()),
                "p99": float(np.quantile(np.abs(away), 0.99)),
                "max": float(np.abs(away).max()),
                "pooled_error": report.relative_error(pooled, truth),
            }
        )
    return rows, found


def draw(found, path):
    """How many of the pixels differ by how much, one line a photograph."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), facecolor="white", layout="constrained")
    axis = figure.subplots()
    steps = np.arange(-STEPS, STEPS + 1)
    for name, away in found.items():
        shares = [max(float((np.rint(away * 127.5) == step).mean()), 1e-7) for step in steps]
        axis.plot(steps, shares, color="#1f6f8b" if name.startswith("drawn") else "0.6", linewidth=1.2)
    axis.set_yscale("log")
    axis.set_xlabel('difference of a pixel by decode="fast", in steps of a byte (2 / 255)')
    axis.set_ylabel("share of the pixels")
    axis.set_title("Drawn photographs at 384 (blue), real ones at 128 (grey)", fontsize=11, loc="left")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"Wrote {path}")


def main(argv=None):
    """Measure all photographs; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.image_error", description=__doc__.split("\n")[0])
    destination.add(parser, "image-error")
    arguments = parser.parse_args(argv)
    out = destination.chosen(parser, arguments, "image-error")
    model = report.trunk(checkpoints.random_vqa()).double()
    with report.progress() as bar:
        task = bar.add_task("", total=len(DRAWN) + len(REAL))
        rows, found = differences(model, photographs(), lambda what: bar.update(task, description=what, advance=1))
    common = {
        "device": measure.device(),
        "versions": measure.versions(),
        "commit": measure.commit(),
        "date": date.today().isoformat(),
    }
    for row in rows:
        print(*(f"{value:.2g}" if isinstance(value, float) else value for value in row.values()), sep="  ")
    status = destination.put(out, [{**row, **common} for row in rows], FIELDS, KEYS)
    draw(found, out.with_suffix(".png"))
    return status


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.roofline`: what ViLT's ops and a forward cost at best, from FLOPs, bytes and data sheets alone.

Nothing here is measured. An op is no faster than its FLOPs at the peak of the unit that computes them, nor than its
bytes at the bandwidth of the memory; the larger of the two is its floor and says which side bounds it. A forward that
runs these ops one after the other takes at least the sum of their floors (`forward, op by op`; `bound`: the side of the
ops that take most of it); one that kept all activations on the chip would still need its FLOPs and its weights
(`forward, fused`). Launches, caches and what a chip really sustains are left out: every real
time lies above.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from . import counts
from .table import write

RESULTS = Path(__file__).resolve().parent / "results"
BATCHES = (1, 8, 64)
FIELDS = (
    "device", "batch", "shape", "op", "calls", "flops", "bytes", "flops_per_byte", "arithmetic_us", "memory_us",
    "floor_us", "forward_us", "bound",
)  # fmt: skip


class Device(NamedTuple):
    """Peaks: FLOP/s by dtype, dense; bytes a second."""

    peaks: dict
    bandwidth: float


#: NVIDIA A100 datasheet (A100 80GB SXM: 312 and 19.5 TFLOP/s, 2,039 GB/s); NVIDIA H100 datasheet (SXM: 1,979 TFLOP/s
#: bfloat16 with sparsity, half of it dense, 67 float32, 3.35 TB/s); NVIDIA H200 datasheet (SXM: the same, 4.8 TB/s).
#: float32 is that of the CUDA cores.
DEVICES = {
    "A100": Device({"bfloat16": 312e12, "float32": 19.5e12}, 2.039e12),
    "H100": Device({"bfloat16": 989.5e12, "float32": 67e12}, 3.35e12),
    "H200": Device({"bfloat16": 989.5e12, "float32": 67e12}, 4.8e12),
}


def seconds(work, device):
    """(by its arithmetic, by its memory traffic)."""
    products, scalar = work.products / device.peaks["bfloat16"], work.scalar / device.peaks["float32"]
    return max(products, scalar), work.bytes / device.bandwidth


def rows(batches=BATCHES, devices=DEVICES):
    """One row a device, batch and op, in bfloat16, and the two floors of a forward."""
    found = []
    for name, device in devices.items():
        for size in batches:
            case = counts.batch(size)
            mine = [_row(name, device, case, op, *calls_and_work) for op, calls_and_work in counts.ops(case).items()]
            found += [*mine, _sum(mine), _row(name, device, case, "forward, fused", 1, counts.forward(case))]
    return found


def _sum(ops):
    """The row of a forward that runs these ops one after the other."""
    totals = {
        key: sum(row["calls"] * row[key] for row in ops) for key in ("flops", "bytes", "arithmetic_us", "memory_us")
    }
    floor = sum(row["forward_us"] for row in ops)
    bound = {side: sum(row["forward_us"] for row in ops if row["bound"] == side) for side in ("arithmetic", "memory")}
    totals |= {"op": "forward, op by op", "calls": 1, "flops_per_byte": totals["flops"] / totals["bytes"]}
    return ops[0] | totals | {"floor_us": floor, "forward_us": floor, "bound": max(bound, key=bound.get)}


def _row(name, device, case, op, calls, work):
    arithmetic, memory = seconds(work, device)
    floor = max(arithmetic, memory)
    return {
        "device": name,
        "batch": case.batch,
        "shape": case.shape,
        "op": op,
        "calls": calls,
        "flops": work.flops,
        "bytes": work.bytes,
        "flops_per_byte": work.flops / work.bytes,
        "arithmetic_us": arithmetic * 1e6,
        "memory_us": memory * 1e6,
        "floor_us": floor * 1e6,
        "forward_us": calls * floor * 1e6,
        "bound": "arithmetic" if arithmetic > memory else "memory",
    }


def table(found):
    """Header and string rows: an op a line, microseconds a forward on each device, (a) or (m) for what bounds it."""
    devices = list(dict.fromkeys(row["device"] for row in found))
    lines = []
    for batch, op in dict.fromkeys((row["batch"], row["op"]) for row in found):
        mine = {row["device"]: row for row in found if (row["batch"], row["op"]) == (batch, op)}
        first = mine[devices[0]]
        cells = [f"{mine[d]['forward_us'] or mine[d]['floor_us']:.4g} ({mine[d]['bound'][0]})" for d in devices]
        flops, moved = f"{first['flops'] / 1e9:.3g}", f"{first['bytes'] / 1e6:.3g}"
        lines.append((str(batch), op, str(first["calls"] or "-"), flops, moved, *cells))
    return ("batch", "op", "calls", "GFLOP", "MB", *(f"{d}, us" for d in devices)), lines


def draw(found, path):
    """A roof a device, every op a mark at its FLOPs a byte, lines from batch to batch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(DEVICES), 4.6), facecolor="white", layout="constrained")
    axes = figure.subplots(1, len(DEVICES), sharey=True, squeeze=False)[0]
    for axis, (name, device) in zip(axes, DEVICES.items(), strict=True):
        span = (1.0, 4000.0)
        corner = device.peaks["bfloat16"] / device.bandwidth
        roof = [span[0] * device.bandwidth / 1e12, *[device.peaks["bfloat16"] / 1e12] * 2]
        axis.loglog([span[0], corner, span[1]], roof, color="0.25", linewidth=1.5)
        axis.axhline(device.peaks["float32"] / 1e12, color="0.6", linewidth=1, linestyle="--")
        mine = [row for row in found if row["device"] == name and not row["op"].startswith("forward")]
        for i, op in enumerate(dict.fromkeys(row["op"] for row in mine)):
            chosen = [row for row in mine if row["op"] == op]
            x = [row["flops_per_byte"] for row in chosen]
            y = [row["flops"] / row["floor_us"] / 1e6 for row in chosen]
            axis.plot(x, y, marker="osD^v<>ph*Xd"[i % 12], markersize=5, linewidth=0.8, color=f"C{i % 10}", label=op)
        axis.set_title(f"{name}: {device.peaks['bfloat16'] / 1e12:.0f} TFLOP/s, {device.bandwidth / 1e12:.2f} TB/s")
        axis.set_xlabel("FLOPs a byte")
        axis.set_xlim(*span)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_ylabel("TFLOP/s at best")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7.5, frameon=False, loc="outside right center")
    title = "Batch 1, 8 and 64 in bfloat16, from data sheets (dashed: float32 outside the tensor cores); not measured"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def main(argv=None):
    """Print, write and draw; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.split("\n")[0])
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--out", type=Path, default=RESULTS / "roofline.csv", help="CSV to write, a PNG beside it")
    arguments = parser.parse_args(argv)
    if min(arguments.batches) < 1:
        parser.error("--batches must be at least 1")
    from rich.console import Console

    from vilt_fast.commands import report

    found = rows(arguments.batches)
    write(arguments.out, found, FIELDS)
    draw(found, arguments.out.with_suffix(".png"))
    title = "Floors of a bfloat16 forward in microseconds (calls included); a: arithmetic, m: memory bound"
    Console(width=None if sys.stdout.isatty() else 120).print(report.rich_table(title, *table(found)))
    print(f"Wrote {arguments.out} and {arguments.out.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

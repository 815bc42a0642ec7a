"""`python -m benchmarks.compiled.cuda_report [--check]`: what nvcc makes of csrc/cuda for GPUs that are not here.

Registers, stack frame, spills and static shared memory of each kernel on sm_80, sm_90a and sm_100a, as ptxas tells
them, to benchmarks/results/cuda-resources.csv. `--check` fails where a kernel has a stack frame or spills.
"""

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
ARCHES = ("80", "90a", "100a")
FIELDS = (
    "op", "kernel", "arch", "registers", "stack_bytes", "spill_bytes", "static_shared_bytes", "nvcc",
)  # fmt: skip

_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def compiler():
    """Path of nvcc, or None: on PATH, under CUDA_HOME, where the toolkit is usually installed."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(f"{home}/bin" for home in homes if home))


def every_source():
    """The .cu file of each op that csrc/cuda/ops.def lists."""
    folder = ROOT / "csrc" / "cuda"
    return [
        folder / f"{op}.cu" for op in re.findall(r"^VF_OP\((\w+)\)", (folder / "ops.def").read_text(), re.MULTILINE)
    ]


def rows(arches=ARCHES, sources=None):
    """A row for each kernel of each source (of every op) and architecture. RuntimeError without nvcc."""
    nvcc = compiler()
    if nvcc is None:
        raise RuntimeError("nvcc is missing: install the CUDA toolkit (13.0 knows all three architectures).")
    version = re.search(r"release ([\d.]+)", subprocess.check_output([nvcc, "--version"], text=True))[1]
    found = []
    for source in sources or every_source():
        for arch in arches:
            with tempfile.TemporaryDirectory() as folder:
                target = [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin", "-o", f"{folder}/out.cubin"]
                command = [nvcc, "-std=c++17", "-O3", "-Xptxas", "-v", *target, str(source)]
                report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
            for entry in _ENTRY.finditer(report):
                shared = re.search(r"(\d+) bytes smem", entry["rest"])
                found.append(
                    {
                        "op": source.stem,
                        "kernel": _readable(entry["name"]),
                        "arch": f"sm_{arch}",
                        "registers": int(entry["registers"]),
                        "stack_bytes": int(entry["stack"]),
                        "spill_bytes": int(entry["stores"]) + int(entry["loads"]),
                        "static_shared_bytes": int(shared[1]) if shared else 0,
                        "nvcc": version,
                    }
                )
    return found


def _readable(name):
    """`ipot_kernel<8>` of a mangled name, where c++filt is at hand."""
    if shutil.which("c++filt"):
        whole = subprocess.check_output(["c++filt", name], text=True).strip()
        short = re.search(r"(\w+(<[^(]*>)?)\(vf::", whole)
        if short:
            return re.sub(r"\(int\)", "", short[1])
    return name


def main(argv=None):
    """Compile, write, print; the exit status is 1 under --check if a kernel spills."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compiled.cuda_report", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="exit 1 if a kernel has a stack frame or spills")
    parser.add_argument("--out", type=Path, default=RESULTS / "cuda-resources.csv")
    arguments = parser.parse_args(argv)
    found = rows()
    with open(arguments.out, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, FIELDS)
        table.writeheader()
        table.writerows(found)
    for row in found:
        print("{op:<20} {kernel:<55} {arch:<8} {registers:>4} registers, {stack_bytes} stack".format(**row))
    bad = [row for row in found if row["stack_bytes"] or row["spill_bytes"]]
    print(f"{len(found)} kernels, {len(bad)} with a stack frame or spills; wrote {arguments.out}")
    return int(arguments.check and bool(bad))


if __name__ == "__main__":
    sys.exit(main())

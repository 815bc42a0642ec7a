"""`python -m benchmarks.compiled.aot_report [--check]`: every shipped Triton configuration, compiled for absent GPUs.

Each case of each `aot_cases()` in kernels/ is compiled for its architectures and gives one row of
benchmarks/results/aot-triton-<version>.csv: registers, stack frame, shared memory against the limit of the chip,
matrix instructions, size of the binary. `--check` fails where a kernel

    does not compile | spills registers to memory | needs more shared or tensor memory than a block can have |
    multiplies matrices without matrix instructions

Spills of a case that says `home=False` (sequences longer than any of ViLT's) are a remark, not a failure.

What has been compiled once is remembered in the user's cache folder (VILT_FAST_AOT_CACHE moves it), under a hash of the
kernel's source, its arguments, the options, Triton's version and the code that reads the results.
"""

import argparse
import csv
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from vilt_fast.kernels import _aot

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SHARED = {target.name: target.shared for target in _aot.TARGETS}
TENSOR_MEMORY = 512  # columns of tensor memory of a multiprocessor, sm_100
FIELDS = (
    "op", "kernel", "case", "arch", "registers", "stack_bytes", "spill_instructions", "shared_bytes", "shared_limit",
    "tensor_cores", "tensor_core_kind", "tensor_memory", "num_warps", "num_stages", "binary_bytes", "seconds",
    "problem", "remark",
)  # fmt: skip


def shipped(ops=None):
    """Import names of the kernel modules (those called `ops`) that say what they ship."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "kernels").glob("*.py"))}
    names = [name for name, text in texts.items() if "\ndef aot_cases(" in text]
    unknown = set(ops or ()) - set(names)
    if unknown:
        raise ValueError(f"no kernel module {', '.join(sorted(unknown))} with aot_cases; there are {', '.join(names)}")
    return [f"vilt_fast.kernels.{name}" for name in names if not ops or name in ops]


def default_cache():
    """$VILT_FAST_AOT_CACHE, or a folder in the user's cache."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("VILT_FAST_AOT_CACHE") or base / "vilt_fast" / "aot")


class Worker:
    """A process that compiles (benchmarks.compiled.aot_compile); one that died is replaced at the next request."""

    def __init__(self, cache, paths=()):
        self.environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        before = [self.environment["PYTHONPATH"]] if self.environment.get("PYTHONPATH") else []
        self.environment |= {
            "PYTHONPATH": os.pathsep.join([str(ROOT), *map(str, paths), *before]),
            "VILT_FAST_AOT_CACHE": str(cache),
            "TRITON_ALWAYS_COMPILE": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.process = self.log = None

    def ask(self, request):
        """The answer to one request. RuntimeError, with the last words of the process, if it dies over it."""
        if self.process is None:
            self.log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115  closed with the worker
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.compiled.aot_compile"],
                cwd=ROOT, env=self.environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
            )  # fmt: skip
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        if line:
            return json.loads(line)
        self.log.seek(0)
        last = self.log.read().strip().splitlines()[-1:] or [""]
        status = self.process.wait()
        self.close()
        raise RuntimeError(f"the compiler's process ended with status {status}: {last[0]}"[:300])

    def close(self):
        """End the process, if there is one."""
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()
            self.process.stdout.close()
            self.log.close()
            self.process = None


def rows(modules, arches=tuple(SHARED), *, jobs=None, one_each=False, cache=None, paths=(), step=None):
    """(Triton's version, the rows of the report in the order of the modules).

    Args:
        modules: import names of modules with `aot_cases()`.
        arches: "sm_80", ..., "gfx942".
        jobs: processes (default: one a core).
        one_each: only the first case of every kernel.
        cache: folder of what has been compiled before; made if missing.
        paths: folders to import from, besides the repository.
        step: called as `step(done, total)`.
    """
    cache = Path(cache or default_cache())
    cache.mkdir(parents=True, exist_ok=True)
    jobs = jobs or os.cpu_count() or 1
    workers = [Worker(cache, paths) for _ in range(jobs)]
    try:
        todo, version, found = [], "", {}
        for module in modules:
            answer = workers[0].ask({"list": module})
            version, seen = answer["triton"], set()
            for i, case in enumerate(answer["cases"]):
                for arch in case["arches"]:
                    if arch in arches and not (one_each and (case["kernel"], arch) in seen):
                        seen.add((case["kernel"], arch))
                        todo.append((module, i, arch, case))
        free = queue.SimpleQueue()
        for worker in workers:
            free.put(worker)
        mine = threading.local()

        def compiled(module, i, arch, case):
            if not hasattr(mine, "worker"):
                mine.worker = free.get()
            try:
                return mine.worker.ask({"compile": [module, i, arch]})
            except RuntimeError as error:
                what = {"op": module.rpartition(".")[2], "kernel": case["kernel"], "case": case["case"], "arch": arch}
                return what | {"error": str(error)}

        with ThreadPoolExecutor(jobs) as pool:
            futures = {pool.submit(compiled, *job): place for place, job in enumerate(todo)}
            for done, future in enumerate(as_completed(futures), 1):
                found[futures[future]] = judged(future.result())
                if step:
                    step(done, len(todo))
    finally:
        for worker in workers:
            worker.close()
    return version, [found[place] for place in range(len(todo))]


def judged(row):
    """The row with the limit of its architecture, what is wrong with it and what deserves a remark ("" if nothing)."""
    limit, problems, remark = SHARED[row["arch"]], [], ""
    if "error" in row:
        problems = [f"does not compile: {row['error']}"]
    else:
        if row["stack_bytes"] and row["home"]:
            problems.append(f"spills {row['stack_bytes']} bytes a thread")
        elif row["stack_bytes"]:
            remark = f"spills {row['stack_bytes']} bytes a thread, beyond the sizes of ViLT"
        if row["shared_bytes"] > limit:
            problems.append(f"needs {row['shared_bytes']} bytes of shared memory, the limit is {limit}")
        if row["tensor_memory"] > TENSOR_MEMORY:
            problems.append(f"needs {row['tensor_memory']} columns of tensor memory, the limit is {TENSOR_MEMORY}")
        if row["matmul"] and not row["tensor_cores"]:
            problems.append("multiplies matrices without matrix instructions")
    row = row | {"shared_limit": limit, "problem": "; ".join(problems), "remark": remark}
    return {field: row.get(field) for field in FIELDS}


def write(path, found):
    """Write rows as a CSV with the columns of `FIELDS`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, FIELDS)
        table.writeheader()
        table.writerows(found)


def summary(found):
    """Header and string rows: one line an op and architecture, the worst of its cases in each column."""
    header = ("op", "arch", "cases", "registers", "stack", "shared / limit", "matrix instructions", "problems")
    lines = []
    for op, arch in dict.fromkeys((row["op"], row["arch"]) for row in found):
        mine = [row for row in found if (row["op"], row["arch"]) == (op, arch)]
        known = [row for row in mine if row["registers"] is not None] or [dict.fromkeys(FIELDS, 0)]
        kinds = sorted({kind for row in known for kind in (row["tensor_core_kind"] or "").split("+") if kind})
        most = {name: max(row[name] for row in known) for name in ("registers", "stack_bytes", "shared_bytes")}
        lines.append(
            (
                op,
                arch,
                str(len(mine)),
                str(most["registers"]),
                str(most["stack_bytes"]),
                f"{most['shared_bytes'] / SHARED[arch]:.0%}",
                ", ".join(kinds) or "-",
                str(sum(bool(row["problem"]) for row in mine)),
            )
        )
    return header, lines


def main(argv=None):
    """Compile, write, show; returns the exit status."""
    arguments = _arguments(argv)
    from vilt_fast.commands import report

    with report.progress() as bar:
        task = bar.add_task("compiling", total=None)
        version, found = rows(
            arguments.modules,
            arguments.arches,
            jobs=arguments.jobs,
            one_each=arguments.one_each,
            cache=arguments.cache,
            step=lambda done, total: bar.update(task, completed=done, total=total),
        )
    show(version, found)
    whole = not (arguments.ops or arguments.one_each or set(SHARED) - set(arguments.arches))
    out = arguments.out or (RESULTS / f"aot-triton-{version}.csv" if whole else None)
    if out:
        write(out, found)
        print(f"Wrote {out}")
    for row in found:
        if said := "; ".join(filter(None, (row["problem"], row["remark"]))):
            print(f"{row['arch']} {row['case']} ({row['kernel']}): {said}", file=sys.stderr)
    return 1 if arguments.check and (not found or any(row["problem"] for row in found)) else 0


def show(version, found):
    """Print the summary."""
    from rich.console import Console

    from vilt_fast.commands import report

    title = f"Triton {version}: {len(found)} configurations, {sum(bool(row['problem']) for row in found)} with problems"
    Console(width=None if sys.stdout.isatty() else 120).print(report.rich_table(title, *summary(found)))


def _arguments(argv):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compiled.aot_report", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a row has a problem")
    parser.add_argument("--arches", nargs="+", default=list(SHARED), choices=list(SHARED))
    parser.add_argument("--ops", nargs="+", help="kernel modules, e.g. attention (default: all in kernels/)")
    parser.add_argument("--one-each", action="store_true", help="only the first case of every kernel")
    parser.add_argument("--jobs", type=int, help="processes (default: one a core)")
    parser.add_argument("--cache", type=Path, help=f"folder of earlier results (default: {default_cache()})")
    parser.add_argument(
        "--out", type=Path, help="CSV to write (default: results/aot-triton-<version>.csv if everything was compiled)"
    )
    arguments = parser.parse_args(argv)
    if arguments.jobs is not None and arguments.jobs < 1:
        parser.error("--jobs must be at least 1")
    try:
        arguments.modules = shipped(arguments.ops)
    except ValueError as error:
        parser.error(str(error))
    return arguments


if __name__ == "__main__":
    sys.exit(main())

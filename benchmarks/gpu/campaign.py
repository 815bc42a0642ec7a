"""`python -m benchmarks.gpu.campaign --out DIR`: everything that only a GPU can tell, in one command of nine minutes.

Parts run in the order of their worth, in a process of their own: one that raises, hangs or takes the CUDA context down
is recorded and the next part gets a new process. Rows are written as they come, campaign.json after each part, so a
cut loses little. A part that would not fit into the time left is skipped, and said to be. The native library with the
CUDA kernels, if nvcc is there, is built beside the first parts and taken in before the part that times it.

`--dry-run` runs all of it on CPU tensors, with tiny sizes and in Triton's interpreter.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RESERVE = 8.0  # seconds kept for the plots
GRACE = 10.0  # seconds a part may take to notice that its time is over, before its process is ended


class Part(NamedTuple):
    """`function`: "module:function", called with a `worker.Context`. Seconds: worth starting with, at most."""

    function: str
    least: float
    most: float


PARTS = {
    "environment": Part("benchmarks.gpu.checks:environment", 5, 40),
    "correctness": Part("benchmarks.gpu.checks:correctness", 20, 160),
    "ceilings": Part("benchmarks.gpu.timing:ceilings", 5, 20),
    "kernels": Part("benchmarks.gpu.kernels:kernels", 10, 100),
    "models": Part("benchmarks.gpu.models:models", 15, 110),
    "training": Part("benchmarks.gpu.models:training", 15, 45),
    "alignment": Part("benchmarks.gpu.transport:alignment", 10, 40),
    "retrieval": Part("benchmarks.gpu.serving:retrieval", 10, 30),
    "energy": Part("benchmarks.gpu.serving:energy", 10, 25),
    "profile": Part("benchmarks.gpu.serving:profile", 5, 20),
}
NATIVE = "native"  # the build, beside the others; taken in before:
NEEDS_NATIVE = "alignment"


class Worker:
    """The process in which parts run (benchmarks.gpu.worker); what it prints goes to log.txt."""

    def __init__(self, out, dry):
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
        if dry:
            environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        else:
            environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, "-m", "benchmarks.gpu.worker", "--out", str(out), *["--dry-run"] * dry]
        with open(out / "log.txt", "a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def run(self, function, seconds, patience):
        """What the part says about itself, or what became of it if nothing came within `patience` seconds."""
        try:
            self.process.stdin.write((json.dumps({"function": function, "seconds": seconds}) + "\n").encode())
            self.process.stdin.flush()
        except OSError:
            return {"status": "failed", "notes": ["the process was not there any more"]}
        answer, end = b"", time.monotonic() + patience
        while not answer.endswith(b"\n"):
            if not select.select([self.process.stdout], [], [], max(end - time.monotonic(), 0))[0]:
                self.kill()
                return {"status": "cut", "notes": [f"ended after {patience:.0f} s without an answer"]}
            piece = os.read(self.process.stdout.fileno(), 1 << 16)
            if not piece:
                self.kill()
                return {"status": "failed", "notes": [f"the process ended with status {self.process.returncode}"]}
            answer += piece
        return json.loads(answer)

    def kill(self):
        """End the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Build:
    """The native library, built in a folder of its own and moved into the package when it is done."""

    def __init__(self, out, dry):
        self.start, self.out = time.monotonic(), out / "build"
        arguments = ["build_ext", "--build-lib", str(self.out / "lib"), "--build-temp", str(self.out / "tmp")]
        command = [sys.executable, "setup.py", *(["--version"] if dry else arguments)]
        environment = os.environ | {"VILT_FAST_CUDA": "0" if dry else "1", "VILT_FAST_CUDA_ARCHS": _capability()}
        with open(out / "build.txt", "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def finish(self, seconds):
        """Wait at most so long, move the library in; what to record."""
        try:
            status = self.process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            return {"status": "cut", "seconds": time.monotonic() - self.start, "notes": ["took too long; build.txt"]}
        built = [path for path in self.out.glob("lib/vilt_fast/_C*") if not status]
        for path in built:
            os.replace(shutil.copy(path, ROOT / "vilt_fast" / f".{path.name}"), ROOT / "vilt_fast" / path.name)
        notes = [path.name for path in built] if not status else [f"status {status}; build.txt"]
        shutil.rmtree(self.out, ignore_errors=True)
        return {"status": "failed" if status else "ok", "seconds": time.monotonic() - self.start, "notes": notes}


def _missing_for_build():
    """What the native build wants and this machine has not."""
    modules = [name for name in ("pybind11", "setuptools") if not importlib.util.find_spec(name)]
    tools = [] if shutil.which("nvcc") else ["nvcc"]
    return modules + tools + ([] if shutil.which("cmake") or importlib.util.find_spec("cmake") else ["cmake"])


def _capability():
    """ "90" for the GPU at hand; "" (all) if nobody says."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        return said[0].replace(".", "") if said else ""
    return ""


def campaign(out, names, minutes, dry, parts=None, say=print):
    """Run parts by name; the records of all of them, in order, also in `out`/campaign.json."""
    parts = PARTS if parts is None else parts
    out.mkdir(parents=True, exist_ok=True)
    start, records = time.monotonic(), []
    end = start + 60 * minutes - RESERVE

    def record(name, what):
        records.append({"part": name} | what)
        (out / "campaign.json").write_text(
            json.dumps({"minutes": minutes, "dry_run": dry, "parts": records}, indent=1) + "\n", encoding="utf-8"
        )
        took = f"{what['seconds']:.0f} s" if what.get("seconds") is not None else ""
        say(f"[{time.monotonic() - start:4.0f} s] {name:<12} {what['status']:<10} {took}")
        for note in what.get("notes", []):
            say(f"         {note}")

    worker = None
    build, missing = None, [] if dry else _missing_for_build()
    if NATIVE in names and (missing or end <= start):
        why = f"not on this machine: {', '.join(missing)}" if missing else "no time"
        record(NATIVE, {"status": "skipped", "notes": [why]})
    elif NATIVE in names:
        build = Build(out, dry)
    try:
        for name in (name for name in parts if name in names):
            if build and name == NEEDS_NATIVE:
                record(NATIVE, build.finish(min(60.0, (end - time.monotonic()) / 3)))
                build = None
            part, left = parts[name], end - time.monotonic()
            if left < part.least:
                notes = [f"{max(left, 0):.0f} s are left, it needs {part.least:.0f} s"]
                record(name, {"status": "skipped", "seconds": None, "notes": notes})
                continue
            worker = worker or Worker(out, dry)
            began = time.monotonic()
            seconds = min(part.most, left)
            answer = worker.run(part.function, seconds, min(seconds + GRACE, left))
            if answer["status"] in ("cut", "failed"):  # a broken CUDA context would break all that follows
                worker.kill()
                worker = None
            record(name, {"seconds": round(time.monotonic() - began, 1)} | answer)
        if build:
            record(NATIVE, build.finish(end - time.monotonic()))
            build = None
    finally:
        if build:
            build.finish(0)
        if worker:
            worker.kill()
    return records


def main(argv=None):
    """Run, draw; returns the exit status: 1 if a part failed or was cut."""
    arguments = _arguments(argv)
    records = campaign(arguments.out, arguments.parts, arguments.minutes, arguments.dry_run, say=_say)
    from . import plot

    for path in plot.draw_all(arguments.out):
        _say(f"Wrote {path}")
    _say(f"Records in {arguments.out / 'campaign.json'}")
    return int(any(record["status"] in ("failed", "cut") for record in records))


def _say(text):
    print(text, flush=True)


def _arguments(argv):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.campaign", description=__doc__.split("\n")[0])
    names = [*PARTS, NATIVE]
    parser.add_argument("--out", type=Path, required=True, help="folder for CSVs, plots, logs and campaign.json")
    parser.add_argument("--dry-run", action="store_true", help="CPU tensors, tiny sizes, Triton's interpreter")
    parser.add_argument("--parts", nargs="+", default=names, choices=names, help="default: all")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together (default: 9)")
    arguments = parser.parse_args(argv)
    if not arguments.minutes > 0:
        parser.error("--minutes must be more than 0")
    arguments.out = arguments.out.resolve()
    return arguments


if __name__ == "__main__":
    sys.exit(main())

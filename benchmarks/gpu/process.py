"""What the campaign starts beside itself: processes that run parts, and the build of the native library."""

import contextlib
import importlib.machinery
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

ROOT = Path(__file__).resolve().parents[2]
IN_VAIN = 3  # processes lost one after the other, none of which came to the end of an item
GRACE = 10.0  # seconds a part may take to notice that its time is over, before its process is ended


class Worker:
    """The process in which parts run (benchmarks.gpu.worker); what it prints goes to log.txt. Compiled kernels are kept
    in `cache`. `within`: one of many that another worker has started, and is to take along when it ends."""

    def __init__(self, out, cache, dry, within=False):
        self.within = within
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
        environment |= {
            "TRITON_CACHE_DIR": str(cache / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "TRITON_STORE_BINARY_ONLY": "1",  # a tenth of the bytes
        }
        if within:
            environment |= {"TORCHINDUCTOR_COMPILE_THREADS": "4", "OMP_NUM_THREADS": "1"}
        if dry:
            environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        else:
            environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, "-m", "benchmarks.gpu.worker", "--out", str(out), *["--dry-run"] * dry]
        with open(out / "log.txt", "a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                start_new_session=not within,
            )  # fmt: skip

    def run(self, patience, heard, **request):
        """What the part says of itself at its end, or what became of it; "item": the one that was not finished.

        The process is ended if its answer does not come within `patience` seconds, or an item takes longer than it says
        it may. `heard` gets every line about an item.
        """
        end, limit, most, item = time.monotonic() + patience, float("inf"), 0, None

        def over(status, note):
            self.kill()
            return {"status": status, "notes": [note], "item": item}

        try:
            self.process.stdin.write((json.dumps(request) + "\n").encode())
            self.process.stdin.flush()
        except OSError:
            return over("died", "the process was not there any more")
        said = b""
        while True:
            wait = min(end, limit) - time.monotonic()
            if not select.select([self.process.stdout], [], [], max(wait, 0))[0]:
                return over("cut", f"ended after {patience if limit > end else most:.0f} s")
            piece = os.read(self.process.stdout.fileno(), 1 << 16)
            if not piece:
                return over("died", f"the process ended with status {self.process.wait()}")
            *lines, said = (said + piece).split(b"\n")
            for line in map(json.loads, lines):
                if "begin" in line:
                    item, most = line["begin"], line["seconds"]
                    limit = time.monotonic() + most
                elif "end" in line or "left" in line:
                    item, limit = None, float("inf")
                else:
                    return line | {"item": item}
                heard(line)

    def kill(self):
        """End the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill() if self.within else os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def through(start, worker, function, seconds, heard, *, skip=(), share=None):
    """Run a part to its end, a fresh process going on with the next item where one is lost.

    Args:
        start: makes a Worker. worker: one that is there already, or None.
        heard: gets every line about an item, also {"end": item, "status": "failed" | "cut"} for those that took
            their process with them.

    Returns:
        (the Worker that is left, or None; the part's last answer)
    """
    end, skip, in_vain = time.monotonic() + seconds, set(skip), 0
    while True:
        worker, began, tried, good = worker or start(), time.monotonic(), set(), []

        def listen(line, tried=tried, good=good):
            tried.add(line.get("begin"))
            if line.get("status") in ("ok", "incomplete"):
                good.append(line["end"])
            heard(line)

        left = max(end - began, 0)
        answer = worker.run(left + GRACE, listen, function=function, seconds=left, skip=sorted(skip), share=share)
        if answer["status"] not in ("died", "cut", "broken"):
            return worker, answer
        worker.kill()
        worker = None
        if answer["item"] is not None:
            status = "cut" if answer["status"] == "cut" else "failed"
            heard({"end": answer["item"], "status": status, "seconds": None, "notes": answer["notes"]})
        skip |= tried - {None}
        in_vain = 0 if good else in_vain + 1
        # Lost outside of an item, it would be lost again; lost at every item, the device is.
        if not tried or in_vain == IN_VAIN or time.monotonic() >= end:
            return None, answer


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

    def finish(self, seconds, cache):
        """Wait at most so long, move the library in, keep a copy in `cache`; what to record."""
        try:
            status = self.process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            return {"status": "cut", "seconds": time.monotonic() - self.start, "notes": ["took too long; build.txt"]}
        built = [path for path in self.out.glob("lib/vilt_fast/_C*") if not status]
        for path in built:
            (_shelf(cache)).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, _shelf(cache))
            _move_in(path)
        notes = [path.name for path in built] if not status else [f"status {status}; build.txt"]
        shutil.rmtree(self.out, ignore_errors=True)
        return {"status": "failed" if status else "ok", "seconds": time.monotonic() - self.start, "notes": notes}


def _shelf(cache):
    """Where libraries for the GPU at hand are kept."""
    return cache / "native" / f"sm_{_capability()}"


def _move_in(path):
    os.replace(shutil.copy(path, ROOT / "vilt_fast" / f".{path.name}"), ROOT / "vilt_fast" / path.name)


def built_before(cache):
    """Move the library that an earlier call built for this Python and GPU into the package; its name, or ""."""
    path = _shelf(cache) / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    if not path.is_file():
        return ""
    _move_in(path)
    return path.name


def missing_for_build():
    """What the native build wants and this machine has not."""
    from ..compiled import cuda_report

    modules = [name for name in ("pybind11", "setuptools") if not importlib.util.find_spec(name)]
    tools = [] if cuda_report.compiler() else ["nvcc"]
    return modules + tools + ([] if shutil.which("cmake") or importlib.util.find_spec("cmake") else ["cmake"])


def _capability():
    """ "90" for the GPU at hand; "" (all) if nobody says."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        return said[0].replace(".", "") if said else ""
    return ""

"""`python -m benchmarks.gpu.campaign --out DIR [--resume ARCHIVE]`: all that only a GPU can tell, in three calls.

Parts run in the order of their worth, in a process of their own, item by item: an item that raises ends nothing but
itself; one that hangs or takes the CUDA context down ends its process, and a fresh one goes on with the next item. Rows
are written as they come; DIR holds one archive of them, results.zip, replaced after every part, and what was compiled,
cache-<n>.zip, so that a cut loses little. The same command again, on this machine or (with --resume) a fresh one, goes
on with what is missing; --plan says what each call will do, and how long. A table of what was found is printed last.

The native library with the CUDA kernels, if nvcc is there, is built beside the first parts and taken in before the part
that times it.

`--dry-run` runs all of it on CPU tensors, with tiny sizes and in Triton's interpreter. That is for machines without a
GPU: the interpreter of Triton 3.6 fails under NumPy 2.4 and newer. Without --dry-run nothing is ever interpreted.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from . import archive, process, tables


class Part(NamedTuple):
    """`function`: "module:function", called with a `worker.Context`. Seconds: worth starting with, at most. `every`: in
    each call, for it is about the machine or about all that is there."""

    function: str
    least: float
    most: float
    what: str
    every: bool = False


PARTS = {
    "environment": Part("benchmarks.gpu.checks:environment", 3, 10, "machine, driver, versions, clocks", True),
    "ceilings": Part("benchmarks.gpu.timing:ceilings", 5, 15, "copy, matrix products, launches", True),
    "compilation": Part("benchmarks.gpu.compilation:compilation", 20, 75, "all kernels, on all cores, into the cache"),
    "correctness": Part("benchmarks.gpu.checks:correctness", 10, 90, "each op and dtype against float64, backward too"),
    "tests": Part("benchmarks.gpu.checks:tests", 15, 75, "tests that want a GPU: the packed way, graphs, kernels"),
    "sanitizer": Part("benchmarks.gpu.sanitizer:sanitizer", 15, 75, "memcheck and racecheck, one small case a kernel"),
    "kernels": Part("benchmarks.gpu.kernels:kernels", 20, 250, "ops and their variants beside the alternatives"),
    "models": Part("benchmarks.gpu.models:models", 20, 240, "whole models; padded SDPA under torch.compile first"),
    "winners": Part("benchmarks.gpu.models:winners", 15, 110, "the variants that won, in whole models"),
    "launches": Part(
        "benchmarks.gpu.models:launches", 15, 40, "dependent launches, split K, residuals in whole models"
    ),
    "compiled": Part("benchmarks.gpu.models:compiled", 30, 130, "the whole model under torch.compile"),
    "training": Part("benchmarks.gpu.models:training", 10, 45, "a training step"),
    "transport": Part("benchmarks.gpu.transport:transport", 10, 90, "CUDA kernels: tests, correctness, times"),
    "retrieval": Part("benchmarks.gpu.serving:retrieval", 8, 30, "every text against every image"),
    "energy": Part("benchmarks.gpu.serving:energy", 8, 30, "joules a pair"),
    "profile": Part("benchmarks.gpu.serving:profile", 6, 20, "where a forward's time goes"),
    "plots": Part("benchmarks.gpu.plot:plots", 0, 15, "drawn from the CSVs", True),
}
NATIVE = "native"  # the build, beside the others; taken in before:
NEEDS_NATIVE = "transport"
MINUTES = (6, 9, 9)  # of the first call, the second, the third and each that follows
RESERVE = 5.0  # seconds kept for the archive and the table
OFTEN = 15.0  # seconds between two archives within a part
DONE = ("ok", "incomplete")  # items that are not tried again


class Records:
    """What became of each part, in memory, in campaign.json and in the archive."""

    def __init__(self, out, folder, dry, minutes):
        self.out, self.results, self.cache = out, folder / "results", folder / "cache"
        for path in (out, self.results, self.cache):
            path.mkdir(parents=True, exist_ok=True)
        self.about = {"calls": 0, "minutes": minutes, "dry_run": dry}
        self.parts = {}
        self.kept = 0.0

    def restore(self, source):
        """Take over what an earlier call left in a folder."""
        if archive.restore(source, self.results, self.cache):
            self.about["calls"], self.parts = _read(archive.state(source))
            if source != self.out:  # should this call be cut before its first archive
                self.save(cache=True)

    def save(self, cache=False):
        """Write all; with what was compiled if asked."""
        parts = list(self.parts.values())
        text = json.dumps(self.about | {"parts": parts}, indent=1) + "\n"
        (self.results / "campaign.json").write_text(text, encoding="utf-8")
        archive.keep_results(self.out, self.results)
        left_out = archive.keep_cache(self.out, self.cache) if cache else 0
        self.kept = time.monotonic()
        return left_out


def _read(state):
    return state["calls"], {record["part"]: record for record in state["parts"]}


def campaign(out, names, minutes, dry, parts=None, *, resume=None, say=print):
    """Run what is missing of the parts named; the records of all that ever ran, in order."""
    parts = PARTS if parts is None else parts
    start = time.monotonic()
    end = start + 60 * minutes - RESERVE
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        records = Records(out, Path(folder), dry, minutes)
        records.restore(resume or out)
        records.about["calls"] += 1
        _run(records, {name: part for name, part in parts.items() if name in names}, NATIVE in names, start, end, say)
        found = tables.text(records.results)
        (records.results / "tables.txt").write_text(found + "\n", encoding="utf-8")
        if left_out := records.save(cache=True):
            say(f"The cache is too large to keep: {left_out} files are left out")
        say(found)
    return list(records.parts.values())


def _run(records, parts, native, start, end, say):
    dry, worker, build = records.about["dry_run"], None, None

    def make():
        return process.Worker(records.results, records.cache, dry)

    def record(name, what):
        records.parts[name] = {"part": name, "call": records.about["calls"]} | what
        records.save(cache=name in ("compilation", NATIVE))
        took = f"{what['seconds']:.0f} s" if what.get("seconds") is not None else ""
        say(f"[{time.monotonic() - start:4.0f} s] {name:<12} {what['status']:<10} {took}")
        wrong = [(item, v) for item, v in what.get("items", {}).items() if v["status"] in ("failed", "cut")]
        for note in [*what.get("notes", []), *(f"{item}: {v['status']}: {v['notes'][-1:]}" for item, v in wrong)]:
            say(f"         {note[:200]}")

    if native and records.parts.get(NATIVE, {}).get("status") != "ok":
        missing = [] if dry else process.missing_for_build()
        if missing or end <= start:
            why = f"not on this machine: {', '.join(missing)}" if missing else "no time"
            record(NATIVE, {"status": "skipped", "seconds": None, "notes": [why]})
        else:
            build = process.Build(records.results, dry)
    elif native and not dry and not process.built_before(records.cache):
        build = process.Build(records.results, dry)
    try:
        for name, part in parts.items():
            earlier = records.parts.get(name, {})
            if earlier.get("status") == "ok" and not part.every:
                continue
            if build and name == NEEDS_NATIVE:
                built = build.finish(min(60.0, (end - time.monotonic()) / 3), records.cache)
                record(NATIVE, built)
                build = None
                if worker and built["notes"]:  # it has looked for the library already
                    worker.kill()
                    worker = None
            later = list(parts)[list(parts).index(name) + 1 :]
            left = end - time.monotonic() - sum(parts[n].most for n in later if parts[n].every)
            if left < part.least:
                notes = [f"{max(left, 0):.0f} s are left, it needs {part.least:.0f} s"]
                record(name, {"items": {}} | earlier | {"status": "skipped", "seconds": None, "notes": notes})
                continue
            items = {} if part.every else dict(earlier.get("items", {}))
            worker = _part(records, name, part, items, min(part.most, left), make, worker, record)
            if name == "environment" and records.parts[name]["status"] not in DONE:
                say("Nothing else is tried: there is no device to try it on")
                end = 0.0
                break
        if build:
            record(NATIVE, build.finish(end - time.monotonic(), records.cache))
            build = None
    finally:
        if build:
            build.finish(0, records.cache)
        if worker:
            worker.kill()


def _part(records, name, part, items, seconds, make, worker, record):
    """Run one part, items as they come into the record; the Worker that is left, or None."""
    began = time.monotonic()

    def heard(line):
        item = line.get("end") or line.get("left") or line["begin"]
        known = {"status": "left" if "left" in line else "cut", "seconds": None, "notes": []}  # until it is over
        items[item] = known | {key: value for key, value in line.items() if key in known}
        records.parts[name] = {"part": name, "call": records.about["calls"], "status": "cut", "items": items}
        if "end" in line and time.monotonic() - records.kept > OFTEN:
            records.save()

    done = [item for item, found in items.items() if found["status"] in DONE]
    worker, answer = process.through(make, worker, part.function, seconds, heard, skip=done)
    found = {item["status"] for item in items.values()}
    lost = answer["status"] in ("died", "broken") and answer["item"] is None
    status = "failed" if lost else answer["status"]
    if status in (*DONE, "died", "cut", "broken") and not (status == "cut" and answer["item"] is None):
        order = ("cut", "failed", "left", "incomplete")
        status = next((s for s in order if s in found), "incomplete" if status == "incomplete" else "ok")
        status = "incomplete" if status == "left" else status
    took = round(time.monotonic() - began, 1)
    record(name, {"status": status, "seconds": took, "notes": answer["notes"], "items": items})
    return worker


# --- what will be done ------------------------------------------------------------------------------------------------


def plan(parts, done, minutes=MINUTES):
    """[{part: seconds}] of calls of so many minutes, for all that is not done; at most, as everything is."""
    rest = {name: part.most for name, part in parts.items() if not part.every and name not in done}
    calls = []
    for most in minutes:
        left, call = 60 * most - RESERVE - sum(part.most for part in parts.values() if part.every), {}
        for name, part in parts.items():
            if part.every:
                call[name] = part.most
            elif rest.get(name) and left >= min(part.least, rest[name]):
                call[name] = min(rest[name], left)
                left, rest[name] = left - call[name], rest[name] - call[name]
        calls.append(call)
    return calls


def planned(parts, made, done, minutes=None):
    """The plan as text: calls from the one that comes next."""
    calls = [minutes] if minutes else MINUTES[made:] or MINUTES[-1:]
    lines = [f"Calls made: {made}. Done: {', '.join(done) or 'nothing'}."]
    for number, (most, call) in enumerate(zip(calls, plan(parts, done, calls), strict=True), made + 1):
        if all(parts[name].every for name in call):
            break
        lines.append(f"call {number}, {most:g} minutes")
        lines += [f"  {name:<12} up to {seconds:3.0f} s  {parts[name].what}" for name, seconds in call.items()]
    last = f"Beside them the native library is built, before {NEEDS_NATIVE}, unless it was before."
    return "\n".join([*lines, last if len(lines) > 1 else "Nothing is missing."])


def main(argv=None):
    """Run, print; returns the exit status: 1 if a part failed or was cut."""
    arguments = _arguments(argv)
    source = arguments.resume or arguments.out
    made, earlier = _read(archive.state(source))
    if arguments.plan:
        chosen = {name: part for name, part in PARTS.items() if name in arguments.parts}
        done = [name for name, record in earlier.items() if record["status"] == "ok" and name in chosen]
        _say(planned(chosen, made, [name for name in done if not chosen[name].every], arguments.minutes))
        return 0
    minutes = arguments.minutes or MINUTES[min(made, len(MINUTES) - 1)]
    records = campaign(arguments.out, arguments.parts, minutes, arguments.dry_run, resume=source, say=_say)
    return int(any(record["status"] in ("failed", "cut") for record in records))


def _say(text):
    print(text, flush=True)


def _arguments(argv):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.campaign", description=__doc__.split("\n")[0])
    names = [*PARTS, NATIVE]
    parser.add_argument("--out", type=Path, required=True, help="folder for results.zip and cache-<n>.zip")
    parser.add_argument("--resume", type=Path, help="results.zip of an earlier call, the cache beside it")
    parser.add_argument("--plan", action="store_true", help="say what each call will do and how long, and do nothing")
    parser.add_argument("--dry-run", action="store_true", help="CPU tensors, tiny sizes, Triton's interpreter")
    parser.add_argument("--parts", nargs="+", default=names, choices=names, help="default: all")
    parser.add_argument("--minutes", type=float, help="for this call (default: 6 for the first, then 9)")
    arguments = parser.parse_args(argv)
    if arguments.minutes is not None and not arguments.minutes > 0:
        parser.error("--minutes must be more than 0")
    arguments.out = arguments.out.resolve()
    if arguments.resume:
        if arguments.resume.is_dir():
            arguments.resume = arguments.resume / archive.RESULTS
        if not arguments.resume.is_file():
            parser.error(f"--resume: there is no {arguments.resume}")
        arguments.resume = arguments.resume.resolve().parent
        if arguments.resume != arguments.out and (arguments.out / archive.RESULTS).is_file():
            parser.error(f"--resume: {arguments.out} holds the results of another call; give an empty folder")
    return arguments


if __name__ == "__main__":
    sys.exit(main())

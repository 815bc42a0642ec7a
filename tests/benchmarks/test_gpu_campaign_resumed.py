"""The GPU campaign: what fails or is cut is recorded, leaves the rest alone and is gone on with, elsewhere too; what is
brought home is whole at any time."""

import contextlib
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from support.campaign import records, rows, unpacked

from benchmarks.gpu import archive, process
from benchmarks.gpu import campaign as gpu_campaign

pytestmark = pytest.mark.xdist_group("campaign")
ROOT = Path(__file__).resolve().parents[2]

PARTS = """
import os, time

def say(context, name):
    context.emit("said", [{"item": name, "pid": os.getpid()}], ("item", "pid"), key=("item",))

def good(context):
    context.item("all", lambda: say(context, "good"))

def items(context):
    def three():
        context.note("got this far")
        raise ValueError("on purpose")
    for name, function in {"one": None, "two": None, "three": three, "four": None}.items():
        context.item(name, function or (lambda name=name: say(context, name)))

def outside(context):
    context.note("got this far")
    raise ValueError("outside")

def dies(context):
    for name in ("first", "dies", "last"):
        context.item(name, lambda name=name: os._exit(9) if name == "dies" else say(context, name))

def breaks(context):
    def lost():
        context.sync = lost  # as a device does that has seen a bad address
        raise RuntimeError("CUDA error")
    for name in ("first", "breaks", "last"):
        context.item(name, lost if name == "breaks" else lambda name=name: say(context, name))

def gone(context):
    def lost():
        context.sync = lost
        raise RuntimeError("no device")
    for name in range(9):
        context.item(str(name), lost)

def hangs(context):
    for name, most in {"first": 60, "hangs": 0.5, "last": 60}.items():
        context.item(name, lambda name=name: time.sleep(600) if name == "hangs" else say(context, name), most=most)

def slow(context):
    say(context, "before")
    time.sleep(600)

def cut(context):
    for name in ("first", "second", "third"):
        def one(name=name):
            say(context, name)
            if name == "second" and os.environ.get("CUT"):
                time.sleep(15)
        context.item(name, one)
"""


def parts(**most):
    return {
        name: gpu_campaign.Part("campaign_parts:" + name.rstrip("0123456789"), 0.1, seconds, "")
        for name, seconds in most.items()
    }


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    (tmp_path / "campaign_parts.py").write_text(PARTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(process, "GRACE", 0.5)
    return tmp_path / "out"


def campaign(out, chosen, minutes=5.0, resume=None):
    said = []

    def say(text):
        said.append(text)
        if (out / archive.RESULTS).is_file():  # whole at any time
            with zipfile.ZipFile(out / archive.RESULTS) as file:
                assert file.testzip() is None and "campaign.json" in file.namelist()

    found = gpu_campaign.campaign(out, list(chosen), minutes, True, chosen, resume=resume, say=say)
    assert records(out) == found
    return {record["part"]: record for record in found}, "\n".join(said)


def said_by(out):
    """{item: pid} of what the made-up parts wrote, in the archive."""
    unpacked(out, out.parent / "unpacked")
    found = rows(out.parent / "unpacked", "said")
    assert len({row["item"] for row in found}) == len(found)
    return {row["item"]: row["pid"] for row in found}


def statuses(record):
    return {item: found["status"] for item, found in record["items"].items()}


def test_an_item_that_raises_ends_nothing_but_itself(made_up):
    found, said = campaign(made_up, parts(items=60, outside=60, good=60))
    assert {name: record["status"] for name, record in found.items()} == {
        "items": "failed", "outside": "failed", "good": "ok",
    }  # fmt: skip
    assert statuses(found["items"]) == {"one": "ok", "two": "ok", "three": "failed", "four": "ok"}
    assert found["items"]["items"]["three"]["notes"] == ["got this far", "ValueError: on purpose"]
    assert found["outside"]["notes"] == ["got this far", "ValueError: outside"]
    assert "ValueError: on purpose" in said.splitlines()[-1]  # the table says it once more, last
    pids = said_by(made_up)
    assert set(pids) == {"one", "two", "four", "good"} and len(set(pids.values())) == 1
    assert "on purpose" in (made_up.parent / "unpacked" / "log.txt").read_text()


@pytest.mark.parametrize(
    "part, status, note",
    [
        ("dies", "failed", "the process ended with status 9"),
        ("breaks", "failed", "RuntimeError: CUDA error"),
        ("hangs", "cut", "ended after 0 s"),
    ],
)
def test_what_takes_its_process_along_is_gone_on_with_in_another(made_up, part, status, note):
    found, _ = campaign(made_up, parts(**{"good": 60, part: 60, "good2": 60}))
    assert statuses(found[part]) == {"first": "ok", part: status, "last": "ok"}
    assert found[part]["items"][part]["notes"] == [note]
    assert [record["status"] for record in found.values()] == ["ok", status, "ok"]
    pids = said_by(made_up) if part == "hangs" else None
    if pids:
        assert pids["first"] != pids["last"]


def test_a_device_that_is_gone_is_given_up(made_up):
    found, said = campaign(made_up, parts(gone=60, good=60))
    assert statuses(found["gone"]) == dict.fromkeys("012", "failed") and found["good"]["status"] == "ok"
    missing = {"environment": gpu_campaign.Part("campaign_parts:outside", 0, 60, "", True)} | parts(items=60)
    found, said = campaign(made_up.parent / "another", missing)
    assert set(found) == {"environment"} and "Nothing else is tried" in said


def test_a_part_that_does_not_end_is_cut_and_what_it_wrote_stays(made_up):
    found, _ = campaign(made_up, parts(slow=1.5, good=60))
    assert [record["status"] for record in found.values()] == ["cut", "ok"]
    assert 1.5 <= found["slow"]["seconds"] < 10
    assert set(said_by(made_up)) == {"before", "good"}


def test_nothing_starts_that_does_not_fit(made_up):
    chosen = {"good": gpu_campaign.Part("campaign_parts:good", 60, 90, "")}
    found, said = campaign(made_up, chosen, minutes=0.5)
    assert found["good"]["status"] == "skipped"
    assert "it needs 60 s" in found["good"]["notes"][0] and "it needs 60 s" in said


def test_a_second_call_goes_on_with_what_is_missing(made_up, tmp_path):
    chosen = parts(good=60, items=60)
    first, _ = campaign(made_up, chosen)
    before = said_by(made_up)
    fresh = tmp_path / "fresh"
    chosen |= parts(cut=60)
    found, _ = campaign(fresh, chosen, resume=made_up)
    assert [record["call"] for record in found.values()] == [1, 2, 2] and found["good"] == first["good"]
    assert statuses(found["items"]) == statuses(first["items"])  # what failed is tried again, and only that
    after = said_by(fresh)
    assert {item: after[item] for item in before} == before and set(after) - set(before) == {"first", "second", "third"}
    assert archive.state(fresh)["calls"] == 2 and archive.state(made_up)["calls"] == 1


CALL = """
import sys
from pathlib import Path
from types import SimpleNamespace
from benchmarks.gpu import campaign
campaign.OFTEN = 0.0
parts = {"good": campaign.Part("campaign_parts:good", 0, 60, ""), "cut": campaign.Part("campaign_parts:cut", 0, 60, "")}
campaign.campaign(Path(sys.argv[1]), list(parts), 5, True, parts)
"""


def test_a_campaign_that_is_killed_leaves_a_whole_archive_and_is_gone_on_with(made_up):
    path = os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])
    environment = os.environ | {"CUT": "1", "PYTHONPATH": path, "TMPDIR": str(made_up.parent)}
    child = subprocess.Popen([sys.executable, "-c", CALL, str(made_up)], cwd=ROOT, env=environment)
    end = time.monotonic() + 60
    while time.monotonic() < end:  # until the second item is under way
        with contextlib.suppress(FileNotFoundError):
            if "cut" in {record["part"] for record in records(made_up)}:
                break
        time.sleep(0.05)
    child.kill()
    child.wait()
    assert "first" in statuses(records(made_up)[1]) and set(said_by(made_up)) >= {"good", "first"}
    before = said_by(made_up)
    found, _ = campaign(made_up, parts(good=60, cut=60))
    assert found["good"]["call"] == 1 and found["cut"]["call"] == 2
    assert statuses(found["cut"]) == dict.fromkeys(("first", "second", "third"), "ok")
    assert said_by(made_up)["first"] == before["first"]  # not run again


def test_the_cache_comes_along_in_volumes_and_is_found_where_it_is_unpacked(tmp_path, monkeypatch):
    cache, home, there = tmp_path / "cache", tmp_path / "home", tmp_path / "there"
    home.mkdir()
    for number in range(6):
        folder = cache / "triton" / f"key{number}"
        folder.mkdir(parents=True)
        (folder / "kernel.cubin").write_bytes(os.urandom(3000))
        (folder / "kernel.json").write_text("{}")
        names = {name: str(folder / name) for name in ("kernel.cubin", "kernel.json")}
        (folder / "__grp__kernel.json").write_text(json.dumps({"child_paths": names}))
    (cache / "inductor").mkdir()
    (cache / "inductor" / "graph").write_bytes(os.urandom(3000))
    (cache / "triton" / "key0" / "tmp.pid_1").mkdir()
    (cache / "triton" / "key0" / "tmp.pid_1" / "kernel.cubin").write_text("half of it")
    monkeypatch.setattr(archive, "VOLUME", 10000)
    monkeypatch.setattr(archive, "VOLUMES", 2)
    assert archive.keep_cache(home, cache) == 7  # files of two kernels and a graph found no room
    volumes = sorted(path.name for path in home.iterdir())
    assert volumes == ["cache-0.zip", "cache-1.zip"]
    assert all((home / name).stat().st_size <= 10000 for name in volumes)
    assert not archive.restore(home, there / "results", there / "cache")  # no results, but a cache
    groups = sorted((there / "cache" / "triton").glob("*/__grp__*"))
    assert len(groups) == 4 and not list(there.rglob("tmp.*"))
    for group in groups:
        for name, path in json.loads(group.read_text())["child_paths"].items():
            assert Path(path) == group.parent / name and Path(path).is_file()


COMPILE = """
import shutil, sys
from pathlib import Path
from types import SimpleNamespace
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from benchmarks.gpu import archive
from vilt_fast.kernels import linear_fp8

folder, hits = Path(sys.argv[1]), []
knobs.compilation.store_binary_only = True
knobs.compilation.listener = lambda cache_hit, **_: hits.append(cache_hit)
case = next(c for c in linear_fp8.aot_cases() if c["kernel"] is linear_fp8._quantize_fp8_kernel)

def compiled(cache):
    knobs.cache.dir = str(cache / "triton")
    signature = {name: case["signature"].get(name, "constexpr") for name in case["kernel"].arg_names}
    source = ASTSource(case["kernel"], signature, case["constexprs"])
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]

before = compiled(folder / "cache")
(folder / "out").mkdir()
assert archive.keep_cache(folder / "out", folder / "cache") == 0
shutil.rmtree(folder / "cache")
archive.restore(folder / "out", folder / "results", folder / "fresh")
assert compiled(folder / "fresh") == before
print(hits)
"""


def test_a_fresh_machine_compiles_nothing_again(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"PYTHONPATH": "."}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "[False, True]"

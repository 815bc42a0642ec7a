"""The GPU campaign, dry: every part on CPU tensors writes its rows; what fails or is cut is recorded, leaves the rest
alone and is gone on with; what is brought home is few files, whole at any time."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import table
from benchmarks.compiled import cuda_report
from benchmarks.gpu import archive, checks, process, sanitizer, tables, timing, variants, worker
from benchmarks.gpu import campaign as gpu_campaign
from benchmarks.gpu import plot as gpu_plot

pytestmark = pytest.mark.xdist_group("campaign")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The folder of what a dry run of the command brings home, unpacked; its exit status; the files it left."""
    out, found = tmp_path_factory.mktemp("campaign"), tmp_path_factory.mktemp("found")
    status = gpu_campaign.main(["--out", str(out), "--dry-run"])
    unpacked(out, found)
    return found, status, sorted(path.name for path in out.iterdir())


def unpacked(out, folder):
    with zipfile.ZipFile(out / archive.RESULTS) as file:
        assert file.testzip() is None
        file.extractall(folder)


def rows(out, name):
    return table.read(out / f"{name}.csv")


def records(out):
    return archive.state(out)["parts"]


def test_every_part_succeeds(dry):
    found, status, _ = dry
    state = json.loads((found / "campaign.json").read_text())
    assert {r["part"]: r["status"] for r in state["parts"]} == dict.fromkeys(
        [*gpu_campaign.PARTS, gpu_campaign.NATIVE], "ok"
    ), (found / "log.txt").read_text()[-3000:]
    assert status == 0 and state["dry_run"] is True
    (where,) = json.loads((found / "environment.json").read_text()).values()
    assert {"device", "numpy", "versions"} <= set(where)
    (ceilings,) = json.loads((found / "ceilings.json").read_text()).values()
    assert {"copy", "bfloat16", "launch", "latency"} <= set(ceilings)


def test_few_files_come_home_and_hold_what_was_promised(dry):
    found, _, files = dry
    assert files == [archive.RESULTS]  # no cache: an interpreter compiles nothing
    assert 1 + archive.VOLUMES + 1 <= 8  # one that is being written may be left by a cut
    names = {path.name for path in found.iterdir()}
    assert names >= {f"{name}.{kind}" for name in gpu_plot.TITLES for kind in ("csv", "png")}
    assert names >= {"campaign.json", "environment.json", "ceilings.json", "winners.json", "log.txt", "build.txt"}
    assert names >= {"correctness.csv", "energy.csv", "profile.csv", "profile.txt", "pytest.txt", "tables.txt"}


def test_the_table_names_every_case_and_comes_last(dry):
    text = (dry[0] / "tables.txt").read_text()
    for name in ("kernels", "models", "models_compiled", "models_winners", "training", "alignment"):
        assert all(row["case"] in text and row["provider"] in text for row in rows(dry[0], name))
    assert "0 out of budget" in text.splitlines()[0]
    assert len(text) < 12000  # as much of the end of an output as may be all that is seen


@pytest.mark.parametrize(
    "name, providers",
    [
        ("ceilings", {"torch"}),
        ("kernels", {"eager", "eager_padded", "sdpa_padded", "sdpa_nested", "compiled", "conv2d", "reference", "ours"}),
        (
            "models",
            {"hf_eager", "hf_bf16", "sdpa_compile_bf16", "ours_float32", "ours_bfloat16", "ours_graphs_bfloat16",
             "ours_float8", "ours_graphs_float8"},
        ),
        ("models_compiled", {"hf_eager", "hf_compile_bf16", "ours_graphs_bfloat16"}),
        ("models_winners", {"hf_eager", "ours_graphs_bfloat16", "ours_bfloat16"}),
        ("training", {"hf_autocast", "ours_autocast"}),
        ("alignment", {"loop", "triton"}),
        ("retrieval", {"hf_eager", "hf_bf16", "ours_bfloat16"}),
    ],
)  # fmt: skip
def test_rows_are_those_of_the_other_benchmarks(dry, name, providers):
    found = rows(dry[0], name)
    assert tuple(found[0]) == worker.FIELDS and worker.FIELDS[: len(table.FIELDS)] == table.FIELDS
    assert {row["provider"] for row in found} >= providers
    keys = [tuple(row[column] for column in worker.KEY) for row in found]
    assert len(set(keys)) == len(keys)
    optional = {"peak_mib", "forward_mib", "commit", "error", "shape", "backend", "model", "gpu_ms"}
    for row in found:
        assert all(row[field] for field in worker.FIELDS if field not in optional), row
        assert float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["floor_ms"]) > 0 and row["timed"] == "wall"


def test_the_strongest_peer_comes_first_and_each_variant_beside_what_ships(dry):
    assert rows(dry[0], "models")[0]["provider"] == "sdpa_compile_bf16"
    by_case = {}
    for row in rows(dry[0], "kernels"):
        by_case.setdefault(row["case"], set()).add(row["provider"])
    for op, some in variants.VARIANTS.items():
        assert by_case[f"{op} b1"] >= {"ours", *(f"ours {name}" for name in some)}
    assert by_case["linear qkv b1"] >= {"eager", "eager one_product", "ours", "ours one_product"}


def test_ours_are_as_right_as_their_peers(dry):
    """In each group and dtype our error is at most twice the worst of the others, plus a rounding."""
    for name in ("kernels", "models", "models_compiled", "models_winners", "alignment"):
        groups = {}
        for row in rows(dry[0], name):
            groups.setdefault((row["case"], row["dtype"]), []).append(row)
        for (case, dtype), group in groups.items():
            if name in ("models_compiled", "models_winners") and dtype == "float32":  # only the base of the ratios
                assert {row["provider"] for row in group} == {"hf_eager"}
                continue
            if dtype == "float8":  # nobody else computes in it; tests/test_quantization.py holds it to its emulation
                continue
            if name == "models_winners":  # ours alone, which `models` holds to their peers
                assert all(row["provider"].startswith(tables.OURS) for row in group)
                continue
            rated = [row for row in group if row["provider"] != "conv2d"]  # which leaves out half of the work
            ours = [float(row["error"]) for row in rated if row["provider"].startswith(tables.OURS)]
            peers = [float(row["error"]) for row in rated if not row["provider"].startswith(tables.OURS)]
            allowed = 2 * max(peers) + torch.finfo(getattr(torch, dtype)).eps
            assert ours and max(ours) <= allowed, (name, case, dtype, ours, peers)


def test_every_op_and_batch_is_there(dry):
    cases = {row["case"] for row in rows(dry[0], "kernels")}
    ops = ("attention", "attention_bwd", "linear qkv", "linear out", "linear fc2", "linear_gelu", "add_layer_norm")
    ops += ("text_embed", "patch_embed", "linear_cross_entropy_bwd")
    assert cases == {f"{op} {batch}" for op in ops for batch in ("b1", "b2")}
    checked = rows(dry[0], "correctness")
    assert {row["op"] for row in checked} == {
        "model in graphs",
        *("attention", "patch_embed", "text_embed", "add_layer_norm", "linear", "linear_gelu", "linear_cross_entropy"),
        *("linear_fp8", "word_patch_distance", "ipot", "sinkhorn"),
    }
    assert all(row["within"] == "True" for row in checked)
    assert sum(row["quantity"].startswith("gradient") for row in checked) > 40
    assert "skipped" in (dry[0] / "pytest.txt").read_text()
    assert {row["provider"] for row in rows(dry[0], "energy")} >= {"hf_bf16", "ours_bfloat16"}
    kernels = {row["kernel"] for row in rows(dry[0], "profile") if row["provider"] == "ours_float32"}
    assert any(name.startswith("vilt_fast::") for name in kernels)


def test_plots_are_drawn_from_the_csvs(dry):
    for name in gpu_plot.TITLES:
        assert (dry[0] / f"{name}.png").read_bytes().startswith(b"\x89PNG")


# --- what goes wrong --------------------------------------------------------------------------------------------------

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


# --- what is gone on with ---------------------------------------------------------------------------------------------


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


def test_a_plan_fits_the_calls_and_does_nothing(tmp_path, capsys):
    assert gpu_campaign.main(["--out", str(tmp_path / "none"), "--plan"]) == 0
    assert not (tmp_path / "none").exists()
    text = capsys.readouterr().out
    assert re.findall(r"^call (\d), (\d) minutes", text, re.MULTILINE) == [("1", "6"), ("2", "9"), ("3", "9")]
    assert all(f"  {name} " in text for name in gpu_campaign.PARTS)
    calls = gpu_campaign.plan(gpu_campaign.PARTS, ())
    for minutes, call in zip(gpu_campaign.MINUTES, calls, strict=True):
        assert sum(call.values()) + gpu_campaign.RESERVE <= 60 * minutes < 600
    every = [name for name, part in gpu_campaign.PARTS.items() if part.every]
    for name, part in gpu_campaign.PARTS.items():  # whole, in one call, in the order of their worth
        assert [call[name] for call in calls if name in call] == [part.most] * (3 if name in every else 1), name
    assert [name for call in calls for name in call if name not in every] == [
        name for name in gpu_campaign.PARTS if name not in every
    ]
    assert {"compilation", "correctness", "tests", "sanitizer"} < set(calls[0])
    assert {"kernels", "models"} < set(calls[1])
    done = [name for name in gpu_campaign.PARTS if name not in every]
    assert "Nothing is missing." in gpu_campaign.planned(gpu_campaign.PARTS, 3, done)


def test_exit_status_and_bad_arguments(monkeypatch, tmp_path, capsys):
    for status, wanted in {"ok": 0, "skipped": 0, "incomplete": 0, "failed": 1, "cut": 1}.items():
        monkeypatch.setattr(gpu_campaign, "campaign", lambda *_, status=status, **__: [{"status": status}])
        assert gpu_campaign.main(["--out", str(tmp_path)]) == wanted
    there = tmp_path / "there"
    there.mkdir()
    for folder in (tmp_path, there):
        (folder / archive.RESULTS).write_bytes(b"")
    for argv in (
        [], ["--out", "x", "--minutes", "0"], ["--out", "x", "--parts", "nonsense"],
        ["--out", "x", "--resume", str(tmp_path / "nowhere.zip")], ["--out", str(tmp_path), "--resume", str(there)],
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            gpu_campaign.main(argv)
    said = capsys.readouterr().err
    assert "nonsense" in said and "nowhere.zip" in said and "results of another call" in said


# --- what only a GPU would show ---------------------------------------------------------------------------------------


def test_the_gpu_is_asleep_while_the_host_makes_a_call(monkeypatch):
    log, clock = [], [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, other):
            return 7.0

    def call():
        log.append("call")
        clock[0] += 2e-3  # a slow host

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(("sleep", cycles)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    busy, hosts = timing._queued(call, 2)
    assert [entry if isinstance(entry, str) else entry[0] for entry in log] == ["sleep", "event", "call", "event"] * 2
    assert busy == [7e-3] * 2 and hosts == pytest.approx([2e-3] * 2)
    slept = [entry[1] / timing.CYCLES for entry in log if not isinstance(entry, str)]
    assert slept[0] >= 1e-3 and slept[1] >= 2 * 2e-3  # and longer than the host is known to need


def test_a_call_is_timed_by_replay_and_by_itself_where_it_cannot_be_captured(monkeypatch, tmp_path):
    made, ran, empty = [], [], torch.empty

    class Recording:
        def __init__(self, function, device, pool):
            if function is stubborn:
                raise RuntimeError("it waits for the host")
            made.append(function)
            self.replay = lambda: ran.append("replay")

    def plain():
        ran.append("plain")

    def stubborn():
        ran.append("stubborn")

    seconds = iter(range(1, 1000))
    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda other: next(seconds))
    for name, fake in {
        "Event": lambda enable_timing: event, "_sleep": lambda cycles: None, "synchronize": lambda: None,
        "current_device": lambda: 0, "get_device_properties": lambda: SimpleNamespace(L2_cache_size=8),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch, "empty", lambda *size, device, **more: empty(*size, **more))
    monkeypatch.setattr(timing, "Recording", Recording)
    context = worker.Context(tmp_path, True)
    context.device = torch.device("cuda")  # dry, so one round
    times, rounds = timing.interleaved(context, {"plain": plain, "stubborn": stubborn})
    assert rounds == 1 and made == [plain] and ran[-2:] == ["replay", "stubborn"]
    assert ran.count("plain") == 20  # made by the host, for the host's time
    assert (times["plain"].timed, times["stubborn"].timed) == ("graph", "sleep")
    assert all(found.gpu == found.values[0] and found.host > 0 for found in times.values())


def test_items_are_dealt_out_over_processes_each_once(tmp_path):
    names, found = [str(i) for i in range(11)], []
    for k in range(3):
        context = worker.Context(tmp_path, True)
        context.share = (k, 3)
        for name in names:
            context.item(name, lambda name=name: found.append(name))
    assert sorted(found, key=int) == names


def test_every_variant_is_another_launch():
    asked = {
        "linear": ("tma", 13792, 3072), "add_layer_norm": (13792, 768), "patch_embed": (9216, torch.bfloat16, False),
        "attention": (90, 2, 64, 281, 281, 768, 132),
    }  # fmt: skip
    for op, some in variants.VARIANTS.items():
        for name, change in some.items():
            module, attribute, _ = change
            arguments = asked[module.__name__.rsplit(".", 1)[1]]

            def config(module=module, attribute=attribute, arguments=arguments):
                return getattr(module, attribute)(*arguments)

            ships, other = config(), variants._under([change], config)
            assert set(other) >= set(ships) - {"per_multiprocessor"}, (op, name)
            if (op, name) != ("linear_gelu", "128x256"):  # what ships at this size, and not at others
                assert other != ships, (op, name)
            assert config() == ships


def test_winners_are_read_off_the_kernels(tmp_path):
    def row(op, batch, provider, ms):
        return {"case": f"{op} b{batch}", "provider": provider, "p50_ms": ms}

    table.write(
        tmp_path / "kernels.csv",
        [
            row("attention", 64, "ours", 1.0), row("attention", 64, "ours online 64x64", 0.5),
            row("attention", 8, "ours online 128x64", 0.1), row("attention", 64, "sdpa_padded", 0.01),
            row("linear_gelu", 64, "ours", 1.0), row("linear_gelu", 64, "ours 128x128x2", 0.99),
            row("linear out", 64, "ours", 1.0),
        ],
        ("case", "provider", "p50_ms"),
    )  # fmt: skip
    assert variants.winners(tmp_path) == {"attention": "online 64x64"}
    assert variants.winners(tmp_path / "nowhere") == {}


@pytest.mark.parametrize("status, summary, wanted", [(0, "0 errors", "ok"), (9, "2 errors", "failed")])
def test_what_the_sanitizer_sees_is_a_failure(tmp_path, monkeypatch, status, summary, wanted):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        f"#!/bin/sh\necho $@ $PYTORCH_NO_CUDA_MEMORY_CACHING\necho ========= SUMMARY: {summary}\nexit {status}\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    said = []
    context = worker.Context(tmp_path, False, said.append)
    context.sync = lambda: None
    context.deadline = time.monotonic() + 60
    context.skip = [f"{op}, memcheck" for op in checks.OPS if op != "linear"]
    sanitizer.sanitizer(context)
    ended = {line["end"]: line["status"] for line in said if "end" in line}
    assert ended == dict.fromkeys(["linear, memcheck", *(f"{op}, racecheck" for op in checks.OPS)], wanted)
    text = (tmp_path / "sanitizer.txt").read_text()
    assert "--tool racecheck --error-exitcode 9" in text and "benchmarks.gpu.sanitizer linear 1" in text


def test_every_test_that_wants_a_gpu_is_run_on_one():
    wants = re.compile(r"mark\.gpu|^DEVICE = |^GPU = |torch\.cuda\.is_available\(\):\n        return", re.MULTILINE)
    found = {
        str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")
        if wants.search(path.read_text()) and path != Path(__file__)
    }  # fmt: skip
    assert found == {*checks.ON_A_GPU, *checks.SOME_MARKED, *checks.OF_THE_LIBRARY}
    for name in (*checks.ON_A_GPU, *checks.SOME_MARKED):  # that start where the native library is not built
        assert not re.search(r"^(import ot|from vilt_fast import .*_C)\b", (ROOT / name).read_text(), re.MULTILINE)


def test_nvcc_is_found_outside_of_path(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert cuda_report.compiler() == str(tmp_path / "bin" / "nvcc")
    assert "nvcc" not in process.missing_for_build()

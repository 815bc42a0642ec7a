"""What only a GPU would show of its campaign, with stand-ins for it: the clock, the variants, the sanitizer, nvcc."""

import os
import re
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import table
from benchmarks.compiled import cuda_report
from benchmarks.gpu import cases, checks, process, sanitizer, timing, variants, worker
from vilt_fast import order
from vilt_fast.kernels import add_layer_norm, attention, attention_bwd, linear, linear_qkv, patch_embed

pytestmark = pytest.mark.xdist_group("campaign")
ROOT = Path(__file__).resolve().parents[2]


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
        "linear_gelu": partial(linear._config, "tma", 13792, 3072, gelu=True),
        "linear fc2": lambda: linear._measured(linear._config("tma", 185, 768), "tma", 185, 3072, 90),
        "linear qkv": partial(linear_qkv._config, "tma", 13792, 768),
        "add_layer_norm": partial(add_layer_norm.fwd_config, 13792, 768, torch.bfloat16, 90),
        "patch_embed": partial(patch_embed.fwd_config, 9216, torch.bfloat16, 90),
        "attention": partial(attention._forward_config, 90, 2, 64, 281, 281, 768, 132),
        "attention_bwd": partial(attention_bwd._config, 90, 2, 64, 281, 768, 132),
    }
    for op in ("add_layer_norm_fp8", "linear_gelu_fp8"):
        asked[op] = lambda op=op: {"FUSED": True} | order.chosen(op)
    assert set(asked) == set(variants.VARIANTS)
    for op, some in variants.VARIANTS.items():
        for name in some:
            ships, other = asked[op](), variants._under({op: name}, asked[op])
            assert set(other) >= set(ships), (op, name)
            if (op, name) != ("linear_gelu", "128x128x2 tail"):  # what ships at this size, and not at others
                assert other != ships, (op, name)
            assert asked[op]() == ships
            assert order.parsed(order.written(some[name])) == some[name]


def test_rows_of_whole_forwards_stand_in_the_table_while_one_runs(monkeypatch):
    def told():
        backends = order.entry("linear", "few").backends[0], order.entry("linear_gelu").backends[0]
        ops = ("linear", "linear_qkv", "linear_gelu", "add_layer_norm", "attention")
        return backends, *({op: order.configuration(op, 90, rows) for op in ops} for rows in (185, 13792))

    monkeypatch.setattr(order, "capability", lambda: "sm_90")
    order.entry.cache_clear()
    before = told()
    usual, few, many = before
    split = variants.VARIANTS["linear fc2"]["64x128 splits of 768"]
    waits = {op: {"PDL": True} for op in few if op != "attention"} | {"attention": {}}
    for name, wanted in {
        "dependent": (usual, waits, waits), "own": (("triton", usual[1]), few, many),
        "own_split": (("triton", usual[1]), few | {"linear": split}, many),
        "own_split_dependent": (("triton", usual[1]), waits | {"linear": split | {"PDL": True}}, waits),
        "own_residual": (("triton", usual[1]), *(found | {"linear": {"RESIDUAL": True}} for found in (few, many))),
    }.items():  # fmt: skip
        assert variants.within(name, told)() == wanted, name
        assert told() == before
    with pytest.raises(ZeroDivisionError):
        variants.within("own", lambda: 1 / 0)()
    assert told() == before
    order.entry.cache_clear()


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
    context.skip = [f"{op}, memcheck" for op in cases.OPS if op != "linear"]
    sanitizer.sanitizer(context)
    ended = {line["end"]: line["status"] for line in said if "end" in line}
    assert ended == dict.fromkeys(["linear, memcheck", *(f"{op}, racecheck" for op in cases.OPS)], wanted)
    text = (tmp_path / "sanitizer.txt").read_text()
    assert "--tool racecheck --error-exitcode 9" in text and "benchmarks.gpu.sanitizer linear 1" in text


def test_every_test_that_wants_a_gpu_is_run_on_one():
    wants = re.compile(
        r"mark\.gpu|^DEVICE = |^GPU = |^    GPU,$|torch\.cuda\.is_available\(\):\n        return", re.MULTILINE
    )
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

"""The table of backends on GPUs: what the registry reads, and how a campaign writes it."""

import csv
import zipfile
from importlib import resources

import pytest
import torch

from benchmarks import table
from benchmarks.gpu import order as written
from vilt_fast.ops import _define, order, registry


@pytest.fixture
def an_order(tmp_path, monkeypatch):
    """A table of one's own: a function that writes it."""
    monkeypatch.setattr(order, "TABLE", tmp_path / "order.csv")

    def write(*rows):
        table.write(order.TABLE, [dict(zip(order.FIELDS, row, strict=True)) for row in rows], order.FIELDS)
        order.table.cache_clear(), order.entry.cache_clear()

    yield write
    order.table.cache_clear(), order.entry.cache_clear()


def test_the_committed_table_names_backends_and_ops_that_are_there():
    ops = {op for op, _ in registry._SLOTS}
    with resources.files("vilt_fast.ops").joinpath("order.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert ("any", "any") in order.table() and len(rows) == len(order.table())
    for row in rows:
        assert row["op"] == "any" or row["op"] in ops
        named = row["backends"].split()
        assert len(named) == len(set(named))
        assert set(named) <= {b for op, b in registry._SLOTS if row["op"] in ("any", op)}
        assert row["by"] == "a guess" or row["by"].startswith("measured on ")


def test_a_device_comes_before_any_and_an_op_too(an_order, monkeypatch):
    rows = [("any", "any", "triton reference", "1"), ("any", "linear", "reference", "2"), ("sm_90", "any", "cuda", "3")]
    an_order(*rows)
    assert order.entry("linear").by == "2" and order.entry("attention").by == "1"
    monkeypatch.setattr(order, "capability", lambda: "sm_90")
    an_order(*rows, ("sm_90", "attention", "torch triton", "4"))
    assert order.entry("linear").by == "3" and order.entry("attention").by == "4"
    facts = _define.OPS["attention"]._ask(_define.OPS["attention"]._facts, dict(
        q=torch.zeros(1, 1, 16), cu_seqlens_q=torch.zeros(2), cu_seqlens_k=torch.zeros(2), seqused_k=None,
        causal_start=None, dropout_p=0.0, requires_grad=False,
    ))  # fmt: skip
    monkeypatch.setattr(registry, "_GPUS", {"cpu"})
    assert registry.resolve("attention", None, facts) == "torch"
    monkeypatch.setattr(registry, "_GPUS", set())
    assert registry.resolve("attention", None, facts) == "cpp"


def test_a_campaign_writes_what_was_faster_at_the_largest_batch(an_order, tmp_path, capsys):
    an_order(
        ("any", "any", "cuda triton torch reference", "a guess"), ("sm_90", "ipot", "cuda", "an older run"),
        ("sm_90", "sinkhorn", "cuda", "an older run"), ("sm_80", "ipot", "cuda", "another device"),
        ("sm_90", "linear_gelu", "reference cuda", "an older run"),
    )  # fmt: skip
    common = {"device": "H100", "commit": "abc", "date": "2026-01-01", "dtype": "bfloat16"}
    kernels = [
        ("linear out b64", "eager", 3), ("linear out b64", "ours", 2.5), ("linear fc2 b64", "eager", 3),
        ("linear fc2 b64", "ours", 4), ("linear out b1", "eager", 9), ("linear out b1", "ours", 1),
        ("linear_gelu b64", "eager", 2), ("linear_gelu b64", "ours", 1), ("linear_gelu b64", "ours erf", 0.5),
        ("linear qkv b64", "eager", 2), ("linear qkv b64", "ours", 1), ("linear qkv b64", "eager one_product", 0.1),
        ("attention b64", "sdpa_padded", 1), ("attention b64", "ours", 2),
    ]  # fmt: skip
    alignment = [("ipot full", "loop", 1), ("ipot full", "triton", 0.2), ("ipot full", "cuda", 0.3)]
    for name, rows, more in (("kernels", kernels, {}), ("alignment", alignment, {"dtype": "float32"})):
        columns = ("case", "provider", "p50_ms")
        rows = [common | more | dict(zip(columns, row, strict=True)) for row in rows]
        table.write(tmp_path / f"{name}.csv", rows, (*columns, *common))
    for archive, names in (("results", ("kernels.csv", "alignment.csv")), ("empty", ())):
        with zipfile.ZipFile(tmp_path / f"{archive}.zip", "w") as file:
            for name in names:
                file.write(tmp_path / name, name)
    command = [str(tmp_path / "results.zip"), "--device", "sm_90"]
    before = order.TABLE.read_text()
    assert written.main(command) == 0 and order.TABLE.read_text() == before
    assert "linear: reference triton cuda torch (measured on H100, commit abc, 2026-01-01)" in capsys.readouterr().out
    assert written.main([str(tmp_path / "empty.zip"), "--device", "sm_90", "--update"]) == 1
    assert order.TABLE.read_text() == before, "nothing was measured, so nothing is written"
    written.main([*command, "--update"])
    order.table.cache_clear()
    found = {key: entry.backends for key, entry in order.table().items()}
    assert found == {
        ("sm_90", "linear"): ("reference", "triton", "cuda", "torch"),
        ("sm_90", "linear_qkv"): ("triton", "reference", "cuda", "torch"),
        ("sm_90", "linear_gelu"): ("triton", "reference", "cuda"),  # after what this device had
        ("sm_90", "ipot"): ("triton", "cuda"),
        ("sm_90", "sinkhorn"): ("cuda",),
        ("sm_80", "ipot"): ("cuda",),
        ("any", "any"): ("cuda", "triton", "torch", "reference"),
    }
    with pytest.raises(SystemExit):
        written.main([*command[:1], "--device", "any"])

"""The table of backends on GPUs: what the registry reads, and how a campaign writes it."""

import csv
import zipfile
from importlib import resources

import pytest
import torch

from benchmarks import table
from benchmarks.gpu import order as written
from benchmarks.gpu import variants
from vilt_fast import functional as functional  # which registers the ops
from vilt_fast import order
from vilt_fast.kernels import add_layer_norm, attention, attention_bwd, linear, linear_qkv, patch_embed
from vilt_fast.ops import _define, registry

SPLIT = "64x128 splits of 768"


@pytest.fixture
def an_order(tmp_path, monkeypatch):
    """A table of one's own: a function that writes it."""
    monkeypatch.setattr(order, "TABLE", tmp_path / "order.csv")

    def write(*rows):
        table.write(order.TABLE, [dict(zip(order.FIELDS, row, strict=True)) for row in rows], order.FIELDS)
        order.forget()

    yield write
    order.forget()


def test_the_committed_table_names_backends_and_ops_that_are_there():
    ops = {op for op, _ in registry._SLOTS}
    with resources.files("vilt_fast").joinpath("order.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert ("any", "any", "any") in order.table() and len(rows) == len(order.table())
    for row in rows:
        assert row["op"] == "any" or row["op"] in ops
        assert row["size"] == "any" or row["size"] in dict(order.SIZES)
        assert row["configuration"] == order.written(order.parsed(row["configuration"]))
        named = row["backends"].split()
        assert len(named) == len(set(named))
        assert set(named) <= {b for op, b in registry._SLOTS if row["op"] in ("any", op)}
        assert row["by"] == "a guess" or row["by"].startswith("measured on ")


def test_a_device_comes_before_any_and_an_op_too(an_order, monkeypatch):
    rows = [
        ("any", "any", "any", "triton reference", "", "1"), ("any", "linear", "any", "reference", "", "2"),
        ("sm_90", "any", "any", "cuda", "", "3"),
    ]  # fmt: skip
    an_order(*rows)
    assert order.entry("linear").by == "2" and order.entry("attention").by == "1"
    monkeypatch.setattr(order, "capability", lambda: "sm_90")
    an_order(*rows, ("sm_90", "attention", "any", "torch triton", "", "4"))
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
        ("any", "any", "any", "cuda triton torch reference", "", "a guess"),
        ("sm_90", "ipot", "any", "cuda", "", "an older run"), ("sm_90", "ipot", "few", "cuda", "", "an older run"),
        ("sm_90", "sinkhorn", "any", "cuda", "", "an older run"),
        ("sm_80", "ipot", "any", "cuda", "", "another device"),
        ("sm_90", "linear_gelu", "any", "reference cuda", "", "an older run"),
    )  # fmt: skip
    common = {"device": "H100", "commit": "abc", "date": "2026-01-01", "dtype": "bfloat16"}
    kernels = [
        ("linear out b64", "eager", 3), ("linear out b64", "ours", 2.5), ("linear fc2 b64", "eager", 3),
        ("linear fc2 b64", "ours", 4), ("linear out b1", "eager", 9), ("linear out b1", "ours", 1),
        ("linear_gelu b64", "eager", 2), ("linear_gelu b64", "ours", 1),
        ("linear_gelu b64", "ours 128x256 erf", 0.5),
        ("linear qkv b64", "eager", 2), ("linear qkv b64", "ours", 1), ("linear qkv b64", "eager one_product", 0.1),
        ("attention b64", "sdpa_padded", 1), ("attention b64", "ours", 2), ("attention b8", "ours", 2),
        ("attention b8", "ours online 64x64", 1),
        ("linear fc2 b8", "eager", 2), ("linear fc2 b8", "ours", 3), ("linear fc2 b8", f"ours {SPLIT}", 1),
    ]  # fmt: skip
    graphs = "ours_graphs_bfloat16"
    forwards = [
        ("b1", graphs, 1.0), ("b1", f"{graphs}_dependent", 0.99), ("b1", f"{graphs}_own", 0.99),
        ("b1", "hf_eager", 0.1),
        ("b8", graphs, 1.0), ("b8", f"{graphs}_own", 0.9), ("b8", f"{graphs}_own_dependent", 0.8),
    ]  # fmt: skip
    alignment = [("ipot full", "loop", 1), ("ipot full", "triton", 0.2), ("ipot full", "cuda", 0.3)]
    for name, rows, more in (
        ("kernels", kernels, {}), ("alignment", alignment, {"dtype": "float32"}), ("models_launches", forwards, {})
    ):  # fmt: skip
        columns = ("case", "provider", "p50_ms")
        rows = [common | more | dict(zip(columns, row, strict=True)) for row in rows]
        table.write(tmp_path / f"{name}.csv", rows, (*columns, *common))
    for archive, names in (("results", ("kernels.csv", "alignment.csv", "models_launches.csv")), ("empty", ())):
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
    found = {key: (" ".join(entry.backends), entry.configuration) for key, entry in order.table().items()}
    tiles = dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, PARTS=4, num_warps=8, num_stages=4, per_multiprocessor=1)
    waits = {"PDL": True}
    online = dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2, BLOCK_N2=0, SINGLE=False)
    assert found == {
        ("sm_90", "linear", "any"): ("reference triton cuda torch", {}),
        ("sm_90", "linear", "few"): ("triton reference cuda torch", {}),
        # Faster than the library as a variant; and in whole forwards of eight with more besides.
        ("sm_90", "linear", "some"): ("triton reference cuda torch", variants.VARIANTS["linear fc2"][SPLIT] | waits),
        ("sm_90", "linear_qkv", "some"): ("triton reference cuda torch", waits),
        ("sm_90", "linear_gelu", "some"): ("triton reference cuda", tiles | {"GELU": "erf"} | waits),
        ("sm_90", "add_layer_norm", "some"): ("cuda triton torch reference", waits),
        ("sm_90", "linear_qkv", "any"): ("triton reference cuda torch", {}),
        ("sm_90", "linear_gelu", "any"): ("triton reference cuda", tiles | {"GELU": "erf"}),  # after what there was
        ("sm_90", "attention", "any"): ("cuda triton torch reference", {}),  # of our backends one was timed
        ("sm_90", "attention", "some"): ("cuda triton torch reference", online),
        ("sm_90", "ipot", "any"): ("triton cuda", {}),
        ("sm_90", "sinkhorn", "any"): ("cuda", {}),
        ("sm_80", "ipot", "any"): ("cuda", {}),
        ("any", "any", "any"): ("cuda triton torch reference", {}),
    }
    with pytest.raises(SystemExit):
        written.main([*command[:1], "--device", "any"])


def test_calls_of_a_size_have_a_row_of_their_own(an_order, monkeypatch):
    rows = [
        ("any", "any", "any", "reference", "", "1"), ("sm_90", "linear", "any", "reference triton", "", "2"),
        ("sm_90", "linear", "few", "triton reference", "", "3"),
    ]  # fmt: skip
    monkeypatch.setattr(order, "capability", lambda: "sm_90")
    monkeypatch.setattr(registry, "_GPUS", {"cpu"})
    monkeypatch.setattr(registry, "why_unavailable", lambda *_: "")
    an_order(*rows)
    op = _define.OPS["linear"]

    def backend(*shape):
        given = dict(x=torch.zeros(shape, device="meta"), weight=torch.zeros(8, 8), bias=None, residual=None)
        facts = op._ask(op._facts, given | {"requires_grad": False})
        return registry.resolve("linear", None, facts)

    monkeypatch.setattr(registry, "_GPUS", {"meta"})
    assert [backend(512, 8), backend(2, 256, 8), backend(513, 8), backend(3, 200, 8)] == ["triton"] * 2 + [
        "reference"
    ] * 2
    monkeypatch.setattr(registry, "_GPUS", set())
    assert op._ask(op._facts, dict(
        x=torch.zeros(512, 8), weight=torch.zeros(8, 8), bias=None, residual=None, requires_grad=False
    )).size == "any"  # fmt: skip


def test_kernels_take_what_was_measured_for_what_it_was_measured_of(an_order):
    tiles = dict(BLOCK_M=32, BLOCK_N=32, num_warps=2, num_stages=1)
    single = order.written(tiles | dict(BLOCK_N2=32, SINGLE=True))
    an_order(
        ("any", "any", "any", "triton", "", "1"),
        ("sm_90", "linear_gelu", "many", "triton", "BLOCK_M=16 GELU=erf", "2"),
        ("sm_90", "linear_qkv", "any", "triton", "BLOCK_N=16", "3"),
        ("sm_90", "attention", "any", "triton", single, "4"),
        ("sm_90", "add_layer_norm", "few", "triton", "ROWS=2 num_warps=1", "5"),
        ("sm_90", "patch_embed", "any", "triton", "BLOCK_N=256 SPLITS=1", "6"),
        ("sm_90", "attention_bwd", "any", "triton", "SINGLE=False", "7"),
    )  # fmt: skip
    gelu = linear._config("tma", 13792, 3072, gelu=True)
    assert (gelu["BLOCK_M"], gelu["GELU"]) == (16, "erf")
    for other in (
        linear._config("tma", 185, 3072, gelu=True), linear._config("tma", 13792, 3072),
        linear._config("pointer", 13792, 3072, gelu=True), linear._config("tma", 13792, 3072, gelu=True, arch=100),
    ):  # fmt: skip
        assert other["BLOCK_M"] != 16
    assert linear_qkv._config("tma", 185, 768)["BLOCK_N"] == 16 != linear_qkv._config("float32", 185, 768)["BLOCK_N"]
    assert attention._forward_config(90, 2, 64, 60, 60, 12, 132)["BLOCK_M"] == 32
    whole = attention._forward_config(90, 2, 64, 65, 65, 12, 132)  # keys that its tiles do not hold
    assert whole["BLOCK_N"] + whole["BLOCK_N2"] >= 65
    assert attention._forward_config(90, 4, 64, 60, 60, 12, 132)["SINGLE"] is False
    assert attention_bwd._config(90, 2, 64, 281, 768, 132)["sample"] is None
    bf16, f32 = torch.bfloat16, torch.float32
    norms = [add_layer_norm.fwd_config(*call)["num_warps"] for call in (
        (185, 768, bf16, 90), (185, 768, f32, 90), (185, 4096, bf16, 90), (5000, 768, bf16, 90), (185, 768, bf16, 80),
    )]  # fmt: skip
    assert norms[0] == 1 and 1 not in norms[1:]
    assert patch_embed.fwd_config(9216, bf16, 90)["BLOCK_N"] == 256
    assert patch_embed.fwd_config(144, bf16, 90) == patch_embed.fwd_config(144, bf16, 80)  # partial sums there

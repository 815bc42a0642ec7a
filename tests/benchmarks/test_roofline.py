"""The roofline: floors computed by hand, and counts that agree with those of the timed benchmarks."""

import csv

import pytest
from transformers import ViltConfig

from benchmarks import cases, counts, ops, roofline, transport


def row(op, batch=1, device="A100"):
    return next(r for r in roofline.rows([batch]) if (r["op"], r["device"]) == (op, device))


def test_a_linear_layer_of_one_image_by_hand():
    """185 rows, 768 -> 3072, bfloat16: 0.873 GFLOP, (142,080 + 2,359,296 + 568,320) * 2 bytes; memory bound on A100."""
    found = row("linear_gelu")
    assert found["flops"] == 2 * 185 * 768 * 3072 == 872_939_520
    assert found["bytes"] == 2 * (142_080 + 2_359_296 + 568_320) == 6_139_392
    assert found["arithmetic_us"] == pytest.approx(2.79788, rel=1e-5)  # / 312 TFLOP/s
    assert found["memory_us"] == pytest.approx(3.01098, rel=1e-5)  # / 2.039 TB/s
    assert found["floor_us"] == found["memory_us"] and found["bound"] == "memory"
    assert found["forward_us"] == pytest.approx(12 * found["floor_us"])


def test_attention_of_one_image_by_hand():
    """185 rows, 12 heads of 64: 4 * 185^2 * 768 FLOP; q, k, v, out of 185 * 768 bfloat16."""
    found = row("attention", device="H100")
    assert (found["flops"], found["bytes"]) == (105_139_200, 1_136_640)
    assert found["floor_us"] == pytest.approx(1_136_640 / 3.35e6)
    backward = row("attention_bwd", device="H100")
    assert (backward["flops"], backward["bytes"]) == (262_848_000, 2_273_280)


def test_arithmetic_outside_the_tensor_cores_has_its_own_peak():
    work = counts.Work(products=1000, scalar=100, bytes=10)
    device = roofline.Device({"bfloat16": 1000.0, "float32": 10.0}, 5.0)
    assert roofline.seconds(work, device) == (10.0, 2.0)
    assert roofline.seconds(work._replace(scalar=0), device) == (1.0, 2.0)
    assert work.flops == 1100


def test_a_large_batch_is_bound_by_arithmetic():
    assert row("linear_gelu", 64)["bound"] == "arithmetic"
    assert row("linear_gelu", 64)["floor_us"] == row("linear_gelu", 64)["arithmetic_us"]


def test_a_forward_is_the_sum_of_its_ops_and_never_under_the_fused_one():
    for device in roofline.DEVICES:
        for batch in roofline.BATCHES:
            mine = [r for r in roofline.rows([batch]) if r["device"] == device]
            *parts, whole, fused = mine
            assert whole["op"] == "forward, op by op" and fused["op"] == "forward, fused"
            assert whole["floor_us"] == pytest.approx(sum(r["calls"] * r["floor_us"] for r in parts))
            assert whole["flops"] == sum(r["calls"] * r["flops"] for r in parts)
            assert whole["floor_us"] > fused["floor_us"] > 0


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_the_products_of_all_ops_are_the_flops_of_a_forward(batch):
    case = counts.batch(batch)
    products = sum(calls * work.products for calls, work in counts.ops(case).values())
    assert (
        products == counts.forward(case).products == cases.flops(*cases.work(case, ViltConfig(), False), ViltConfig())
    )


def test_weights_of_a_fused_forward():
    """12 layers of 12 D^2 and the projection of 3,072 inputs, two bytes each."""
    assert counts.forward(counts.batch(8)).bytes == 2 * (12 * 12 * 768**2 + 3072 * 768)


def test_batches_are_home_ground():
    assert counts.batch(8)[1:] == cases.CASES["b8"][1:]
    assert counts.batch(1) is cases.CASES["b1"]
    assert sum(counts.batch(64).lengths()) == 8 * 1724
    assert sum(counts.batch(12).lengths()) == 1724 + sum(counts.batch(8).lengths()[:4])


def test_counts_are_those_of_the_timed_benchmarks():
    """The same op, shape and dtype: the same FLOPs and bytes in every CSV."""
    for _, _, _, _, flops, moved in ops._linear_groups("bfloat16"):
        rows = flops // (2 * 768 * 3072)
        assert (flops, moved) == (counts.linear(rows, 768, 3072).flops, counts.linear(rows, 768, 3072).bytes)
    for name, _, _, _, flops, moved in ops._attention_groups("bfloat16"):
        work = counts.attention(cases.CASES[name].lengths())
        assert (flops, moved) == (work.flops, work.bytes)
    words, patches = transport.lengths("mixed")
    *_, flops, moved = transport._ipot(words, patches)
    assert (flops, moved) == (counts.ipot(words, patches).flops, counts.ipot(words, patches).bytes)


def test_the_command_writes_a_table_a_csv_and_a_plot(tmp_path, capsys):
    out = tmp_path / "roofline.csv"
    assert roofline.main(["--out", str(out), "--batches", "1", "2"]) == 0
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == roofline.FIELDS
    assert len(rows) == 3 * 2 * (len(counts.ops(counts.batch(1))) + 2)
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "forward, fused" in said and "H200, us" in said
    with pytest.raises(SystemExit):
        roofline.main(["--batches", "0"])

"""The benchmarks: what the cases hold, what a row holds, one tiny run end to end."""

import csv

import pytest
import torch
from transformers import ViltConfig, ViltModel

from benchmarks import cases, measure, ops, plot, providers, run
from vilt_fast.commands import report
from vilt_fast.commands.samples import token_counts

CONFIG = ViltConfig()


def test_the_mixed_batch_is_the_one_of_the_baselines():
    case = cases.CASES["b8"]
    assert sum(case.lengths()) == 1724
    assert case.padded_length() * case.batch == 2248


@pytest.mark.parametrize("name", list(cases.CASES))
def test_inputs_match_the_case(name):
    case = cases.CASES[name]
    inputs = cases.inputs(case, CONFIG)
    assert token_counts(inputs, CONFIG) == (sum(case.lengths()), case.padded_length() * case.batch)
    assert all(min(size) == 384 and max(size) <= 640 and size[0] % 32 == size[1] % 32 == 0 for size in case.sizes)
    assert torch.equal(inputs["pixel_values"], cases.inputs(case, CONFIG)["pixel_values"])
    assert not inputs["pixel_values"][inputs["pixel_mask"][:, None].expand_as(inputs["pixel_values"]) == 0].any()


def test_counted_work():
    assert cases.flops([185], [144], CONFIG) == pytest.approx(33.4e9, rel=0.02)
    packed = cases.work(cases.CASES["b8"], CONFIG, padded=False)
    padded = cases.work(cases.CASES["b8"], CONFIG, padded=True)
    assert sum(packed[0]) == 1724
    assert padded[0] == [281] * 8
    assert cases.flops(*padded, CONFIG) > 1.3 * cases.flops(*packed, CONFIG)


def test_quantiles_and_interleaving():
    assert report.quantiles([3.0]) == (3.0, 3.0, 3.0)
    assert report.quantiles([float(i) for i in range(11)]) == pytest.approx((2.0, 5.0, 8.0))
    order = []
    times = report.interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert [len(v) for v in times.values()] == [3, 3]


def test_floor_is_the_slower_of_arithmetic_and_memory():
    assert measure.floor_seconds(10, 1, 5, 1) == 2
    assert measure.floor_seconds(1, 10, 5, 1) == 10
    assert measure.floor_seconds(1, 10, None, 1) == 10


def test_providers_are_chosen_by_dtype(monkeypatch):
    monkeypatch.setattr(providers, "unavailable", lambda dtype: "")
    assert [p.name for p in providers.chosen(["int8"], peers=False)] == ["hf_eager", "ours_int8"]
    assert len(providers.chosen(report.PRECISIONS, peers=False)) == 5
    monkeypatch.setattr(providers, "unavailable", lambda dtype: "no" if dtype == "int8" else "")
    assert "ours_int8" not in [p.name for p in providers.chosen(report.PRECISIONS, peers=True)]


@pytest.fixture
def tiny(monkeypatch):
    """One small case and model in place of the real ones."""
    small = cases.Case("small", ((96, 64), (64, 64)), (6, 3))
    monkeypatch.setitem(cases.CASES, "small", small)
    model = ViltModel(
        ViltConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=1,
            intermediate_size=128,
            image_size=64,
            vocab_size=200,
        )
    ).eval()
    monkeypatch.setattr(run, "_trunk", lambda: model)
    monkeypatch.setattr(measure, "best_of", lambda call, seconds=0: (call(), 1e-3)[1])


def test_a_run_writes_every_column(tiny, tmp_path, capsys):
    out = tmp_path / "model.csv"
    assert run.main(["model", "--cases", "small", "--repeats", "2", "--out", str(out)]) == 0
    assert "ours_float32" in capsys.readouterr().out
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["provider"] for row in rows] == [p.name for p in providers.chosen(report.PRECISIONS, peers=False)]
    assert tuple(rows[0]) == run.FIELDS
    optional = {"peak_mib", "forward_mib", "peak_gflops", "commit"}
    assert all(row[field] for row in rows for field in run.FIELDS if field not in optional)
    assert float(rows[0]["ratio"]) == 1
    assert float(rows[0]["error"]) < 1e-5
    by_name = {row["provider"]: row for row in rows}
    assert int(by_name["ours_float32"]["flops"]) < int(by_name["hf_eager"]["flops"])
    plot.draw(plot.read(out), tmp_path / "model.png")
    assert (tmp_path / "model.png").read_bytes().startswith(b"\x89PNG")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- figures -->\nold\n<!-- /figures -->\nafter\n")
    for _ in range(2):
        assert plot.main([str(out), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- figures -->\n| | small: b2 6 text + 96x64 | error |")
    assert text.endswith("\n<!-- /figures -->\nafter\n")
    assert "old" not in text
    assert "| HuggingFace float32 | 1.00 (" in text


def test_the_readme_has_a_place_for_figures():
    text = (measure.ROOT / "README.md").read_text()
    assert "| a | b |" in plot.put(text, "| a | b |")
    with pytest.raises(ValueError, match="exactly one"):
        plot.put("no marks", "")


@pytest.mark.parametrize("subject", ops.SUBJECTS)
def test_kernel_rows(subject, tiny, tmp_path, monkeypatch):
    for name, value in {"WIDTH": 128, "FEATURES": 256, "HEADS": 2}.items():
        monkeypatch.setattr(ops, name, value)
    monkeypatch.setitem(cases.CASES, "b1", cases.CASES["small"])
    monkeypatch.setitem(cases.CASES, "b8", cases.CASES["small"])
    out = tmp_path / "rows.csv"
    assert run.main([subject, "--dtypes", "float32", "--repeats", "2", "--out", str(out)]) == 0
    rows = plot.read(out)
    assert {row["provider"] for row in rows} >= {"hf_layer" if subject == "block" else "torch", "ours"}
    assert all(float(row["error"]) < 1e-5 for row in rows)


def test_bad_arguments(capsys):
    with pytest.raises(SystemExit):
        run.main(["model", "--repeats", "0"])
    with pytest.raises(SystemExit):
        plot.main(["/nowhere.csv"])
    assert "benchmarks.run model" in capsys.readouterr().err

"""The benchmarks: what the cases hold, what a row holds, one tiny run end to end."""

import contextlib
import csv
import io
import os
import subprocess

import pytest
import torch
from transformers import ViltConfig, ViltForQuestionAnswering, ViltModel

from benchmarks import (
    cases,
    destination,
    host,
    image_error,
    images,
    measure,
    ops,
    plot,
    providers,
    run,
    table,
    training,
)
from vilt_fast.commands import checkpoint, report
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
    last = cases.flops([185], [144], ViltConfig(num_hidden_layers=1)) - cases.flops(
        [185], [144], ViltConfig(num_hidden_layers=0)
    )
    assert cases.flops([185], [144], CONFIG, read=185) - cases.flops([185], [144], CONFIG) == 4 * 185 * 768 * (1 - 185)
    saved = cases.flops([185], [144], CONFIG) - cases.flops([185], [144], CONFIG, read=1)
    assert saved / last == pytest.approx(10 / 12, abs=0.03)  # all but keys and values


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


def test_peers_appear_where_their_packages_are(monkeypatch):
    monkeypatch.setattr(providers, "unavailable", lambda dtype: "")
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: object())
    names = [p.name for p in providers.chosen(report.PRECISIONS, peers=True)]
    assert names == [*providers.PROVIDERS, *providers.PEERS] and set(names) == set(plot.NAMES)
    assert len(set(plot.NAMES.values())) == len(plot.NAMES)
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: None if name == "onnx" else object())
    assert set(names) - {p.name for p in providers.chosen(report.PRECISIONS, peers=True)} == {"onnxruntime_int8"}
    assert providers.lacking(providers.PEERS["onnxruntime_int8"]) == ["onnx"]


def test_samples_one_by_one_are_what_the_batch_holds():
    case = cases.CASES["b8"]
    for sample, (height, width), text in zip(
        providers._samples(cases.inputs(case, CONFIG)), case.sizes, case.texts, strict=True
    ):
        assert sample["pixel_values"].shape == (1, 3, height, width) and sample["input_ids"].shape == (1, text)
        assert sample["pixel_mask"].all() and sample["attention_mask"].all()


def test_providers_are_chosen_by_dtype(monkeypatch):
    monkeypatch.setattr(providers, "unavailable", lambda dtype: "")
    assert [p.name for p in providers.chosen(["int8"], peers=False)] == ["hf_eager", "ours_int8"]
    assert len(providers.chosen(report.PRECISIONS, peers=False)) == 5
    monkeypatch.setattr(providers, "unavailable", lambda dtype: "no" if dtype == "int8" else "")
    assert "ours_int8" not in [p.name for p in providers.chosen(report.PRECISIONS, peers=True)]


@pytest.fixture
def tiny(monkeypatch, tmp_path):
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
    monkeypatch.setattr(run, "_trunk", lambda checkpoint=None: model)
    monkeypatch.setattr(destination, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(destination, "NEW", tmp_path / "new")
    monkeypatch.setattr(measure, "best_of", lambda call, seconds=0: (call(), 1e-3)[1])


def test_a_training_step_of_each_kind(tiny, tmp_path, monkeypatch):
    small = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=128, image_size=64)
    monkeypatch.setattr(training, "CASE", cases.CASES["small"])
    monkeypatch.setattr(training, "config", lambda p: ViltConfig(**small, vocab_size=200, hidden_dropout_prob=p))
    out = tmp_path / "train.csv"
    assert run.main(["train", "--repeats", "1", "--dtypes", "float32", "bfloat16", "--out", str(out)]) == 0
    rows = {(row["provider"], row["dtype"], row["case"]): row for row in table.read(out)}
    assert len(rows) == 8
    for (provider, dtype, case), row in rows.items():
        assert ("cpp" if provider == "ours" else "torch") in row["backend"]
        if case.endswith("dropout 0.0"):
            assert 0 < float(row["error"]) < (1e-4 if dtype == "float32" else 0.1)
        else:
            assert not row["error"]


def test_the_memory_of_a_training_step(quiet, tmp_path, monkeypatch, capsys):
    """What the process of each is told is what this one can do, and a failure there is no empty column and success."""
    small = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=128, image_size=64)
    monkeypatch.setattr(training, "CASE", cases.CASES["small"])
    monkeypatch.setattr(training, "config", lambda p: ViltConfig(**small, vocab_size=200, hidden_dropout_prob=p))
    monkeypatch.setattr(run, "_trunk", lambda name=None: pytest.fail("a model that the step does not use"))
    process = subprocess.run

    def within(command, **options):
        if "memory" not in command:
            return process(command, **options)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            status = run.main(command[command.index("memory") :])
        return subprocess.CompletedProcess(command, status, out.getvalue(), "")

    monkeypatch.setattr(subprocess, "run", within)
    out = tmp_path / "train.csv"
    command = ["train", "--memory", "--repeats", "1", "--dtypes", "float32", "--out", str(out)]
    assert run.main(command) == 0
    rows = table.read(out)
    assert len(rows) == 4 and all(float(row["peak_mib"]) > float(row["forward_mib"]) >= 0 for row in rows)

    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nValueError: of three cases")
    monkeypatch.setattr(
        subprocess, "run", lambda command, **o: failed if "memory" in command else process(command, **o)
    )
    assert run.main([*command[:-1], str(tmp_path / "other.csv")]) == 1
    told = capsys.readouterr().err
    assert "The memory of ours_float32_dropout_0.1 cannot be measured: ValueError: of three cases" in told
    assert "No memory was measured of: hf_eager, ours" in told


def test_a_run_writes_every_column(tiny, tmp_path, capsys):
    out = tmp_path / "model.csv"
    assert run.main(["model", "--cases", "small", "--repeats", "2", "--out", str(out)]) == 0
    assert "ours_float32" in capsys.readouterr().out
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["provider"] for row in rows] == [p.name for p in providers.chosen(report.PRECISIONS, peers=False)]
    assert tuple(rows[0]) == table.FIELDS
    optional = {"peak_mib", "forward_mib", "peak_gflops", "commit"}
    assert all(row[field] for row in rows for field in table.FIELDS if field not in optional)
    backends = {row["provider"]: row["backend"].split() for row in rows}
    assert backends["hf_eager"] == ["torch"] and all("cpp" in b for p, b in backends.items() if p.startswith("ours"))
    assert float(rows[0]["ratio"]) == 1
    assert float(rows[0]["error"]) < 1e-5
    by_name = {row["provider"]: row for row in rows}
    assert int(by_name["ours_float32"]["flops"]) < int(by_name["hf_eager"]["flops"])
    plot.draw(table.read(out), tmp_path / "model.png")
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


def test_a_model_with_a_head_is_counted_by_what_that_reads(tiny, tmp_path, monkeypatch):
    model = ViltForQuestionAnswering(run._trunk().config).eval()
    monkeypatch.setattr(checkpoint, "random_vqa", lambda: model)
    rows = {}
    for what in ("model", "vqa"):
        out = tmp_path / f"{what}.csv"
        command = [what, "--cases", "small", "--dtypes", "float32", "--repeats", "1", "--out", str(out)]
        assert run.main(command) == 0
        rows[what] = {row["provider"]: row for row in table.read(out)}
    trunk, whole = rows["model"], rows["vqa"]
    assert list(whole) == ["hf_eager", "ours_float32"] and {r["subject"] for r in whole.values()} == {"vqa"}
    assert whole["hf_eager"]["flops"] == trunk["hf_eager"]["flops"]
    assert int(whole["ours_float32"]["flops"]) < int(trunk["ours_float32"]["flops"])
    assert 0 < float(whole["ours_float32"]["error"]) < 1e-5
    assert whole["ours_float32"]["error"] != trunk["ours_float32"]["error"]  # of the logits


def test_images_from_the_jpeg_to_the_answer(tiny, tmp_path, monkeypatch):
    """Exact pixels are HuggingFace's; the error of the fast ones is told."""
    monkeypatch.setattr(images, "PHOTOGRAPHS", {"480p": ((1300, 1600),), "b2": ((100, 90), (90, 120))})
    model = ViltForQuestionAnswering(run._trunk().config).eval()
    monkeypatch.setattr(checkpoint, "random_vqa", lambda: model)
    out = tmp_path / "images.csv"
    assert run.main(["images", "--repeats", "1", "--out", str(out)]) == 0
    rows = {(row["case"], row["provider"]): row for row in table.read(out)}
    providers_of = ["hf", "hf_processor_ours_int8", "ours", "ours_fast"]
    assert [p for c, p in rows if c == "480p_answer"] == providers_of and len(rows) == 10
    assert float(rows["480p_pixels", "ours"]["error"]) == 0 < float(rows["480p_pixels", "ours_fast"]["error"]) < 0.05
    answered = {p: float(rows["480p_answer", p]["error"]) for p in providers_of}
    assert answered["hf"] < 1e-5 < answered["ours"] == answered["hf_processor_ours_int8"] != answered["ours_fast"]
    assert rows["480p_answer", "ours"]["shape"] == "b1 1300x1600" and float(rows["480p_answer", "ours"]["floor_ms"]) > 0


def test_the_error_of_images_decoded_fast(tiny, tmp_path):
    model = run._trunk().double()
    rows, found = image_error.differences(model, [*image_error.photographs(((1200, 1300),), ("astronaut",))])
    assert [row["result"] for row in rows] == ["384x416", "128x128"]
    for row in rows:
        assert 0 < row["mean"] < row["p99"] < row["max"] == abs(found[row["photograph"]]).max()
        assert 1e-9 < row["pooled_error"] < 1
    image_error.draw(found, tmp_path / "error.png")
    assert (tmp_path / "error.png").read_bytes().startswith(b"\x89PNG")


def test_the_readme_has_a_place_for_figures():
    figures = plot.markdown(table.read(measure.ROOT / "benchmarks" / "results" / "model.csv"))
    assert figures in plot.put((measure.ROOT / "README.md").read_text(), figures)
    with pytest.raises(ValueError, match="exactly one"):
        plot.put("no marks", "")


def test_a_part_of_the_figures_drops_nothing_of_the_readme(tmp_path, capsys):
    whole = table.read(measure.ROOT / "benchmarks" / "results" / "model.csv")
    text = plot.put("<!-- figures --><!-- /figures -->", plot.markdown(whole))
    assert plot.put(text, plot.markdown(whole)) == text
    for what, part in (
        ("b8", [row for row in whole if row["case"] != "b8"]),
        ("vilt_fast int8", [row for row in whole if row["provider"] != "ours_int8"]),
    ):
        with pytest.raises(ValueError, match=f"has {what}, which these figures have not"):
            plot.put(text, plot.markdown(part))
    table.write(tmp_path / "part.csv", part, list(part[0]))
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path / "part.csv"), "--readme", str(tmp_path / "README.md")])
    assert "empty the space between the marks" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == text and not (tmp_path / "part.png").exists()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def quiet(tiny, monkeypatch):
    """A machine of which nothing is asked and that nobody else uses."""
    monkeypatch.setattr(measure, "machine", lambda dtypes, step: dict.fromkeys([*dtypes, "copy"], 1e9))
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0.1, 0.1))


def refused(capsys, main, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_without_the_native_part_nothing_is_measured(capsys, monkeypatch, quiet):
    from vilt_fast.ops import registry

    monkeypatch.setattr(registry, "why_unavailable", lambda op, backend, *rest, **some: "it is not built.")
    for main, what in ((run.main, ["model"]), (run.main, ["transport"]), (run.main, ["block"]), (host.main, [])):
        for more in ([], ["--update"]):
            assert "run: pip install -e ." in refused(capsys, main, *what, *more)


def test_committed_figures_want_a_quiet_machine_and_to_be_named(capsys, monkeypatch, quiet):
    committed = destination.RESULTS / "model.csv"
    common = ["model", "--cases", "small", "--dtypes", "float32", "--repeats", "1"]
    assert run.main([*common, "--update"]) == 0
    assert len(table.read(committed)) == 2
    assert "pass --update" in refused(capsys, run.main, *common, "--out", str(committed))
    assert "one of them" in refused(capsys, run.main, *common, "--update", "--out", "x.csv")
    assert "leave --model" in refused(capsys, run.main, "model", "--update", "--shapes", "64x64+3")
    monkeypatch.setattr(os, "getloadavg", lambda: (3.0, 0.1, 0.1))
    assert "load average is 3.0" in refused(capsys, run.main, *common, "--update")
    assert "load average is 3.0" in refused(capsys, host.main, "--update")
    assert run.main(common) == 0
    (new,) = destination.NEW.iterdir()
    assert "load average is 3.0" in capsys.readouterr().err
    assert "name another" in refused(capsys, run.main, *common, "--out", str(new))


def test_fewer_rows_do_not_replace_the_committed_ones(tiny, capsys):
    committed = destination.RESULTS / "model.csv"
    rows = [{"provider": p, "case": "b1", "dtype": "float32"} for p in ("hf_eager", "ours_float32", "openvino_f32")]
    assert destination.put(committed, rows, run.KEYS, run.KEYS) == 0
    assert destination.put(committed, rows[:2], run.KEYS, run.KEYS) == 1
    assert "openvino_f32 b1 float32" in capsys.readouterr().err
    assert table.read(committed) == rows
    assert [table.read(path) for path in destination.NEW.iterdir()] == [rows[:2]]
    assert destination.put(committed, [], run.KEYS, run.KEYS) == 2
    assert table.read(committed) == rows


def test_ones_own_shapes_and_model(quiet, tmp_path, capsys, monkeypatch):
    asked, real = [], run._trunk
    monkeypatch.setattr(run, "_trunk", lambda checkpoint=None: (asked.append(checkpoint), real())[1])
    options = ["--repeats", "1", "--dtypes", "float32", "--model", "mine", "--shapes", "64x96+6", "40x64+3"]
    assert run.main(["model", *options, "--out", str(tmp_path / "own.csv")]) == 0
    rows = table.read(tmp_path / "own.csv")
    assert {(r["case"], r["shape"], r["model"]) for r in rows} == {("own", "b2 6 text + 64x96", "mine")}
    assert asked == ["mine"] and all(float(row["error"]) < 1e-5 for row in rows)
    for shape in ("64", "64x8+1", "64x64+0", "64x64+41", "64x64", "64x64+3+4", "9" * 40):
        assert run.main(["model", "--repeats", "1", "--shapes", shape]) == 2
        assert f"{shape}: expected HEIGHTxWIDTH+TEXT" in capsys.readouterr().err


def test_a_peer_that_breaks_is_left_out(quiet, tmp_path, capsys, monkeypatch):
    def broken(model):
        raise RuntimeError("no compiler\nand more")

    peer = providers.Provider("compile_float32", "float32", True, 4, 4, broken, "inductor")
    monkeypatch.setattr(providers, "PEERS", {peer.name: peer})
    options = ["--cases", "small", "--repeats", "1", "--dtypes", "float32", "--peers", "--out", str(tmp_path / "o.csv")]
    assert run.main(["model", *options]) == 0
    assert "compile_float32 is left out: RuntimeError: no compiler" in capsys.readouterr().err
    assert [row["provider"] for row in table.read(tmp_path / "o.csv")] == ["hf_eager", "ours_float32"]


@pytest.mark.parametrize("arguments, message", [
    (["model", "--repeats", "0"], "from 1 to"),
    (["model", "--repeats", str(10**12)], "from 1 to"),
    (["model", "--threads", "-1"], "from 1 to"),
    (["transport", "--dtypes", "float32"], "--dtypes does nothing for transport"),
    (["block", "--peers"], "--peers does nothing for block; it is for model."),
    (["linear", "--cases", "b1"], "--cases does nothing for linear"),
    (["attention", "--memory"], "--memory does nothing"),
    (["block", "--model", "x"], "--model does nothing"),
    (["model", "--provider", "hf_eager"], "--provider does nothing"),
    (["linear", "--dtypes", "int8"], "has no int8 rows"),
])  # fmt: skip
def test_options_that_do_nothing_are_errors(arguments, message, capsys):
    assert message in refused(capsys, run.main, *arguments)


@pytest.mark.parametrize("subject", ops.SUBJECTS)
def test_kernel_rows(subject, tiny, tmp_path, monkeypatch):
    for name, value in {"WIDTH": 128, "FEATURES": 256, "HEADS": 2}.items():
        monkeypatch.setattr(ops, name, value)
    monkeypatch.setitem(cases.CASES, "b1", cases.CASES["small"])
    monkeypatch.setitem(cases.CASES, "b8", cases.CASES["small"])
    out = tmp_path / "rows.csv"
    assert run.main([subject, "--dtypes", "float32", "--repeats", "2", "--out", str(out)]) == 0
    rows = table.read(out)
    assert {row["backend"] for row in rows if row["provider"] == "ours"} == {"cpp"}
    assert {row["provider"] for row in rows} >= {"hf_layer" if subject == "block" else "torch", "ours"}
    assert all(float(row["error"]) < 1e-5 for row in rows)


def test_a_csv_that_cannot_be_drawn(tmp_path, capsys):
    assert "benchmarks.run model" in refused(capsys, plot.main, "/nowhere.csv")
    (tmp_path / "empty.csv").write_text(",".join(table.FIELDS) + "\n")
    assert "no rows of a model" in refused(capsys, plot.main, str(tmp_path / "empty.csv"))

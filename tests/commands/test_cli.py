"""The command line: info, check with each exit status, demo on a tiny model."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vilt_fast
from vilt_fast import commands as cli
from vilt_fast.commands import checkpoint, demo, report, samples
from vilt_fast.ops import registry

ROOT = Path(__file__).parents[2]
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "intermediate_size": 128,
    "image_size": 128,
    "patch_size": 32,
    "vocab_size": 1200,
}


def tiny(name="ViltForQuestionAnswering", **extra):
    """A random ViLT of one head of 64, weights drawn wide (std 0.3) so that nothing is hidden by zeros."""
    import transformers

    config = transformers.ViltConfig(**TINY, **extra)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3 if parameter.dim() == 1 else 0.3 / parameter.shape[-1] ** 0.25)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny(num_labels=7).save_pretrained(folder)
    return str(folder)


def test_info(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setenv("COLUMNS", "70")
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 70 or str(Path(vilt_fast.__file__).parent) in shown
    for word in ("torch", torch.__version__.split("+")[0], "attention", "reference", "NVML"):
        assert word in shown or word == "NVML" and "driver" in shown


def test_info_as_json(capsys):
    from vilt_fast.commands import info

    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert [(b["backend"], ", ".join(b["ops"]), b["reason"] or "yes") for b in found["backends"]] == info.backends()
    assert all(b["runs"] == (b["reason"] == "") for b in found["backends"])


def test_version_and_module():
    done = subprocess.run(
        [sys.executable, "-m", "vilt_fast", "--version"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == f"vilt-fast {vilt_fast.__version__}\n"


def test_a_reader_that_has_seen_enough(monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert cli.main(["info", "--json"]) == 1


def test_an_instruction_set_that_is_not_there(capsys, monkeypatch):
    from vilt_fast import _C

    isas = _C.cpu_features()["isas"]
    monkeypatch.setenv("VILT_FAST_CPU_ISA", "avx1024")
    assert cli.main(["info"]) == cli.main(["check", "anything"]) == 2
    said = capsys.readouterr().err
    assert "'avx1024'" in said and ", ".join(isas) in said


def test_every_backend_is_listed_with_a_reason():
    from vilt_fast.commands import info

    rows = info.backends()
    runs = {(op, backend) for backend, ops, reason in rows if reason == "yes" for op in ops.split(", ")}
    assert {("attention", "reference"), ("encoder", "reference")} <= runs
    assert all(reason and ops for _, ops, reason in rows)
    listed = {op for _, ops, _ in rows for op in ops.split(", ")}
    assert {op for op, _, _ in registry.availability() if not op.endswith("_bwd")} == listed


def test_check_passes(saved, capsys):
    assert cli.main(["check", saved, "--batch", "3"]) == 0
    shown = capsys.readouterr().out
    assert "OVER" not in shown
    for word in ("last_hidden_state", "pooler_output", "logits", *report.PRECISIONS):
        assert word in shown


def test_check_as_json(saved, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr(report, "unavailable", lambda p: "no native part" if p == "int8" else "")
    real = report.parity
    monkeypatch.setattr(report, "parity", lambda *args: [line._replace(max_error=float("nan")) for line in real(*args)])
    assert cli.main(["check", saved, "--batch", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["class"], found["ok"], found["left_out"]) == (
        "ViltForQuestionAnswering", True, {"int8": "no native part"},
    )  # fmt: skip
    assert {row["dtype"] for row in found["outputs"]} == {"float32", "bfloat16"}
    assert all(row["error"] <= row["allowed"] and row["ok"] and row["largest"] is None for row in found["outputs"])
    monkeypatch.setattr(report, "parity", lambda *args: [line._replace(error=float("nan")) for line in real(*args)])
    assert cli.main(["check", saved, "--batch", "2", "--json", "--dtype", "float32"]) == 1
    assert not json.loads(capsys.readouterr().out)["ok"]


def test_check_says_when_int8_cannot_run_here(saved, capsys, monkeypatch):
    monkeypatch.setattr(report, "unavailable", lambda p: "no native part [x]." if p == "int8" else "")
    assert cli.main(["check", saved, "--batch", "2"]) == 0
    assert "int8 is left out: no native part [x]." in capsys.readouterr().out
    assert cli.main(["check", saved, "--dtype", "int8"]) == 2
    assert "no native part" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("ViltModel", {}),
        ("ViltForMaskedLM", {}),
        ("ViltForImagesAndTextClassification", {"num_images": 2, "num_labels": 2}),
    ],
)
def test_check_other_tasks(name, extra, tmp_path, capsys):
    tiny(name, **({"modality_type_vocab_size": 3} | extra if extra else {})).save_pretrained(tmp_path)
    assert cli.main(["check", str(tmp_path), "--dtype", "float32", "--batch", "2"]) == 0
    assert name in capsys.readouterr().out


def test_check_fails_on_a_broken_model(saved, capsys, monkeypatch):
    real = vilt_fast.accelerate

    def broken(model, **options):
        with torch.no_grad():
            report.trunk(model).layernorm.bias += 0.1
        return real(model, **options)

    monkeypatch.setattr(vilt_fast, "accelerate", broken)
    assert cli.main(["check", saved, "--dtype", "float32", "--batch", "2"]) == 1
    shown = capsys.readouterr().out
    assert "OVER" in shown
    assert "Over budget: last_hidden_state in float32" in shown


def test_check_wants_a_vilt(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    assert cli.main(["check", str(tmp_path)]) == 2
    assert "'bert' model" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vilt"}))
    assert cli.main(["check", str(tmp_path)]) == 2
    assert "--task" in capsys.readouterr().err
    assert cli.main(["check", str(tmp_path), "--task", "vqa"]) == 2
    assert "cannot load ViltForQuestionAnswering" in capsys.readouterr().err


def damaged(folder, damage):
    """Spoil the checkpoint in `folder` in one way."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    old = folder / "pytorch_model.bin"
    if isinstance(damage, dict):
        config.write_text(json.dumps(json.loads(config.read_text()) | damage))
    elif damage == "cut off":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif damage == "header":
        weights.write_bytes(b"12345")
    elif damage == "json":
        config.write_text("{")
    else:
        weights.unlink()
        if damage == "pickle":
            old.write_bytes(pickle.dumps({"weight": print}))
        elif damage == "old, cut off":
            torch.save({"weight": torch.ones(100)}, old)
            old.write_bytes(old.read_bytes()[:300])


@pytest.mark.parametrize("damage, message", [
    ("cut off", "fetch the weights again"),
    ("header", "fetch the weights again"),
    ("json", "not a valid JSON"),
    ("no weights", "no file named"),
    ("pickle", "can run any program"),
    ("old, cut off", "PytorchStreamReader"),
    ({"hidden_size": 10**12}, "says hidden_size = 1000000000000; expected 1 to 1048576"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"num_attention_heads": 0}, "num_attention_heads = 0"),
    ({"hidden_size": "wide"}, "hidden_size"),
    ({"hidden_act": "none such"}, "none such"),
    ({"architectures": 5}, "--task"),
    ({"dtype": "float1"}, "float1"),
])  # fmt: skip
def test_damaged_checkpoints_are_named_not_traced(saved, tmp_path, damage, message, capsys):
    folder = tmp_path / "a[/x]b"
    shutil.copytree(saved, folder)
    damaged(folder, damage)
    assert cli.main(["check", str(folder)]) == 2
    said = capsys.readouterr().err
    assert message in "".join(said.splitlines()[-2:]) and str(folder) in said


def test_where_a_checkpoint_is(saved, tmp_path, capsys, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "file").write_text("")
    for given in (
        str(tmp_path / "none"),
        "./none",
        "~/none-such",
        "a//b",
        "tests/none",
        "a/b/c",
        str(tmp_path / "file"),
    ):
        monkeypatch.chdir(ROOT)
        assert cli.main(["check", given]) == 2
        said = capsys.readouterr().err
        assert repr(given) in said and ("there is no folder" in said or "is a file" in said)
    assert checkpoint._found("someone/vilt-b32") == "someone/vilt-b32"
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "none-such").mkdir()
    assert checkpoint._found("~/none-such") == str(tmp_path / "none-such")


def test_names_that_look_like_markup(saved, tmp_path, capsys):
    folder = tmp_path / "a[/x]b"
    shutil.copytree(saved, folder)
    assert cli.main(["check", str(folder), "--dtype", "float32", "--batch", "1"]) == 0
    assert demo.run(str(folder), folder / "demo", count=2, repeats=1)
    assert "a[/x]b" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["check"],
        ["check", "x", "--dtype", "float16"],
        ["check", "x", "--batch", "0"],
        ["check", "x", "--batch", str(10**12)],
        ["check", "x", "--threads", "100000"],
        ["check", "x", "--seed", "9" * 5000],
        ["demo", "--repeats", "-1"],
        ["demo", "--repeats", "many"],
        ["info", "--what"],
    ],
)
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_demo_writes_report_and_picture(tmp_path, capsys):
    assert demo.run(out=tmp_path, count=3, repeats=1, model=tiny(num_labels=5))
    shown = capsys.readouterr().out
    assert "Parity" in shown
    assert "Speed" in shown
    text = (tmp_path / "report.md").read_text()
    assert "vilt_fast, bfloat16" in text and "HuggingFace, bfloat16" in text
    assert "| last_hidden_state | float32 |" in text
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_sizes_and_tokens_of_the_photographs():
    config = checkpoint.require_transformers().ViltConfig()
    inputs = samples.model_inputs(config, samples.scenes())
    heights, widths = inputs["pixel_mask"][:, :, 0].sum(1), inputs["pixel_mask"][:, 0].sum(1)
    assert (torch.minimum(heights, widths) >= 320).all()
    assert (torch.maximum(heights, widths) <= 640).all()
    assert not (heights % 32).any()
    assert len(set(zip(heights.tolist(), widths.tolist(), strict=True))) >= 4
    lengths = inputs["attention_mask"].sum(1)
    assert lengths.min() < 10
    assert 30 < lengths.max() <= 40
    real, padded = samples.token_counts(inputs, config)
    patches = (heights // 32) * (widths // 32)
    assert real == int((lengths + 1 + patches).sum())
    assert padded == 8 * int(lengths.max() + 1 + patches.max())


def test_a_checkpoint_brings_its_own_tokenizer_and_sizes(saved, tmp_path):
    transformers = checkpoint.require_transformers()
    config = transformers.AutoConfig.from_pretrained(saved)
    without = samples.model_inputs(config, samples.scenes(2), saved)
    assert (without["input_ids"] >= TINY["vocab_size"] // 2).any()
    config.save_pretrained(tmp_path)
    vocabulary = tmp_path / "words"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "who", "is", "this", "person", "?"]))
    transformers.BertTokenizer(str(vocabulary)).save_pretrained(tmp_path)
    samples.image_processor(config).__class__(size={"shortest_edge": 96}).save_pretrained(tmp_path)
    inputs = samples.model_inputs(config, samples.scenes(2), str(tmp_path))
    assert inputs["input_ids"][0].tolist()[:7] == [2, 5, 6, 7, 8, 9, 3]
    assert inputs["pixel_values"].shape[2] == 96


def test_budget_lines():
    truth = {"pooler_output": torch.ones(4, dtype=torch.float64)}
    off = {"pooler_output": truth["pooler_output"] * (1 + 1e-6)}
    far = {"pooler_output": truth["pooler_output"] * 1.1}
    nan = {"pooler_output": truth["pooler_output"] * float("nan")}
    assert report.compare(off, truth, "float32", off)[0].ok
    assert not report.compare(far, truth, "float32", off)[0].ok
    assert not report.compare(far, truth, "bfloat16", off)[0].ok
    assert report.compare(off, truth, "int8")[0].ok
    assert not report.compare(far, truth, "int8")[0].ok
    assert not report.compare(nan, truth, "int8")[0].ok

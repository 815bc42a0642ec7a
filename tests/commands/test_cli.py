"""The command line: info, check with each exit status, demo on a tiny model."""

import json

import pytest
import torch

import vilt_fast
from vilt_fast import commands as cli
from vilt_fast.commands import checkpoint, demo, report, samples
from vilt_fast.ops import registry

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


def test_info(capsys):
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    for word in ("torch", torch.__version__.split("+")[0], "attention", "reference", "NVML"):
        assert word in shown or word == "NVML" and "driver" in shown


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
    assert cli.main(["check", str(tmp_path / "nothing")]) == 2
    assert "cannot read a configuration" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    assert cli.main(["check", str(tmp_path)]) == 2
    assert "'bert' model" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vilt"}))
    assert cli.main(["check", str(tmp_path)]) == 2
    assert "--task" in capsys.readouterr().err
    assert cli.main(["check", str(tmp_path), "--task", "vqa"]) == 2
    assert "cannot load ViltForQuestionAnswering" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["check"],
        ["check", "x", "--dtype", "float16"],
        ["check", "x", "--batch", "0"],
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
    assert "vilt_fast, bfloat16" in text
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

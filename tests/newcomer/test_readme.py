"""README word for word, as somebody would who has just cloned: its Python, its commands, HuggingFace's own snippet.

Small random checkpoints lie in folders named like the hub ids, where `from_pretrained` finds them first.
"""

import contextlib
import re
import shlex
from pathlib import Path

import pytest
import torch
from support.models import build
from support.planted import picture

import vilt_fast
from vilt_fast import commands as cli
from vilt_fast import testing
from vilt_fast.commands import samples

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HUB = {
    "dandelin/vilt-b32-finetuned-vqa": "question_answering",
    "dandelin/vilt-b32-mlm": "masked_lm",
    "dandelin/vilt-b32-finetuned-coco": "retrieval",
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with photographs, captions and the checkpoints, to be in."""
    from PIL import Image
    from transformers import BertTokenizer, ViltProcessor

    (tmp_path / "photos").mkdir()
    for name in ("photo.jpg", "photos/a.jpg", "photos/b.png"):
        Image.fromarray(picture()).save(tmp_path / name)
    (tmp_path / "captions.txt").write_text("a cat on a red sofa\nhow many cats\n", encoding="utf-8")
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] how many cats are there ? a cat on red sofa".split()
    for name, kind in HUB.items():
        model = testing.random_weights(build(kind, torch.float32))
        model.save_pretrained(tmp_path / name)
        processor = samples.image_processor(model.config)
        tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
        ViltProcessor(processor, tokenizer).save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_its_python(home, capsys, caplog):
    """Every block after the other, in one interpreter. Options that only a GPU has are left out on a CPU."""
    import logging

    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) >= 4 and "accelerate(model)  # <-- the one line" in blocks[0]
    caplog.set_level(logging.WARNING, logger="vilt_fast")  # which is put back, whatever README's lines set it to
    names = {}
    for block in blocks:
        if not torch.cuda.is_available():
            block = re.sub(r', (cuda_graphs=True|quantize="fp8")', "", block)
        exec(block, names)
    assert all((home / name).is_file() for name in ("cat.png", "best.png", "scores.npy"))
    assert "indices=tensor" in capsys.readouterr().out


def test_its_commands(home, capsys, monkeypatch):
    """Every line that begins with vilt-fast; the service ends as soon as it would begin, at a free port."""
    from vilt_fast.serving import server

    monkeypatch.setattr(server, "run", lambda app, listening, limits: None)
    lines = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]
    said = [shlex.split(line, comments=True) for line in lines if line.startswith("vilt-fast ")]
    assert {words[1] for words in said} == {"align", "check", "info", "score", "serve"}
    for _, *words in said:
        words = [next(iter(HUB)) if word == "FOLDER_OR_HUB_ID" else word for word in words]
        assert cli.main(words + ["--port", "0"] * (words[0] == "serve")) == 0, words
    assert all((home / name).is_file() for name in ("cat.png", "best.png", "best.csv"))


@pytest.mark.parametrize("recorded", [True, False], ids=["as published", "no_grad"])
def test_the_snippet_of_huggingfaces_documentation(recorded, home, capsys):
    """With the one line in it, and the answer of the model without; it has no no_grad and no eval()."""
    from transformers import ViltForQuestionAnswering

    snippet = ViltForQuestionAnswering.forward.__doc__.split("```python")[1].split("```")[0]
    lines = [line.strip()[4:] for line in snippet.splitlines() if line.strip().startswith((">>>", "..."))]
    assert any("from_pretrained" in line for line in lines) and lines[-1].startswith("print(")
    download = ("http", "import requests", "Image.open", "url =")
    lines = [line for line in lines if not any(part in line for part in download)]
    before = ["import vilt_fast", 'image = Image.open("photo.jpg")']
    at = next(i for i, line in enumerate(lines) if line.startswith("model = ")) + 1
    found = []
    for accelerated in (False, True):
        names = {}
        swap = ["vilt_fast.accelerate(model)"] if accelerated else []
        with contextlib.nullcontext() if recorded else torch.no_grad():
            exec("\n".join([lines[0], "from PIL import Image", *before, *lines[1:at], *swap, *lines[at:]]), names)
        found.append(names)
    plain, fast = found
    assert fast["logits"].requires_grad is plain["logits"].requires_grad is recorded
    assert not plain["model"].training  # from_pretrained leaves it so
    exact = plain["model"].double()(
        **{k: v.double() if v.is_floating_point() else v for k, v in plain["encoding"].items()}
    )
    testing.assert_within_budget(fast["logits"].detach(), plain["logits"].detach(), exact.logits.detach())
    assert fast["idx"] == plain["idx"] == exact.logits.argmax(-1).item()
    answers = re.findall("Predicted answer: (.*)", capsys.readouterr().out)
    assert len(answers) == 2 and answers[0] == answers[1]
    assert isinstance(vilt_fast.restore(fast["model"]), ViltForQuestionAnswering)

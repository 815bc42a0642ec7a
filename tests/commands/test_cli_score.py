"""`vilt-fast score`, and the examples of scoring, on a tiny checkpoint."""

import csv
import socket
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import scored, scoring
from support.examples import EXAMPLES, example
from support.models import build

import vilt_fast
from vilt_fast import commands as cli
from vilt_fast.commands.samples import word_tokenizer

TEXTS = ["a cat on the red sofa", "two dogs", "the cat"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with checkpoints, images of which one is none, and texts."""
    from transformers import ViltProcessor

    where = tmp_path_factory.mktemp("home")
    for kind in ("retrieval", "question_answering"):
        model = build(kind, torch.float32)
        model.save_pretrained(where / kind)
        tokenizer = word_tokenizer("[PAD] [UNK] [CLS] [SEP] [MASK] a cat on the red sofa two dogs".split())
        ViltProcessor(scoring.processor(model), tokenizer).save_pretrained(where / kind)
    (where / "images" / "more").mkdir(parents=True)
    scoring.files(where / "images")
    (where / "images" / "4.png").rename(where / "images" / "more" / "4.PNG")
    (where / "images" / "notes.txt").write_text("no image")
    (where / "images" / "bad.jpg").write_bytes(b"no image")
    (where / "texts.txt").write_text("\n".join([TEXTS[0], "", TEXTS[1], "  " + TEXTS[2]]) + "\n", encoding="utf-8")
    return where


@pytest.fixture(scope="module")
def expected(home):
    from transformers import ViltForImageAndTextRetrieval

    model = ViltForImageAndTextRetrieval.from_pretrained(home / "retrieval").eval()
    paths = sorted(str(p) for p in (home / "images").rglob("*") if p.suffix in (".png", ".PNG"))
    return vilt_fast.score(model, TEXTS, paths)


def _call(home, *more, model="retrieval"):
    given = ["--images", str(home / "images"), "--texts", str(home / "texts.txt"), "--model", str(home / model)]
    return cli.main(["score", *given, *map(str, more)])


def test_a_table_and_a_sheet(home, expected, tmp_path, capsys):
    assert _call(home, "--top-k", 2, "-o", tmp_path / "out.csv", "--sheet", tmp_path / "sheet.png") == 0
    said = capsys.readouterr()
    assert "3 texts, 6 images, 18 pairs" in said.out and "1 of 6 images cannot be read" in said.err
    rows = list(csv.DictReader(open(tmp_path / "out.csv", encoding="utf-8")))
    best, scores = expected.top(2)
    assert [row["text"] for row in rows] == [text for text in TEXTS for _ in range(2)]
    assert [row["image"] for row in rows] == [expected.images[i] for i in best.flatten()]
    assert [float(row["score"]) for row in rows] == scores.flatten().tolist()
    assert Image.open(tmp_path / "sheet.png").size[0] > 400


def test_a_stream_that_is_resumed(home, expected, tmp_path, capsys):
    out = tmp_path / "out.npy"
    assert _call(home, "-o", out) == 0
    assert _call(home, "-o", out) == 2 and "--resume" in capsys.readouterr().err
    assert _call(home, "-o", out, "--resume") == 0
    found = np.load(out)
    assert np.isnan(found[:, 4]).all() and np.array_equal(np.delete(found, 4, 1), expected.scores)
    assert _call(home, "-o", tmp_path / "out.csv", "--scores", tmp_path / "all.npy") == 0
    assert np.array_equal(np.load(tmp_path / "all.npy"), found, equal_nan=True)


def test_answers(home, tmp_path):
    options = ("--top-k", 2, "--dtype", "int8", "--sheet", tmp_path / "sheet.png")
    assert _call(home, "-o", tmp_path / "out.csv", *options, model="question_answering") == 0
    rows = list(csv.DictReader(open(tmp_path / "out.csv", encoding="utf-8")))
    assert len(rows) == 3 * 5 * 2 and rows[0]["answer"].startswith("LABEL_")


@pytest.mark.parametrize(
    "more, said",
    [
        (["-o", "out.xlsx"], "tables are"),
        (["-o", "missing/out.csv"], "no folder"),
        (["-o", "out.csv", "--sheet", "missing/sheet.png"], "no folder"),
        (["-o", "out.csv", "--images", "texts.txt"], "is no folder"),
        (["-o", "out.csv", "--images", "empty"], "no file that is named like an image"),
        (["-o", "out.csv", "--texts", "missing.txt"], "missing.txt cannot be read"),
        (["-o", "out.csv", "--texts", "blank.txt"], "holds no texts"),
        (["-o", "out.csv", "--texts", "images/0.png"], "no text in UTF-8"),
        (["-o", "out.csv", "--texts", "long.txt"], "has 20 tokens; the model takes 1 to 12"),
        (["-o", "out.csv", "--sheet", "sheet.xyz"], "cannot write xyz"),
        (["-o", "out.csv", "--resume"], "--resume needs what was streamed"),
        (["-o", "out.npy", "--scores", "all.npy"], "leave --scores out"),
        (["-o", "out.csv", "--model", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_used_is_said(home, tmp_path, monkeypatch, capsys, more, said):
    monkeypatch.chdir(home)
    (home / "empty").mkdir(exist_ok=True)
    (home / "blank.txt").write_text("\n \n")
    (home / "long.txt").write_text("cat " * 18)
    before = set(home.rglob("*"))
    assert _call(home, *more) == 2
    assert said in capsys.readouterr().err and set(home.rglob("*")) == before


def test_a_table_without_pyarrow_is_said(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert _call(home, "-o", tmp_path / "out.parquet") == 2
    assert "pip install pyarrow" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["score --images a --texts b -o c", "align a b", "demo"])
def test_the_model_of_the_environment_is_that_of_every_command(monkeypatch, command):
    asked = []
    monkeypatch.setenv("VILT_FAST_MODEL", "some/model")
    module = getattr(cli, command.split()[0])
    monkeypatch.setattr(module, "_run", lambda arguments, rest: asked.append(arguments.model) or 0)
    assert cli.main(command.split()) == 0 and cli.main([*command.split(), "--model", "another"]) == 0
    assert asked == ["some/model", "another"]


def test_one_gpu_for_several_processes_is_refused(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert _call(home, "-o", tmp_path / "out.csv", "--device", "cuda:0") == 2
    assert "cuda:0 is one GPU, and each of several processes has its own" in capsys.readouterr().err


class Table(dict):
    """Stands in for a dataset of either library where that is not installed: columns, given on in batches."""

    def map_batches(self, kind, *, fn_constructor_args, batch_size, concurrency):
        return Table(kind(*fn_constructor_args)(self))

    def map(self, function, *, batched, batch_size):
        return Table(function(dict(self)))

    def write(self, out):
        out.write_text("\n".join(map(str, self["score"])))

    write_parquet = to_parquet = write


@pytest.mark.parametrize("how", ["ray", "datasets"])
def test_the_examples_of_tables(home, expected, tmp_path, monkeypatch, how):
    """With stand-ins, whatever is installed: Ray would start processes, and both are slow to import."""
    batch = Table(text=TEXTS[:2], image=[expected.images[1], {"bytes": Path(expected.images[3]).read_bytes()}])
    if how == "ray":
        library = types.SimpleNamespace(data=types.SimpleNamespace(read_parquet=lambda table: batch))
    else:
        library = types.SimpleNamespace(load_dataset=lambda kind, data_files, split: batch)
    monkeypatch.setitem(sys.modules, how, library)
    getattr(example("score_columns"), f"with_{how}")(str(home / "retrieval"), "pairs", tmp_path / "out")
    found = [float(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert found == [expected.scores[0, 1], expected.scores[1, 3]]


def test_the_example_of_ranks(home, expected, tmp_path):
    """Two processes with the environment that torchrun gives them."""
    (tmp_path / "images").mkdir()
    for path in expected.images:
        (tmp_path / "images" / Path(path).name).write_bytes(Path(path).read_bytes())
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    given = [home / "retrieval", tmp_path / "images", tmp_path / "texts.txt", tmp_path / "out.npy"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        scored.start(EXAMPLES / "score_ranks.py", given, rank, 2, port, tmp_path, target=scored.as_by_torchrun)
        for rank in range(2)
    ]
    for process in processes:
        process.join(200)
        assert process.exitcode == 0
    assert np.array_equal(np.load(tmp_path / "out.npy"), expected.scores)
    said = (tmp_path / "0.txt").read_text().splitlines()
    assert [line.split(None, 2)[2] for line in said] == TEXTS and not (tmp_path / "1.txt").read_text()

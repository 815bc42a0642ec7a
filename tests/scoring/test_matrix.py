"""What is made of scores: the best images of a text, recall, tables, a sheet."""

import csv
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from support import scoring
from support.models import build

import vilt_fast
from vilt_fast import InputError, Recall, ScoreMatrix, recall
from vilt_fast.scoring import sheet

NAN = float("nan")


def matrix(scores, **more):
    scores = np.asarray(scores, np.float32)
    texts, images = (
        tuple(f"{name} {i}" for i in range(n)) for name, n in zip(("text", "image"), scores.shape, strict=False)
    )
    return ScoreMatrix(scores, texts, images, **more)


def by_loops(scores, truth):
    """Recall by sorting each row and column in plain Python."""
    shares = []
    for score, true in ((scores, truth), (scores.T, truth.T)):
        for k in (1, 5, 10):
            hits = []
            for row, right in zip(score.tolist(), true.tolist(), strict=True):
                order = sorted(
                    range(len(row)), key=lambda i, row=row: (row[i] != row[i], -row[i] if row[i] == row[i] else 0, i)
                )
                hits.append(any(right[i] for i in order[:k]))
            shares.append(sum(hits) / len(hits))
    return Recall(*shares)


def test_recall_of_a_planted_set():
    """Ranks that were chosen: text t finds its image at rank t, of five texts an image."""
    images, each = 20, 5
    truth = np.repeat(np.arange(images), each)
    scores = np.zeros((images * each, images))
    for text, image in enumerate(truth):
        rank = text % 12  # so many images are better
        others = np.delete(np.arange(images), image)
        scores[text, image] = 0.5
        scores[text, others[:rank]] = 1.0
    found = recall(scores, truth)
    ranks = np.arange(images * each) % 12
    assert (found.ir_r1, found.ir_r5, found.ir_r10) == tuple((ranks < k).mean() for k in (1, 5, 10))
    assert found == by_loops(scores, truth[:, None] == np.arange(images))
    perfect = np.where(truth[:, None] == np.arange(images), 1.0, 0.0)
    assert recall(torch.from_numpy(perfect), truth) == Recall(*[1.0] * 6)


def test_recall_with_ties_and_what_cannot_be_read():
    draw = np.random.default_rng(0)
    for _ in range(5):
        scores = draw.integers(0, 4, (30, 14)).astype(float)
        scores[:, 3] = NAN
        truth = draw.random((30, 14)) < 0.15
        assert recall(scores, truth) == by_loops(scores, truth)
        assert matrix(scores).recall(truth) == recall(scores, truth)
    for bad in (np.zeros(29, int), np.full(30, 14), np.zeros(30), truth.T):
        with pytest.raises(InputError, match="recall: "):
            recall(scores, bad)
    with pytest.raises(InputError, match="N texts"):
        recall(scores[0], truth[0])


def test_the_best_images():
    found = matrix([[1, 3, NAN, 3], [NAN, 0, -1, 2]], top_k=2)
    images, scores = found.top()
    assert images.tolist() == [[1, 3], [3, 1]] and scores.tolist() == [[3, 3], [2, 0]]
    assert found.top(4)[0].tolist() == [[1, 3, 0, 2], [3, 1, 2, 0]]
    listed = ScoreMatrix(np.array([1.0, 5, 2]), ("a", "b"), ("x", "y", "z"), pairs=np.array([[1, 0], [1, 2], [0, 1]]))
    images, scores = listed.top(2)
    assert images.tolist() == [[1, -1], [2, 0]] and np.isnan(scores[0, 1]) and scores[1].tolist() == [5, 1]
    assert np.asarray(found, np.float64).dtype == np.float64
    for k in (0, -1):
        with pytest.raises(ValueError, match=f"k must be at least 1, got {k}"):
            found.top(k)
    with pytest.raises(ValueError, match="full grid"):
        listed.recall([0, 0])


def _answers():
    model = build("question_answering", torch.float32, id2label={i: f"answer {i}" for i in range(5)})
    return vilt_fast.score(model, scoring.texts(), scoring.photographs(), processor=scoring.processor(model), top_k=2)


def test_tables(tmp_path):
    found = matrix([[1, 3, NAN], [0.5, -1, 2]], top_k=2)
    found.save(tmp_path / "a.csv")
    rows = list(csv.reader(open(tmp_path / "a.csv", encoding="utf-8")))
    assert rows[0] == ["text_number", "text", "image_number", "image", "rank", "score"]
    assert rows[1:] == [
        ["0", "text 0", "1", "image 1", "1", "3.0"], ["0", "text 0", "0", "image 0", "2", "1.0"],
        ["1", "text 1", "2", "image 2", "1", "2.0"], ["1", "text 1", "0", "image 0", "2", "0.5"],
    ]  # fmt: skip
    found.save(tmp_path / "a.npy")
    assert np.array_equal(np.load(tmp_path / "a.npy"), found.scores, equal_nan=True)
    answered = _answers()
    answered.save(tmp_path / "b.csv")
    rows = list(csv.DictReader(open(tmp_path / "b.csv", encoding="utf-8")))
    assert len(rows) == 6 * 5 * 2 and rows[1]["answer"] == answered.answer(0, 0)[1][0] and rows[1]["rank"] == "2"
    answered.save(tmp_path / "b.npy")
    assert np.array_equal(np.load(tmp_path / "b.npy")["answer"], answered.answers)


def test_parquet(tmp_path, monkeypatch):
    """Written where pyarrow is; where it is not, that is what is said. A stand-in plays it where it is missing."""
    found = matrix([[1, 3, NAN], [0.5, -1, 2]], top_k=2)
    try:
        from pyarrow import parquet
    except ImportError:
        with pytest.raises(ImportError, match="pyarrow, which is not installed"):
            found.save(tmp_path / "a.parquet")
    else:
        found.save(tmp_path / "a.parquet")
        table = parquet.read_table(tmp_path / "a.parquet").to_pydict()
        assert table["image"] == ["image 1", "image 0", "image 2", "image 0"] and table["score"] == [3, 1, 2, 0.5]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        found.save(tmp_path / "b.parquet")


def test_tables_that_cannot_be_written(tmp_path):
    found = matrix([[1.0]])
    (tmp_path / "a.csv").write_text("before")
    with pytest.raises(ValueError, match=r"tables are .npy, .csv, .parquet, not .xlsx"):
        found.save(tmp_path / "a.xlsx")
    with pytest.raises(OSError, match="no folder"):
        found.save(tmp_path / "missing" / "a.csv")
    with pytest.raises(OSError, match="no folder"):
        found.save(tmp_path / "pyarrow" / "a.csv")
    broken = matrix([[1.0]])
    broken.__dict__["texts"] = None
    with pytest.raises(TypeError):
        broken.save(tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_a_sheet(tmp_path):
    """The photographs stand beside their texts, best first: their colours are found where they should be."""
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    images = [np.full((60, 60, 3), colour, np.uint8) for colour in colours]
    found = matrix([[1, 3, 2], [9, NAN, 8]], sources=images, errors={1: "gone"})
    found.save(tmp_path / "a.csv")
    found.sheet(tmp_path / "sheet.png", top_k=2, note="a note")
    picture = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    places = {}
    for name, colour in zip("rgb", colours, strict=True):
        ys, xs = np.nonzero(abs(picture - colour).sum(-1) < 30)
        places[name] = [
            (float(y.mean()), float(x.mean())) for y, x in _halves(ys, xs, picture.shape[0]) if len(y) > 10_000
        ]
    assert not places["g"]  # it could not be read: a note stands in its place
    (blue_up, blue_down), (red_down,) = places["b"], places["r"]
    assert blue_up[0] < blue_down[0] and abs(red_down[0] - blue_down[0]) < 5 and red_down[1] < blue_down[1]
    assert abs(blue_up[1] - blue_down[1]) < 5  # second of both
    answered = _answers()
    answered.sheet(tmp_path / "answers.jpg", texts=[2, 0])
    assert Image.open(tmp_path / "answers.jpg").size[0] > 500
    with pytest.raises(ValueError, match="numbers from 0 to 1"):
        found.sheet(tmp_path / "sheet.png", texts=[2])


def test_a_sheet_ranks_once_and_shows_five_at_most(tmp_path, monkeypatch):
    calls, shown, own = [], [], sheet._thumbnail
    monkeypatch.setattr(sheet, "_thumbnail", lambda matrix, image, dpi: shown.append(image) or own(matrix, image, dpi))
    top = ScoreMatrix.top
    monkeypatch.setattr(ScoreMatrix, "top", lambda self, k=None: calls.append(k) or top(self, k))
    scores = np.tile(np.arange(8.0)[::-1], (3, 1))
    for kept, asked, count in ((None, None, 5), (2, None, 2), (7, None, 5), (2, 6, 6)):
        matrix(scores, top_k=kept).sheet(tmp_path / "sheet.png", top_k=asked, dpi=20)
        assert calls == [count] and shown == list(range(count))
        calls.clear(), shown.clear()
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        matrix(scores).sheet(tmp_path / "sheet.png", top_k=0)


def _halves(ys, xs, height):
    upper = ys < height / 2
    return (ys[upper], xs[upper]), (ys[~upper], xs[~upper])

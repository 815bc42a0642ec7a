"""The calls of sentence-transformers, and columns of a table."""

import pickle

import numpy as np
import pytest
import torch
from support import scoring
from support.models import build

import vilt_fast
from vilt_fast import CrossEncoder, InputError
from vilt_fast.commands.samples import word_tokenizer
from vilt_fast.scoring.columns import ScoreColumns

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a cat on the red sofa two dogs".split()
TEXTS = ["a cat on the red sofa", "two dogs", "the cat"]


@pytest.fixture(scope="module")
def model():
    return build("retrieval", torch.float32)


@pytest.fixture(scope="module")
def encoder(model):
    return CrossEncoder(model, processor=scoring.processor(model), tokenizer=word_tokenizer(WORDS))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return scoring.files(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def grid(model, images):
    return vilt_fast.score(
        model, TEXTS, images, processor=scoring.processor(model), tokenizer=word_tokenizer(WORDS)
    ).scores


def test_predict(encoder, images, grid):
    pairs = [(TEXTS[0], str(images[2])), {"text": TEXTS[1], "image": images[0]}, ({"image": images[4]}, TEXTS[2])]
    found = encoder.predict(pairs)
    assert isinstance(found, np.ndarray) and np.array_equal(found, [grid[0, 2], grid[1, 0], grid[2, 4]])
    assert encoder.predict(pairs[0]) == grid[0, 2] and encoder.predict(pairs[1]) == grid[1, 0]
    assert encoder.predict([TEXTS[0], str(images[2])]) == grid[0, 2]  # a pair as a list
    squashed = encoder.predict(pairs, activation_fn=torch.sigmoid, convert_to_tensor=True)
    assert torch.equal(squashed, torch.from_numpy(found).sigmoid())
    assert [float(v) for v in encoder.predict(pairs, convert_to_numpy=False)] == found.tolist()
    assert len(encoder.predict([])) == 0
    many = [(t, str(i)) for t in TEXTS for i in images]
    assert np.array_equal(encoder.predict(many).reshape(grid.shape), grid)


def test_rank(encoder, images, grid):
    found = encoder.rank(TEXTS[0], [str(i) for i in images], top_k=3, return_documents=True)
    order = np.argsort(-grid[0])
    assert [row["corpus_id"] for row in found] == order[:3].tolist()
    assert [row["score"] for row in found] == grid[0][order[:3]].tolist()
    assert found[0]["image"] == str(images[order[0]])
    texts = encoder.rank({"image": images[1]}, TEXTS)
    assert [row["corpus_id"] for row in texts] == np.argsort(-grid[:, 1]).tolist() and len(texts[0]) == 2
    assert encoder.rank(images[1], [{"text": t} for t in TEXTS]) == texts


def test_what_is_no_pair(encoder, images):
    for bad in ([({"text": "a"}, {"text": "b"})], [(images[0], images[1])], [{"text": "a"}], ["abc", 1, 2]):
        with pytest.raises((InputError, TypeError), match="CrossEncoder"):
            encoder.predict(bad)
    with pytest.raises(InputError, match="the query is text and so is a document"):
        encoder.rank("a cat", [{"text": "two dogs"}])
    with pytest.raises(InputError, match="the query is image and so is a document"):
        encoder.rank({"image": images[0]}, [images[1]])
    for model in (build("question_answering"), build("trunk"), 3):
        with pytest.raises(TypeError, match="CrossEncoder takes a model that scores pairs"):
            CrossEncoder(model)


def test_by_name(tmp_path, model, images, grid):
    """A folder, as `from_pretrained` takes it, with the processor that is saved there."""
    from transformers import ViltProcessor

    model.save_pretrained(tmp_path)
    ViltProcessor(scoring.processor(model), word_tokenizer(WORDS)).save_pretrained(tmp_path)
    encoder = CrossEncoder(str(tmp_path))
    assert "accelerated" in repr(encoder.model)
    assert np.array_equal(encoder.predict([(TEXTS[1], images[3])]), grid[1:2, 3])


class Load:
    """Makes the model, in whatever process it is called."""

    made = 0

    def __init__(self, kind):
        self.kind = kind

    def __call__(self):
        Load.made += 1
        return build(self.kind, torch.float32)


def test_columns(images, grid):
    options = dict(processor=scoring.processor(build("trunk")), tokenizer=word_tokenizer(WORDS))
    mapped = pickle.loads(pickle.dumps(ScoreColumns(Load("retrieval"), image="photo", **options)))
    batch = {
        "text": np.array([TEXTS[0], TEXTS[1]]),
        "photo": [str(images[1]), {"bytes": images[2].read_bytes(), "path": None}],
    }
    made = Load.made
    found = mapped(batch)
    assert np.array_equal(found["score"], [grid[0, 1], grid[1, 2]]) and found["text"] is batch["text"]
    mapped(batch)
    assert Load.made == made + 1
    assert mapped({"text": [], "photo": []})["score"].shape == (0,)
    answers = ScoreColumns(build("question_answering", torch.float32), image="photo", **options)(batch)
    assert len(answers["answer"]) == 2 and (answers["probability"] > 0).all()

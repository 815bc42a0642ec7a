"""Answers of the service: what the model says of each pair, whoever else asks; and what it tells about itself."""

import base64
import re
import threading

import numpy as np
import pytest
import torch
from support import served
from support.models import assert_close, build

import vilt_fast
from vilt_fast.serving import limits

TEXTS, IMAGES = served.TEXTS, served.photographs()


@pytest.fixture(scope="module")
def ranker():
    with served.serving("retrieval", torch.float64) as client:
        yield client


@pytest.fixture(scope="module")
def answerer():
    with served.serving("question_answering", torch.float32) as client:
        yield client


def _vqa(client, image, question, **parameters):
    inputs = {"image": served.text_of(image), "question": question}
    return client.ask("/vqa", {"inputs": inputs, "parameters": parameters})


def test_ranks_are_those_of_the_model_pair_by_pair(ranker):
    model = build("retrieval")
    process = served.processor(model)
    expected = torch.zeros(len(TEXTS), len(IMAGES), dtype=torch.float64)
    for i, text in enumerate(TEXTS):
        for j, image in enumerate(IMAGES):
            made = process(vilt_fast.scoring.pictures.Picture(image, 0, None).opened(), text, return_tensors="pt")
            with torch.no_grad():
                expected[i, j] = model(**made | {"pixel_values": made["pixel_values"].double()}).logits[0, 0]
    status, found, _ = ranker.ask(
        "/rerank",
        {"query": {"image": served.text_of(IMAGES[1])}, "texts": TEXTS, "raw_scores": True, "return_text": True},
    )
    assert status == 200 and [row["score"] for row in found] == sorted((r["score"] for r in found), reverse=True)
    assert all(row["text"] == TEXTS[row["index"]] for row in found) and {*found[0]} == {"index", "score", "text"}
    by_text = torch.tensor([row["score"] for row in sorted(found, key=lambda row: row["index"])], dtype=torch.float64)
    assert_close(by_text, expected[:, 1])
    documents = [{"image": served.text_of(IMAGES[0])}] + [
        f"data:image/png;base64,{served.text_of(image)}" for image in IMAGES[1:]
    ]
    status, found, _ = ranker.ask("/rerank", {"query": TEXTS[0], "texts": documents})
    assert status == 200 and {*found[0]} == {"index", "score"}
    by_image = torch.tensor([row["score"] for row in sorted(found, key=lambda row: row["index"])], dtype=torch.float64)
    assert_close(by_image, expected[0].sigmoid())


def test_many_clients_get_what_score_gives_to_the_last_bit(answerer):
    """Packed with whoever else waits, in batches that nobody could foretell."""
    questions = [TEXTS[n % len(TEXTS)] for n in range(48)]
    images = [IMAGES[n % len(IMAGES)] for n in range(48)]
    model = build("question_answering", torch.float32)
    pairs = [(n, n) for n in range(48)]
    expected = vilt_fast.score(model, questions, images, pairs=pairs, top_k=5, processor=served.processor(model))
    found = [None] * 48

    def ask(first):
        for n in range(first, 48, 12):
            found[n] = _vqa(answerer, images[n], questions[n])

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, (status, answers, _) in enumerate(found):
        assert status == 200
        assert [(a["answer"], np.float32(a["score"])) for a in answers] == [
            (name, np.float32(share)) for name, share in expected.answer(n)
        ]
    _, metrics, _ = answerer.ask("/metrics")
    told = dict(re.findall(r"^(vilt_fast_batch_pairs_\w+) (\S+)$", metrics.decode(), re.M))
    assert float(told["vilt_fast_batch_pairs_sum"]) > float(told["vilt_fast_batch_pairs_count"])  # some were packed


def test_a_model_that_is_called_with_whole_pairs_answers_too():
    model = build("question_answering", torch.float32)
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    with served.serving(model=model) as client:
        status, whole, _ = _vqa(client, IMAGES[0], TEXTS[0], top_k=2)
        assert status == 200 and len(seen) == 1 and len(whole) == 2
    with served.serving() as client:
        _, apart, _ = _vqa(client, IMAGES[0], TEXTS[0], top_k=2)
    assert [a["answer"] for a in whole] == [a["answer"] for a in apart]
    assert np.allclose([a["score"] for a in whole], [a["score"] for a in apart], rtol=1e-5)


def test_words_and_patches_are_those_of_align(answerer):
    model = build("question_answering", torch.float32)
    picture = vilt_fast.scoring.pictures.Picture(IMAGES[1], 0, None).opened()
    for whole_words in (False, True):
        parameters = {"whole_words": whole_words}
        inputs = {"image": served.text_of(IMAGES[1]), "text": "two dogs cats"}
        status, found, _ = answerer.ask("/align", {"inputs": inputs, "parameters": parameters})
        expected = vilt_fast.align(
            model, picture, "two dogs cats", processor=served.processor(model), whole_words=whole_words
        )
        assert status == 200 and tuple(found["tokens"]) == expected.tokens and tuple(found["grid"]) == expected.grid
        assert len(found["tokens"]) == (3 if whole_words else 4)
        assert np.allclose(found["heatmaps"], expected.heatmaps().flatten(1), atol=2e-4)
        assert abs(found["distance"] - expected.distance) < 1e-5


def test_what_it_tells_about_itself(ranker, answerer):
    assert ranker.ask("/health")[:2] == (200, {"status": "ok"})
    told = answerer.ask("/info")[1]
    assert told["task"] == "vqa" and told["limits"]["pairs"] == limits.Limits().pairs and told["workers"] >= 1
    assert ranker.ask("/info")[1]["task"] == "rerank"
    for client, there, absent in ((ranker, "/rerank", "/vqa"), (answerer, "/vqa", "/rerank")):
        schema = client.ask("/openapi.json")[1]
        assert there in schema["paths"] and absent not in schema["paths"]
        named = set(re.findall(r"#/components/schemas/(\w+)", str(schema)))
        assert named and named <= set(schema["components"]["schemas"])
        status, said, _ = client.ask(absent, {})
        assert status == 404 and there in said["error"] and said["error_type"] == "Request"
        assert client.ask(there)[0] == 405


def test_pages_take_nothing_from_elsewhere(answerer):
    for path in ("/", "/page.js", "/page.css", "/docs", "/docs.js"):
        status, content, headers = answerer.ask(path)
        assert status == 200 and len(content) > 500
        assert not re.search(rb"https?://|//cdn|@import", content), path
        assert "default-src 'none'" in headers["content-security-policy"]


def test_the_hubs_own_client_understands_it(answerer, monkeypatch):
    import huggingface_hub
    from huggingface_hub import InferenceClient, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    client = InferenceClient(model=f"http://127.0.0.1:{answerer.port}/vqa")
    found = client.visual_question_answering(IMAGES[0], TEXTS[0], top_k=2)
    assert [(a.answer, a.score) for a in found] == [
        (a["answer"], a["score"]) for a in _vqa(answerer, IMAGES[0], TEXTS[0], top_k=2)[1]
    ]
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError, match="422"):
        client.visual_question_answering(b"no image", TEXTS[0])


def test_a_key(answerer):
    bearer = lambda key: {"Authorization": f"Bearer {key}"}  # noqa: E731
    body = {"inputs": {"image": base64.b64encode(IMAGES[0]).decode(), "question": TEXTS[0]}}
    with served.serving(key="secret") as client:
        for wrong in (
            {},
            bearer("Secret"),
            bearer(""),
            {"Authorization": "Basic secret"},
            bearer("secret2"),
            bearer("é"),
        ):
            status, said, headers = client.ask("/vqa", body, wrong)
            assert status == 401 and said["error_type"] == "Unauthorized" and headers["www-authenticate"] == "Bearer"
        assert client.ask("/metrics")[0] == client.ask("/info")[0] == client.ask("/secret")[0] == 401
        assert client.ask("/")[0] == client.ask("/health")[0] == client.ask("/docs")[0] == 200
        assert client.ask("/vqa", body, bearer("secret"))[:2] == answerer.ask("/vqa", body)[:2]
        assert client.ask("/metrics", headers=bearer("secret"))[0] == 200

"""`score` against HuggingFace's own forward pair by pair, and against itself in other batches, orders and parts."""

import copy
import threading

import numpy as np
import pytest
import torch
from support import scoring
from support.models import assert_close, build
from support.original_vilt import ViLTransformerSS

import vilt_fast
from vilt_fast import InputError, testing
from vilt_fast.scoring import workers

WIDE = dict(hidden_size=96, num_attention_heads=3, intermediate_size=200)  # several panels and blocks of a product


class Matching(torch.nn.Module):
    """A trunk with the head of image-text matching, as the original's checkpoints have it."""

    def __init__(self, dtype):
        super().__init__()
        self.vilt = build("trunk", dtype)
        self.itm_score = testing.random_weights(torch.nn.Linear(32, 2)).to(dtype)
        self.config = self.vilt.config


@pytest.mark.core
@pytest.mark.parametrize("kind", ["retrieval", "question_answering"])
@pytest.mark.parametrize("accelerated", [False, True])
def test_a_grid_is_what_the_model_says_of_each_pair(kind, accelerated):
    model = build(kind)
    ids, images, process = scoring.texts(), scoring.photographs(), scoring.processor(model)
    logits = scoring.by_hand(model, ids, images, process)
    if accelerated:
        vilt_fast.accelerate(model)
    training = model.train()
    found = vilt_fast.score(model, ids, images, processor=process, top_k=3)
    assert training.training and training.vilt.encoder.layer[0].training  # as it was
    if kind == "retrieval":
        assert_close(torch.from_numpy(found.scores), logits[..., 0])
        return
    shares, order = logits.sigmoid().sort(-1, descending=True)
    assert (found.answers == order[..., :3].numpy()).all()
    assert_close(torch.from_numpy(found.scores.copy()), shares[..., :3])
    name, share = found.answer(1, 2)[0]
    assert name == model.config.id2label[int(order[1, 2, 0])] and share == found.scores[1, 2, 0]


def test_two_classes_of_matching_are_log_odds():
    model = Matching(torch.float64).eval()
    ids, images, process = scoring.texts(), scoring.photographs(), scoring.processor(model.vilt)
    found = vilt_fast.score(model, ids, images, processor=process)
    for i, text in enumerate(ids):
        for j, image in enumerate(images):
            made = process(image, return_tensors="pt")
            pooled = model.vilt(
                torch.tensor([text]), pixel_values=made["pixel_values"].double(), pixel_mask=made["pixel_mask"]
            ).pooler_output
            probability = model.itm_score(pooled).softmax(-1)[0, 1]
            assert_close(torch.tensor(found.scores[i, j]).sigmoid(), probability.detach())


def test_the_original():
    model = testing.random_weights(ViLTransformerSS()).eval().double()
    model.rank_output = testing.random_weights(torch.nn.Linear(32, 1), seed=3).double()
    process = scoring.processor(build("trunk"))
    ids, images = scoring.texts(), scoring.photographs()
    found = vilt_fast.score(model, ids, images, processor=process)
    expected = []
    with torch.no_grad():
        for text in ids:
            for image in images:
                pixels = process(image, return_tensors="pt")["pixel_values"].double()
                text_ids = torch.tensor([text])
                batch = {"text_ids": text_ids, "text_masks": torch.ones_like(text_ids), "text_labels": text_ids}
                expected.append(model.rank_output(model.infer(batch | {"image": [pixels]})["cls_feats"]))
    assert_close(torch.from_numpy(found.scores).flatten(), torch.cat(expected).flatten())


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("kind", ["retrieval", "question_answering"])
def test_the_same_to_the_last_bit_however_it_is_cut(kind, precision):
    """Other budgets, orders, lists of pairs and numbers of threads; each image and text once, or with others."""
    model = build(kind, torch.bfloat16 if precision == "bfloat16" else torch.float32, **WIDE)
    vilt_fast.accelerate(model, quantize="int8" if precision == "int8" else None)
    ids, images, process = scoring.texts(), scoring.photographs(), scoring.processor(model)
    model_scores = lambda *given, **more: vilt_fast.score(model, *given, processor=process, **more).scores  # noqa: E731
    whole = model_scores(ids, images)
    assert np.isfinite(whole).all()
    for budget in (1, 40, 100):
        assert np.array_equal(model_scores(ids, images, token_budget=budget), whole)
    assert np.array_equal(model_scores(ids[::-1], images[::-1])[::-1, ::-1], whole)
    pairs = np.random.default_rng(0).permutation([(t, i) for t in range(len(ids)) for i in range(len(images))])
    listed = model_scores(ids, images, pairs=pairs, token_budget=50)
    assert np.array_equal(listed, whole[pairs[:, 0], pairs[:, 1]])
    assert np.array_equal(model_scores(ids[3:4], images[1:2]), whole[3:4, 1:2])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert np.array_equal(model_scores(ids, images), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.get_num_threads() == threads


def test_each_is_prepared_once_and_forgotten(monkeypatch):
    """Of many images only those of a few tiles are there at a time, and each is decoded once."""
    model = build("retrieval", torch.float32)
    process, made, alive, most = scoring.processor(model), [], set(), []
    sizes = [(64, 64 + 16 * (n % 3)) for n in range(40)]

    def counted(image, **options):
        made.append(image)
        return process(image, **options)

    task = vilt_fast.models.find_pairs(model)
    image = type(task).image

    def watched(self, pixels, mask):
        import weakref

        rows = image(self, pixels, mask)
        alive.add(id(rows))
        weakref.finalize(rows, alive.discard, id(rows))
        most.append(len(alive))
        return rows

    monkeypatch.setattr(type(task), "image", watched)
    text = vilt_fast.models.vilt.task_pairs.TaskPairs.text
    texts = []
    monkeypatch.setattr(type(task), "text", lambda self, ids: texts.append(ids) or text(self, ids))
    monkeypatch.setattr(workers, "_KEPT_TEXTS", 1 << 20)
    found = vilt_fast.score(model, scoring.texts(), scoring.photographs(sizes), processor=counted, token_budget=64)
    assert found.scores.shape == (6, 40) and len(made) == 40
    assert max(most) <= 12
    assert len(texts) <= 2 * 6  # two threads may come for one together


def test_hooks_and_embeddings_of_another_make_are_called_whole():
    model = build("retrieval")
    ids, images, process = scoring.texts(), scoring.photographs(), scoring.processor(model)
    plain = vilt_fast.score(model, ids, images, processor=process).scores
    seen = []
    model.vilt.register_forward_hook(lambda module, given, output: seen.append(len(output.pooler_output)))
    with pytest.warns(UserWarning, match="one pair after the other.*forward hook"):
        found = vilt_fast.score(model, ids, images, processor=process).scores
    assert seen == [1] * found.size
    assert_close(torch.from_numpy(found), torch.from_numpy(plain))
    other = copy.deepcopy(build("retrieval"))
    other.vilt.embeddings.register_forward_hook(lambda module, given, output: (output[0] * 2, output[1]))
    with pytest.warns(UserWarning, match="one pair after the other"):
        doubled = vilt_fast.score(other, ids, images, processor=process).scores
    assert_close(torch.from_numpy(doubled), scoring.by_hand(other, ids, images, process)[..., 0])


def test_blocks_with_hooks_are_called_padded():
    model = build("retrieval")
    ids, images, process = scoring.texts(), scoring.photographs(), scoring.processor(model)
    plain = vilt_fast.score(model, ids, images, processor=process).scores
    model.vilt.encoder.layer[1].register_forward_hook(lambda module, given, output: output)
    assert_close(
        torch.from_numpy(vilt_fast.score(model, ids, images, processor=process).scores), torch.from_numpy(plain)
    )


def test_patches_that_are_drawn_are_drawn_alike_for_each_image():
    model = build("retrieval", torch.float32, max_image_length=3)
    ids, images, process = scoring.texts(), scoring.photographs(), scoring.processor(model)
    whole = vilt_fast.score(model, ids, images, processor=process).scores
    assert np.array_equal(vilt_fast.score(model, ids, images[3:], processor=process).scores, whole[:, 3:])


def test_autocast_of_the_caller_is_that_of_the_threads():
    model = build("retrieval", torch.float32)
    given = model, scoring.texts(), scoring.photographs()
    plain = vilt_fast.score(*given, processor=scoring.processor(model)).scores
    with torch.autocast("cpu", torch.bfloat16):
        rounded = vilt_fast.score(*given, processor=scoring.processor(model)).scores
    assert not np.array_equal(plain, rounded) and np.allclose(plain, rounded, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("error", [RuntimeError("kernel"), torch.OutOfMemoryError("full"), MemoryError(), KeyError(1)])
def test_what_goes_wrong_in_the_model_is_no_image_that_cannot_be_read(monkeypatch, error):
    model = build("retrieval", torch.float32)
    given = model, scoring.texts(), scoring.photographs()

    def failing(*arguments, **options):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(vilt_fast.models.vilt.task_pairs.TaskPairs, "image", failing)
        with pytest.raises(type(error)):
            vilt_fast.score(*given, processor=scoring.processor(model))
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        with pytest.raises(type(error)):
            vilt_fast.score(*given, processor=failing)
    else:
        with pytest.raises(InputError, match=f"none of the images can be read: image 0: {type(error).__name__}"):
            vilt_fast.score(*given, processor=failing)


def test_a_text_that_two_threads_come_for_takes_its_room_once():
    together = threading.Barrier(2)

    class Slow:
        device, dtype = torch.device("cpu"), torch.float32

        def why_whole(self):
            return ""

        def text(self, ids):
            together.wait(20)  # both of them have found that it is not there
            return torch.zeros(len(ids), 8)

    with workers.Workers(Slow(), [np.arange(3)], [], 64, 2, None) as busy:
        threads = [threading.Thread(target=busy._text, args=(0,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert workers._KEPT_TEXTS - busy._room == 3 * 8 * 4 and list(busy._texts) == [0]


def test_numbers_that_are_out_of_range(tmp_path):
    model = build("retrieval", torch.float32)
    ids, images = scoring.texts(), scoring.photographs()
    say = lambda match: pytest.raises(InputError, match=match)  # noqa: E731
    call = lambda *given, **more: vilt_fast.score(model, *given, processor=scoring.processor(model), **more)  # noqa: E731
    with say("no texts"):
        call([], images)
    with say("no images"):
        call(ids, [])
    with say("list of pairs is empty"):
        call(ids, images, pairs=[])
    with say("out of range: there are 6 texts and 5 images"):
        call(ids, images, pairs=[(0, 5)])
    with say("text 1 .* has 13 tokens; the model takes 1 to 12.*truncate=True"):
        call([[1], list(range(13))], images)
    cut = call([list(range(13))], images, truncate=True).scores
    assert np.array_equal(cut, call([list(range(12))], images).scores)
    with say("those of the model are 0 to 49"):
        call([[50]], images)
    with say("text 0 .* has 0 tokens"):
        call([[]], images)
    with say("token_budget must be at least 1"):
        call(ids, images, token_budget=0)
    with say("resume=True needs out="):
        call(ids, images, resume=True)
    with say("was not loaded from a checkpoint"):
        vilt_fast.score(model, ids, images)
    with say("strings need a tokenizer"):
        call(["a cat"], images)
    for texts, pictures in (("a cat", images), (ids, "cat.jpg"), ([["a"]], images), ([1.5], images), (ids, [3])):
        with pytest.raises(TypeError, match="score: "):
            call(texts, pictures)
    with pytest.raises(TypeError, match="scores no pairs"):
        vilt_fast.score(build("masked_lm"), ids, images)
    with pytest.raises(TypeError, match="pairs must be numbers"):
        call(ids, images, pairs=[("a", "b")])

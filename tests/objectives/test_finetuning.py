"""Question answering, NLVR2, retrieval and token classification: against losses written out, with every gradient."""

import copy

import pytest
import torch
from support import objectives as written
from support.finetuning import CLASSES, FALSE_TEXTS, LOSSES, batch, build
from support.models import assert_close
from torch import nn

import vilt_fast
from vilt_fast import InputError, functional, objectives

WAYS = {"plain": None, "accelerated": {}, "reference order": {"patch_order": "reference"}}


def expected(task, model, given):
    """The loss, sample by sample, from hidden states that were never padded."""
    losses = []
    for b in range(5):
        if task == "vqa":
            scores = model.classifier(written.of_sample(model.vilt, given, b)[2]).sigmoid()
            label = given["labels"][b]
            losses.append(-(label * scores.log() + (1 - label) * (1 - scores).log()).sum())
        elif task == "nlvr2":
            real = given["attention_mask"][b].bool()
            both = [
                written.hidden(
                    model.vilt, given["input_ids"][b][real], given["token_type_ids"][b][real],
                    given["pixel_values"][b, i], given["pixel_mask"][b, i], modality=i + 1,
                )[2]
                for i in range(2)
            ]  # fmt: skip
            losses.append(-model.classifier(torch.cat(both)).log_softmax(-1)[given["labels"][b]])
        elif task == "retrieval":
            texts = [(given["input_ids"][b], given["attention_mask"][b])]
            texts += list(zip(given["false_input_ids"][b], given["false_attention_mask"][b], strict=True))
            scores = []
            for ids, mask in texts:
                ids = ids[mask.bool()]
                image = given["pixel_values"][b], given["pixel_mask"][b]
                scores.append(model.rank_output(written.hidden(model.vilt, ids, torch.zeros_like(ids), *image)[2]))
            losses.append(-torch.cat(scores).log_softmax(0)[0])
        else:
            text, _, _ = written.of_sample(model.vilt, given, b)
            for place, label in enumerate(given["labels"][b].tolist()):
                if label != -100:
                    losses.append(-model.classifier(text[place]).log_softmax(-1)[label])
    return sum(losses) / len(losses)


@pytest.fixture(scope="module", params=CLASSES)
def case(request):
    """(task, model, loss, {parameter: gradient})."""
    model = build(request.param)
    loss = expected(request.param, model, batch(request.param))
    return request.param, model, loss.detach(), written.gradients(model, loss)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("how", WAYS)
def test_values_and_every_gradient(case, how, train):
    task, model, loss, gradients = case
    ours = copy.deepcopy(model) if WAYS[how] is None else written.accelerated(model, **WAYS[how])
    got = LOSSES[task](ours.train(train), batch(task))
    assert_close(got, loss, task)
    for name, gradient in written.gradients(ours, got).items():
        assert_close(gradient, gradients[name], name)


def test_the_image_of_all_texts_is_projected_once(monkeypatch):
    model, given = written.accelerated(build("retrieval")), batch("retrieval")
    patches, patch_embed = [], functional.patch_embed

    def counted(*args, **kwargs):
        patches.append(len(args[8]))
        return patch_embed(*args, **kwargs)

    monkeypatch.setattr(functional, "patch_embed", counted)
    objectives.retrieval_loss(model, given)
    assert patches == [sum(h * w for h, w in written.GRIDS)]
    model.vilt.embeddings.register_forward_hook(lambda *_: None)  # the module itself knows nothing of sharing
    hooked = objectives.retrieval_scores(model, given)
    assert len(patches) == 1
    assert_close(hooked, objectives.retrieval_scores(written.accelerated(build("retrieval")), given))


def test_each_text_drops_patches_of_its_own():
    model, given = build("retrieval"), batch("retrieval")
    given["false_input_ids"], given["false_attention_mask"] = (
        given[name][:, None].expand(-1, FALSE_TEXTS, -1) for name in ("input_ids", "attention_mask")
    )
    vilt_fast.accelerate(model).train()
    same = objectives.retrieval_scores(model, given)
    assert_close(same, same[:, :1].expand_as(same))
    model.vilt.embeddings.dropout.p = 0.1
    torch.manual_seed(0)
    scores = objectives.retrieval_scores(model, given)
    assert all(len(set(row.tolist())) == 1 + FALSE_TEXTS for row in scores)
    torch.manual_seed(0)
    assert torch.equal(objectives.retrieval_scores(model, given), scores)


def test_without_text_masks_and_with_bfloat16():
    model, given = build("retrieval"), batch("retrieval")
    whole = {k: v for k, v in given.items() if not k.endswith("attention_mask")}
    ones = {k: torch.ones_like(given[k]) for k in ("attention_mask", "false_attention_mask")}
    for ours in (model, written.accelerated(model)):
        assert_close(objectives.retrieval_scores(ours, whole), objectives.retrieval_scores(ours, whole | ones))
    for task, loss in LOSSES.items():
        ours = written.accelerated(build(task, torch.bfloat16))
        assert loss(ours, batch(task, torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("how", ["plain", "accelerated"])
def test_token_heads_that_are_not_known_and_no_label(how):
    model, given = build("token"), batch("token")
    ours = model if how == "plain" else written.accelerated(model)
    none = objectives.token_classification_loss(ours, given | {"labels": torch.full_like(given["labels"], -100)})
    none.backward()
    assert none == 0 and not any(p.grad.any() for p in ours.parameters() if p.grad is not None)
    loss, heard = objectives.token_classification_loss(ours, given), []
    ours.classifier.register_forward_hook(lambda module, args, out: heard.append(args[0].shape))
    assert_close(objectives.token_classification_loss(ours, given), loss)
    assert heard == [(5, written.TEXT, 32)]


BAD = [
    ("vqa", {"labels": None}, InputError, "has no labels"),
    ("vqa", {"labels": torch.ones(5, 5).long()}, InputError, "floating scores"),
    ("vqa", {"labels": torch.full((5, 5), 1.5)}, InputError, r"scores in \[0, 1\], got values from 1.5"),
    ("vqa", {"labels": torch.full((5, 5), float("nan"))}, InputError, r"scores in \[0, 1\]"),
    ("vqa", {"labels": torch.ones(5, 4)}, InputError, r"labels must be \[5, 5\], got \[5, 4\]"),
    ("nlvr2", {"labels": torch.tensor([0, 1, 5, 0, 1])}, InputError, r"labels must be in \[0, 5\), got .* 0 to 5"),
    ("nlvr2", {"labels": torch.zeros(4).long()}, InputError, r"labels must be \[5\], got \[4\]"),
    ("nlvr2", {"labels": torch.zeros(5)}, InputError, "labels must be integers"),
    ("retrieval", {"false_input_ids": None}, InputError, "has no false_input_ids"),
    ("retrieval", {"false_input_ids": torch.zeros(5, 3, 8).long()}, InputError, r"must be \[5, \*, 9\]"),
    ("retrieval", {"false_attention_mask": torch.ones(5, 2, 9)}, InputError, "false_attention_mask must be"),
    ("token", {"labels": torch.full((5, 9), 5)}, IndexError, "label 5 is outside 0..4"),
    ("token", {"labels": torch.zeros(5, 9)}, InputError, "labels must be int64"),
    ("token", {"labels": torch.zeros(5, 9).long()}, ValueError, "labels name padding"),
]


@pytest.mark.parametrize("task, change, error, message", BAD)
def test_bad_input(task, change, error, message):
    given = batch(task) | change
    if error is IndexError:
        given["labels"] = given["labels"].masked_fill(given["attention_mask"] == 0, -100)
    with pytest.raises(error, match=message):
        LOSSES[task](written.accelerated(build(task)), given)


def test_models_that_do_not_fit():
    for task in ("retrieval", "token"):
        with pytest.raises(TypeError, match="DataParallel wraps a model"):
            LOSSES[task](nn.DataParallel(build(task)), batch(task))
        with pytest.raises(TypeError, match="ViltForQuestionAnswering has no"):
            LOSSES[task](build("vqa"), batch(task))

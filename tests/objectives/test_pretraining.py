"""Masked language modelling, matching, alignment and their sum, against the original's losses written out."""

import copy

import pytest
import torch
from support import objectives as written
from support.models import assert_close
from torch import nn

import vilt_fast
from vilt_fast import InputError, objectives
from vilt_fast.objectives import ViltForPreTraining, itm_labels, pretraining_loss
from vilt_fast.testing import random_weights

LABELS = torch.tensor([0, 1, 1, 0, 0])
WAYS = {
    "plain": None,
    "accelerated": {},
    "two forwards": {"patch_order": "reference"},
    "with padding": {"padding": "reference"},
}
PARTS = {
    "mlm": written.mlm,
    "itm": lambda m, g: written.itm(m, g, LABELS),
    "wpa": lambda m, g: written.wpa(m, g, LABELS),
}
FLOAT32 = 2e-6  #: alignment is float32 in every model: gradients of it are held to that, relative to the largest


@pytest.fixture(scope="module")
def model():
    return written.build(ViltForPreTraining)


@pytest.fixture(scope="module")
def expected(model):
    """{part: (loss, {parameter: gradient})} of the losses written out."""
    given, found = written.batch(), {}
    for part, function in PARTS.items():
        loss = function(model, given)
        found[part] = loss.detach(), written.gradients(model, loss)
    return found


def ways(model, how):
    return copy.deepcopy(model) if WAYS[how] is None else written.accelerated(model, **WAYS[how])


def assert_gradients(got, parts, expected):
    """The sum of these parts' gradients, to float64 without alignment and to float32 with it."""
    for name, gradient in got.items():
        want = sum(expected[part][1][name] for part in parts)
        if "wpa" in parts:
            allowed = FLOAT32 * max(expected["wpa"][1][n].abs().max().item() for n in got)
            torch.testing.assert_close(gradient, want, rtol=0, atol=allowed, msg=name)
        else:
            assert_close(gradient, want, name)


@pytest.mark.parametrize("parts", [("mlm",), ("itm",), ("wpa",), ("mlm", "itm"), ("mlm", "itm", "wpa")])
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("train", [False, True])
def test_values_and_every_gradient(model, expected, how, parts, train):
    ours = ways(model, how).train(train)
    given = written.batch() | {"itm_labels": LABELS}
    out = pretraining_loss(
        ours, given, weights=dict.fromkeys(objectives.pretraining.PARTS, 0) | dict.fromkeys(parts, 1)
    )
    for part in PARTS:
        got = getattr(out, f"{part}_loss")
        if part not in parts:
            assert got is None
        elif part == "wpa":
            torch.testing.assert_close(got, expected[part][0].float(), rtol=1e-5, atol=1e-6)
        else:
            assert_close(got, expected[part][0], part)
    torch.testing.assert_close(out.loss, sum(expected[part][0] for part in parts), check_dtype=False, rtol=1e-5, atol=0)
    assert_gradients(written.gradients(ours, out.loss), parts, expected)


def test_one_packed_forward_of_both_and_weights(model, expected, monkeypatch):
    ours, given = ways(model, "accelerated"), written.batch() | {"itm_labels": LABELS}
    batches, run = [], type(ours.vilt.forward).run

    def counted(self, images, *args, **kwargs):
        result = run(self, images, *args, **kwargs)
        batches.append((result.plan.batch, len(images[0].pixel_values), len(result.texts)))
        return result

    monkeypatch.setattr(type(ours.vilt.forward), "run", counted)
    out = pretraining_loss(ours, given, weights={"mlm": 2, "itm": 0.5, "wpa": 3})
    # Ten samples, five true images and the three false ones that are used, five labelled tokens.
    assert batches == [(10, 8, 5)]
    want = 2 * out.mlm_loss + 0.5 * out.itm_loss + 3 * out.wpa_loss
    torch.testing.assert_close(out.loss, want)
    hooked = ways(model, "accelerated")
    hooked.vilt.encoder.layer[1].register_forward_hook(lambda *_: None)
    again = pretraining_loss(hooked, given)
    assert [size for size, *_ in batches[1:]] == [5, 5]
    assert_close(again.mlm_loss, expected["mlm"][0])


@pytest.mark.parametrize("how", ["plain", "accelerated"])
@pytest.mark.parametrize("change", ["hook on the decoder", "a head of another make", "LoRA-like decoder"])
def test_a_head_that_is_not_known_is_called_itself(model, how, change):
    ours, theirs, heard = ways(model, how), copy.deepcopy(model), []
    for m in (ours, theirs):
        if change == "hook on the decoder":
            m.mlm_score.decoder.register_forward_hook(lambda module, args, out: heard.append(args[0].shape) or out * 2)
        elif change == "a head of another make":
            m.mlm_score = nn.Sequential(m.mlm_score, Mixing().double())
        else:
            torch.nn.utils.parametrize.register_parametrization(m.mlm_score.decoder, "weight", Doubled())
    loss, want = objectives.mlm_loss(ours, written.batch()), padded_mlm(theirs, written.batch())
    assert_close(loss, want)
    got, want = written.gradients(ours, loss), written.gradients(theirs, want)
    for name in want:
        assert_close(got[name], want[name], name)
    if heard:
        assert heard[0] == heard[1] == (5, written.TEXT, 32)


class Mixing(nn.Module):
    """Adds to each token what the sample's first one has."""

    def forward(self, logits):
        return logits + logits[:, :1]


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def padded_mlm(model, given):
    """HuggingFace's own way: logits of all text tokens."""
    names = ("attention_mask", "token_type_ids", "pixel_values", "pixel_mask")
    hidden = model.vilt(input_ids=given["mlm_input_ids"], **{name: given[name] for name in names}).last_hidden_state
    logits = model.mlm_score(hidden[:, : written.TEXT])
    return nn.functional.cross_entropy(logits.flatten(0, 1), given["labels"].flatten())


def test_soft_labels_and_another_denominator(model):
    given = written.batch()
    labelled = given["labels"] != -100
    hard = nn.functional.one_hot(given["labels"][labelled], 50).double()
    for how in ("plain", "accelerated"):
        ours = ways(model, how)
        loss = objectives.mlm_loss(ours, given)
        assert_close(objectives.mlm_loss(ours, given | {"soft_labels": hard}), loss)
        assert_close(objectives.mlm_loss(ours, given, num_items=20), loss * 5 / 20)
        soft = hard.roll(1, 0) * 0.25 + hard * 0.75
        other = objectives.mlm_loss(ours, given | {"labels": torch.full_like(given["labels"], -100).masked_scatter(
            labelled, given["labels"][labelled].roll(1))})  # fmt: skip
        assert_close(objectives.mlm_loss(ours, given | {"soft_labels": soft}), 0.75 * loss + 0.25 * other)
        with pytest.raises(InputError, match=r"soft_labels must be floating \[5, vocabulary\]"):
            objectives.mlm_loss(ours, given | {"soft_labels": hard[:4]})


@pytest.mark.parametrize("how", WAYS)
def test_no_labelled_token_is_loss_0_with_gradient_0(model, how):
    ours, given = ways(model, how), written.batch() | {"itm_labels": LABELS}
    given["labels"] = torch.full_like(given["labels"], -100)
    loss = objectives.mlm_loss(ours, given)
    assert loss == 0
    loss.backward()
    found = [p.grad for p in ours.parameters() if p.grad is not None]
    assert found and not any(g.isnan().any() or g.any() for g in found)
    together = []  # matching and alignment learn from such a batch what they do without the words
    for weights in ({}, {"mlm": 0}):
        ours.zero_grad()
        out = pretraining_loss(ours, given, weights=weights)
        assert not out.mlm_loss
        out.loss.backward()
        together.append({n: p.grad for n, p in ours.named_parameters() if p.grad is not None and p.grad.any()})
    assert together[0].keys() == together[1].keys()
    for name, gradient in together[0].items():
        torch.testing.assert_close(gradient, together[1][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("size, pairs", [(1, 0), (2, 1), (5, 2), (8, 4)])
def test_exactly_half_rounded_down_are_pairs(size, pairs):
    draw = torch.Generator().manual_seed(0)
    drawn = [itm_labels(size, draw) for _ in range(40)]
    assert all(len(labels) == size and labels.sum() == pairs for labels in drawn)
    if size > 1:
        assert len({tuple(labels.tolist()) for labels in drawn}) > 1
    torch.manual_seed(7)
    first = itm_labels(size)
    torch.manual_seed(7)  # the original's own draw
    assert torch.equal(first, torch.cat([torch.ones(pairs), torch.zeros(size - pairs)])[torch.randperm(size)].long())


def test_one_seed_one_run(model):
    ours = ways(model, "accelerated").train()
    for module in ours.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        out = pretraining_loss(ours, written.batch(), generator=torch.Generator().manual_seed(seed))
        runs.append((out.loss.item(), out.itm_labels.tolist()))
    assert runs[0] == runs[1] != runs[2]


def test_a_batch_of_one_has_no_pair(model):
    for how in WAYS:
        ours, given = ways(model, how), written.batch(size=1)
        out = pretraining_loss(ours, given)
        assert out.itm_labels.tolist() == [0]
        assert_close(out.itm_loss, written.itm(model, given, torch.tensor([0])))
        torch.testing.assert_close(out.wpa_loss, written.wpa(model, given, torch.tensor([0])), rtol=1e-5, atol=1e-6)


def test_autocast_and_bfloat16(model):
    plain = copy.deepcopy(model).float()
    given = written.batch(torch.float32) | {"itm_labels": LABELS}
    exact = pretraining_loss(model, written.batch() | {"itm_labels": LABELS})
    for ours, autocast in ((written.accelerated(plain), True), (written.accelerated(plain).bfloat16(), False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = pretraining_loss(ours, given)
        assert {out.loss.dtype, out.mlm_loss.dtype, out.itm_loss.dtype, out.wpa_loss.dtype} == {torch.float32}
        torch.testing.assert_close(out.mlm_loss, exact.mlm_loss.float(), rtol=0.05, atol=0)
        out.loss.backward()


def test_the_model_itself(model, tmp_path):
    """Its forward is the loss; what it saves is what it loads, and what HuggingFace's own class loads."""
    from transformers import ViltForMaskedLM

    given = written.batch() | {"itm_labels": LABELS}
    for ours in (model, ways(model, "accelerated")):
        out, want = ours(**given), pretraining_loss(model, given)
        assert_close(out.loss, want.loss)
        assert_close(ours(**given, return_dict=False)[0], want.loss)
        soft = torch.rand(int((given["labels"] != -100).sum()), 50, dtype=torch.float64).softmax(-1)
        assert_close(ours(**given, soft_labels=soft).loss, pretraining_loss(model, given | {"soft_labels": soft}).loss)
        text = {k: given[k] for k in ("input_ids", "attention_mask", "token_type_ids", "pixel_values", "pixel_mask")}
        logits = ours(**text)
        assert logits.mlm_logits.shape == (5, written.TEXT, 50) and logits.itm_logits.shape == (5, 2)
        assert_close(logits.itm_logits, torch.stack([
            model.itm_score(written.of_sample(model.vilt, given, b)[2]) for b in range(5)]))  # fmt: skip
    model.save_pretrained(tmp_path)
    again = ViltForPreTraining.from_pretrained(tmp_path).double()
    assert again.mlm_score.decoder.weight is again.vilt.embeddings.text_embeddings.word_embeddings.weight
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    other = ViltForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(other.mlm_score.transform.dense.weight, model.mlm_score.transform.dense.weight.float())


BAD = {
    "a label beyond the vocabulary": ({"labels": (0, 2, 50)}, IndexError, "label 50 is outside 0..49"),
    "a negative label": ({"labels": (0, 2, -1)}, IndexError, "label -1 is outside"),
    "a label of padding": ({"labels": (1, 8, 4)}, ValueError, "labels name padding"),
    "labels of another shape": ({"labels": torch.zeros(5, 8).long()}, InputError, r"labels must be \[5, 9\]"),
    "labels that are no ids": ({"labels": torch.zeros(5, 9)}, InputError, "labels must be int64"),
    "no labels": ({"labels": None}, InputError, "the batch has no labels"),
    "no false images": ({"false_pixel_values": None}, InputError, "has no false_pixel_values"),
    "too few false images": ({"false_pixel_values": torch.zeros(4, 3, 64, 64)}, InputError, "false_pixel_values must"),
    "a mask of another size": ({"false_pixel_mask": torch.ones(5, 8, 8)}, InputError, "false_pixel_mask must be"),
    "matching labels": ({"itm_labels": torch.tensor([0, 1, 2, 0, 1])}, InputError, r"itm_labels must be in \[0, 2\)"),
    "no images": ({"pixel_values": None}, InputError, "has no pixel_values"),
    "images below a patch": (
        {"pixel_values": torch.zeros(5, 3, 8, 64), "pixel_mask": None},
        InputError,
        "pixel_values of 8x64 hold no",
    ),  # fmt: skip
    "false images below a patch": (
        {"false_pixel_values": torch.zeros(5, 3, 64, 8), "false_pixel_mask": None},
        InputError,
        "of 64x8 hold no",
    ),  # fmt: skip
    "a false image of nothing": ({"false_pixel_mask": torch.zeros(5, 64, 48)}, InputError, "is empty"),
    "no text": ({"input_ids": None, "mlm_input_ids": None}, InputError, "has no input_ids"),
    "lists": ({"labels": [[1]]}, TypeError, "labels must be a tensor, got list"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(model, what):
    change, error, message = BAD[what]
    given = written.batch()
    for name, value in change.items():
        if isinstance(value, tuple):
            b, place, label = value
            value = given[name].clone()
            value[b, place] = label
        given[name] = value
    with pytest.raises(error, match=message):
        pretraining_loss(ways(model, "accelerated"), given)


def test_models_and_weights_that_do_not_fit(model):
    from transformers import ViltForMaskedLM

    given = written.batch()
    with pytest.raises(TypeError, match="ViltForMaskedLM has no itm_score"):
        pretraining_loss(written.build(ViltForMaskedLM), given)
    with pytest.raises(TypeError, match="Linear has no vilt and mlm_score"):
        objectives.mlm_loss(nn.Linear(2, 2), given)
    with pytest.raises(TypeError, match="DataParallel wraps a model"):
        pretraining_loss(nn.DataParallel(model), given)
    for weights, message in (({"ipot": 1}, "no 'ipot'"), (dict.fromkeys(("mlm", "itm", "wpa"), 0), "more than 0")):
        with pytest.raises(ValueError, match=message):
            pretraining_loss(model, given, weights=weights)
    with pytest.raises(InputError, match="mlm_input_ids and soft_labels need labels"):
        model(input_ids=given["input_ids"], pixel_values=given["pixel_values"], mlm_input_ids=given["input_ids"])
    with pytest.raises(TypeError, match="token_type_ids must be a tensor, got list"):
        model(**given | {"token_type_ids": given["attention_mask"].tolist()})


def test_labels_of_padding_where_padding_is_computed(model):
    given = written.batch()
    given["labels"][1, 8] = 4
    ours = ways(model, "plain")
    want = objectives.mlm_loss(ours, given)
    assert_close(objectives.mlm_loss(written.accelerated(model, padding="reference"), given), want)
    assert_close(padded_mlm(ours, given), want)
    vilt_fast.accelerate(ours)
    with pytest.raises(ValueError, match="labels name padding"):
        objectives.mlm_loss(ours, given)


def test_sampled_patches(model):
    ours = random_weights(ViltForPreTraining(copy.copy(model.config))).double().eval()
    ours.vilt.embeddings.config.max_image_length = 4
    vilt_fast.accelerate(ours, generator=torch.Generator().manual_seed(0))
    losses = {pretraining_loss(ours, written.batch() | {"itm_labels": LABELS}).itm_loss.item() for _ in range(3)}
    assert len(losses) == 3

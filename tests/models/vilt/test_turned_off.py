"""Turned off and on again: `restored`, VILT_FAST_DISABLE=1, and what `repr` says of a model."""

import copy
import logging

import pytest
import torch
from support.copies import pickled
from support.models import KINDS, assert_same_structure, batch, build, call, leaves
from support.original_vilt import ViLTransformerSS

import vilt_fast
from vilt_fast import functional, record
from vilt_fast.models.base import swap_of


def swaps(model):
    return {name: m.forward for name, m in model.named_modules() if swap_of(m) is not None}


def attributes(model):
    return {name: dict(module.__dict__) for name, module in model.named_modules()}


def equal(first, second):
    assert_same_structure(first, second)
    return all(
        a is b is None or torch.equal(a, b) for (_, a), (_, b) in zip(leaves(first), leaves(second), strict=True)
    )


# --- restored ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_its_own_within_and_accelerated_after(kind):
    theirs, ours = build(kind), vilt_fast.accelerate(build(kind))
    before = attributes(ours)
    fast = call(ours, batch(kind))
    with vilt_fast.restored(ours) as model:
        assert model is ours and not swaps(ours) and "accelerated" not in repr(ours)
        assert equal(call(ours, batch(kind)), call(theirs, batch(kind)))
        with vilt_fast.restored(ours):
            assert not swaps(ours)
        assert not swaps(ours)
    assert attributes(ours) == before
    assert equal(call(ours, batch(kind)), fast)


def test_it_is_accelerated_after_an_exception():
    ours = vilt_fast.accelerate(build("question_answering"))
    before = attributes(ours)
    with pytest.raises(KeyError), vilt_fast.restored(ours):
        raise KeyError
    assert attributes(ours) == before
    with pytest.raises(TypeError, match="restored takes a torch.nn.Module"), vilt_fast.restored("a model"):
        pass


def test_copies_of_weights_are_kept_on(monkeypatch):
    made, quantize_linear = [], functional.quantize_linear
    monkeypatch.setattr(functional, "quantize_linear", lambda w: made.append(w) or quantize_linear(w))
    ours = vilt_fast.accelerate(build("trunk", torch.float32), quantize="int8")
    with torch.no_grad():
        before = call(ours, batch("trunk", torch.float32))
        with vilt_fast.restored(ours):
            call(ours, batch("trunk", torch.float32))
        assert len(made) == 19 and equal(call(ours, batch("trunk", torch.float32)), before)
        assert len(made) == 19


def test_what_is_accelerated_within_has_the_old_options_after():
    ours = vilt_fast.accelerate(build("question_answering", torch.float32), quantize="int8")
    before = attributes(ours)
    with vilt_fast.restored(ours):
        vilt_fast.accelerate(ours)
    assert attributes(ours) == before and ours.vilt.forward.options.quantize == "int8"


def test_a_method_that_somebody_has_put_in_its_place_is_not_lost():
    ours = vilt_fast.accelerate(build("question_answering"))

    def mine(**inputs):
        return "mine"

    with pytest.raises(TypeError, match="ViltForQuestionAnswering was given a forward of its own"):
        with vilt_fast.restored(ours):
            ours.forward = mine
    assert ours(pixel_values=None) == "mine" and list(swaps(ours.vilt)) == [""]


# --- VILT_FAST_DISABLE ------------------------------------------------------------------------------------------------


@pytest.fixture
def disabled(monkeypatch):
    record.say_disabled.cache_clear()
    monkeypatch.setenv("VILT_FAST_DISABLE", "1")
    yield monkeypatch
    record.say_disabled.cache_clear()


@pytest.mark.filterwarnings("ignore:vilt_fast. int8")
@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_computed_as_by_huggingface(kind, disabled, caplog):
    theirs, ours = build(kind), vilt_fast.accelerate(build(kind), quantize="int8")
    plan = vilt_fast.sequence_plan(ours, **batch(kind))
    flags = {"output_hidden_states": True, "output_attentions": True}
    expected = call(theirs, batch(kind), **flags)
    assert equal(call(ours, batch(kind), **flags), expected)
    assert equal(call(ours, batch(kind), sequence_plan=plan, **flags), expected)
    (only,) = [r for r in caplog.records if r.name == "vilt_fast"]
    assert only.levelno == logging.WARNING and "VILT_FAST_DISABLE=1" in only.message
    for given in ({}, batch(kind)):
        rows = vilt_fast.explain(ours, **given).rows
        assert rows and all(r.way == "own" and r.why == "VILT_FAST_DISABLE=1 is set" for r in rows)
    assert "but VILT_FAST_DISABLE=1 is set" in repr(ours)
    disabled.delenv("VILT_FAST_DISABLE")
    assert not equal(call(ours, batch(kind), **flags), expected)


def test_the_original_too(disabled):
    torch.manual_seed(0)
    ours = ViLTransformerSS().eval()
    theirs = copy.deepcopy(ours)
    vilt_fast.accelerate(ours)
    ids = torch.ones(2, 5, dtype=torch.long)
    given = {"text_ids": ids, "text_masks": ids, "text_labels": ids, "image": [torch.rand(2, 3, 48, 48)]}
    results = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        results.append(model(given)["cls_feats"])
    assert torch.equal(*results)


def test_what_cannot_be_accelerated_is_still_refused(disabled):
    with pytest.raises(TypeError, match="contains no ViLT model"):
        vilt_fast.accelerate(torch.nn.Linear(2, 2))


# --- repr -------------------------------------------------------------------------------------------------------------


def test_repr_says_what_is_accelerated_and_how():
    ours = build("question_answering")
    plain = repr(ours)
    vilt_fast.accelerate(ours, quantize="int8", patch_order="reference")
    said = repr(ours)
    line = "accelerated by vilt_fast; quantize='int8', patch_order='reference'"
    assert [text.strip() for text in said.splitlines()[1:4]] == [line, "(vilt): ViltModel(", line]
    assert said.count(line) == 2
    for twin in (copy.copy(ours), copy.deepcopy(ours), pickled(ours)):
        assert repr(twin) == said
        assert repr(vilt_fast.restore(twin)) != said
    vilt_fast.accelerate(ours)
    assert repr(ours).splitlines()[1].strip() == "accelerated by vilt_fast"
    vilt_fast.restore(ours)
    assert repr(ours) == plain


def test_an_extra_repr_of_the_users_own_stays():
    ours = build("trunk")
    ours.extra_repr = lambda: "mine"
    vilt_fast.accelerate(ours)
    assert repr(ours).splitlines()[1].strip() == "mine"
    twin = copy.copy(ours)
    for model in (twin, ours):
        vilt_fast.restore(model)
        assert repr(model).splitlines()[1].strip() == "mine"

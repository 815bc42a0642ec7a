"""CUDA graphs of whole forwards, asked for or not: what is in them, what makes them stale, what goes wrong.

As in test_graphs.py, a plain call stands in for a graph where there is no GPU.
"""

import dataclasses
import gc
import warnings
import weakref

import pytest
import torch
from support.graphs import (
    GPU,
    Again,
    assert_same,
    cache,
    call_quietly,
    in_place,
    inputs_of,
    small,
    through_data,
)
from support.models import batch, call
from torch import nn

import vilt_fast
from vilt_fast.engine import graphs
from vilt_fast.models.vilt import whole

# --- whole forwards ---------------------------------------------------------------------------------------------------

TASKS = ["trunk", "trunk_without_pooler", "question_answering", "retrieval", "masked_lm", "token_classification"]


def kinds(model):
    trunk = model if hasattr(model, "embeddings") else model.vilt
    return {key[0] for key in trunk.forward.graphs._graphs}


@pytest.mark.parametrize("padding", ["zero", "reference"])
@pytest.mark.parametrize("kind", TASKS)
def test_a_task_is_one_graph_and_so_is_a_trunk(kind, padding, device):
    plain, model = small(device, kind, padding=padding)
    for seed, samples in enumerate(([0, 1, 2, 3], [1], [3, 0], [0, 1, 2, 3], [2])):
        inputs = {k: v[samples].to(device) for k, v in batch(kind, torch.float32, seed=seed).items()}
        assert_same(model, plain, inputs)
        inputs["token_type_ids"] = None
        assert_same(model, plain, inputs)
    assert kinds(model) == {"whole" if kind.startswith("trunk") else "whole with its head"}
    with torch.no_grad():
        rows = vilt_fast.explain(model, **inputs).rows
    assert {row.way for row in rows} == {"CUDA graph"}


def test_the_canvas_and_the_padded_width_are_none_of_the_graph(device):
    """Images of the same patches on a larger canvas, texts of the same tokens in a longer one; other pixels."""
    plain, model = small(device)
    assert_same(model, plain, inputs_of(device))
    wider = inputs_of(device)
    wider["pixel_values"] = nn.functional.pad(wider["pixel_values"], (0, 40, 0, 23), value=float("nan"))
    wider["pixel_mask"] = nn.functional.pad(wider["pixel_mask"], (0, 40, 0, 23))
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        wider[name] = nn.functional.pad(wider[name], (0, 2))
    torch.testing.assert_close(
        call_quietly(model, wider).pooler_output, call_quietly(model, inputs_of(device)).pooler_output
    )
    assert len(cache(model)) == 1
    assert_same(model, plain, inputs_of(device) | {"pixel_values": inputs_of(device)["pixel_values"].double()})
    assert len(cache(model)) == 2


def test_plans_take_turns_in_one_graph(device):
    """What is known to lie in its buffers is what was written last: other masks, other patches, patches drawn."""
    plain, model = small(device)
    full = inputs_of(device) | {"pixel_mask": torch.ones_like(inputs_of(device)["pixel_mask"])}
    assert vilt_fast.sequence_plan(model, **full).in_order
    holed = inputs_of(device)
    holed["attention_mask"] = holed["attention_mask"].flip(1)
    given = [inputs_of(device), holed, full]
    drawn = dataclasses.replace(vilt_fast.sequence_plan(model, **full), in_order=False)
    for inputs in (*given, *reversed(given), *given):
        assert_same(model, plain, inputs)
        assert_same(model, plain, {name: tensor.roll(1, 0) for name, tensor in inputs.items()})
        assert_same(model, plain, inputs)
    for _ in range(2):  # a plan of the caller's own, that says less
        for plan in (vilt_fast.sequence_plan(model, **full), drawn):
            ours, theirs = call_quietly(model, full | {"sequence_plan": plan}), call_quietly(plain, full)
            torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state)
    assert len(cache(model)) < 4


def test_who_fails_while_writing_leaves_nothing_behind(device):
    plain, model = small(device)
    first, other = inputs_of(device), inputs_of(device)
    other["attention_mask"] = other["attention_mask"].flip(1)
    plans = [vilt_fast.sequence_plan(model, **inputs) for inputs in (first, other)]
    before = call_quietly(model, first | {"sequence_plan": plans[0]}).pooler_output
    broken = dataclasses.replace(plans[1], text_source=plans[1].text_source.to(torch.int16))  # which nothing gathers by
    with pytest.raises(RuntimeError):
        call_quietly(model, other | {"sequence_plan": broken})
    assert torch.equal(call_quietly(model, first | {"sequence_plan": plans[0]}).pooler_output, before)


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("kind", "change", "expected"),
    [
        ("question_answering", lambda m: m.classifier.append(Doubled(5, 5)), "whole with its head"),
        ("question_answering", lambda m: m.vilt.pooler.dense.register_forward_hook(lambda *_: None), "blocks"),
        ("trunk", lambda m: setattr(m, "layernorm", nn.Sequential(m.layernorm)), "blocks"),
        ("nlvr2", lambda m: None, "blocks"),
        ("trunk", lambda m: m.embeddings.text_embeddings.register_forward_hook(lambda *_: None), "blocks"),
    ],
)
def test_what_cannot_be_in_the_graph_stays_outside(kind, change, expected, device):
    plain, model = small(device, kind)
    for m in (plain, model):
        torch.manual_seed(1)
        change(m)
        m.to(device).eval()
    for _ in range(2):
        assert_same(model, plain, {k: v.to(device) for k, v in batch(kind, torch.float32).items()})
    assert kinds(model) == {expected}
    if expected.startswith("whole"):
        with torch.no_grad():
            *_, head = vilt_fast.explain(model, **batch(kind, torch.float32)).rows
        assert head.part == "head" and head.way == "packed"


@pytest.mark.parametrize("where", ["embeddings", "layernorm", "pooler", "classifier"])
def test_changes_around_the_blocks_are_seen(where, device):
    plain, model = small(device, "question_answering")
    inputs = {k: v.to(device) for k, v in batch("question_answering", torch.float32).items()}
    before = assert_same(model, plain, inputs).logits
    for m in (plain, model):
        part = m.classifier if where == "classifier" else getattr(m.vilt, where)
        through_data(part)
    after = assert_same(model, plain, inputs).logits
    assert not torch.allclose(before, after)
    for m in (plain, model):
        in_place(m)
        m.classifier[2].approximate = "tanh" if where == "classifier" else "none"
    assert_same(model, plain, inputs)
    for m in (plain, model):
        m.vilt.pooler.dense.weight = nn.Parameter(m.vilt.pooler.dense.weight.detach() + 0.01)
    assert_same(model, plain, inputs)


def test_a_model_that_is_restored_and_accelerated_again_replays_nothing_old(device):
    plain, model = small(device)
    assert_same(model, plain, inputs_of(device))
    with vilt_fast.restored(model):
        through_data(model)
    through_data(plain)
    assert_same(model, plain, inputs_of(device))
    vilt_fast.restore(model)
    vilt_fast.accelerate(model)
    assert len(cache(model)) == 0
    assert_same(model, plain, inputs_of(device))


class Once:
    """A recording that forgets what it was made of, as a real one does."""

    def __init__(self, function, device, pool):
        self.result = function()

    def replay(self):
        pass


def test_a_model_is_not_kept_alive(device, monkeypatch):
    if not GPU:
        monkeypatch.setattr(graphs, "Recording", Once)
    _, model = small(device)
    call_quietly(model, inputs_of(device))
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


# --- asked for, or not ------------------------------------------------------------------------------------------------


def automatic(device, kind="trunk"):
    plain, model = small(device, kind)
    return plain, vilt_fast.accelerate(vilt_fast.restore(model))


def test_graphs_are_the_default_and_say_nothing(device):
    plain, model = automatic(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(model, plain, inputs_of(device))
        assert len(cache(model)) == 1
        call(model, inputs_of(device))  # gradients
        model.encoder.layer[0].register_forward_hook(lambda *_: None)
        call_quietly(model, inputs_of(device))
    assert vilt_fast.accelerate(model, cuda_graphs=False).forward.graphs is None


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
@pytest.mark.parametrize("make", [automatic, small])
def test_a_capture_that_fails_is_said_once_and_leaves_the_model_working(make, error, device, monkeypatch):
    plain, model = make(device)
    tried = []

    def fails(function, device, pool):
        tried.append(1)
        raise error("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "Recording", fails)
    with pytest.warns(UserWarning, match="is off from now on: a capture has failed .operation not permitted") as said:
        for samples in ([0, 1, 2], [0], [0, 1, 2]):
            assert_same(model, plain, inputs_of(device, samples))
    assert len(said) == len(tried) == 1 and len(cache(model)) == 0
    with torch.no_grad():
        row = next(row for row in vilt_fast.explain(model, **inputs_of(device)).rows if row.part == "block 0")
    assert row.way == "packed" and (device == "cpu" or "has failed" in row.why)


def test_a_shape_outside_every_bucket_runs_as_it_is(device, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_ROWS", 64)
    monkeypatch.setattr(whole, "MOST_ROWS", 64)
    plain, model = automatic(device)
    assert_same(model, plain, inputs_of(device))
    assert len(cache(model)) == 0
    _, insists = small(device)
    with pytest.warns(UserWarning, match="rows are more than a graph is captured for"):
        call_quietly(insists, inputs_of(device))


def test_captures_that_do_not_pay_are_not_made(device, monkeypatch):
    monkeypatch.setattr(graphs, "FREE", 2)
    monkeypatch.setattr(graphs, "PAID_BY", 3)
    plain, model = automatic(device)
    for _ in range(2):
        for samples in ([0, 1, 2, 3], [0], [1, 3]):
            assert_same(model, plain, inputs_of(device, samples))
    assert len(cache(model)) == 3 and Again.made == (0 if GPU else 3)  # the third when the first two had been replayed
    monkeypatch.setattr(graphs, "PAID_BY", 1000)
    _, other = automatic(device)
    for samples in ([0, 1, 2, 3], [0], [1, 3]):
        assert_same(other, plain, inputs_of(device, samples))
    assert len(cache(other)) == 2

"""Heads that read some rows get those alone from the last block; who reads or hears more gets all."""

import pytest
import torch
from support.graphs import played
from support.models import (
    PER_TOKEN,
    assert_same_gradients,
    assert_same_output,
    batch,
    build,
    call,
    gradients,
    labels,
    pair,
    real_positions,
)
from torch import nn

import vilt_fast
from vilt_fast import functional

TASKS = ("masked_lm", "question_answering", "retrieval", "nlvr2", "token_classification")


@pytest.fixture
def last_rows(monkeypatch):
    """A list that grows by (rows that go through the last feed-forward, all rows) whenever blocks run."""
    seen, rows = [], []
    encoder, linear_gelu = functional.encoder, functional.linear_gelu

    def counted(x, *args, **kwargs):
        out = encoder(x, *args, **kwargs)
        seen.append((out.shape[-2], len(x)))
        return out

    def counted_gelu(x, weight, bias):
        rows.append(len(x))
        if len(rows) == 3:  # blocks of the small models
            seen.append((rows[-1], rows[0]))
            rows.clear()
        return linear_gelu(x, weight, bias)

    monkeypatch.setattr(functional, "encoder", counted)
    monkeypatch.setattr(functional, "linear_gelu", counted_gelu)
    return seen


def read_by(kind, ours):
    """How many rows the head of a model reads of a batch."""
    plan = vilt_fast.sequence_plan(ours, **batch(kind))
    return len(plan.texts.rows) if kind in PER_TOKEN else plan.batch


@pytest.mark.parametrize("mode", ["inference", "evaluation", "training"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", TASKS)
def test_the_last_block_computes_what_the_head_reads(kind, dtype, mode, last_rows):
    model = vilt_fast.accelerate(build(kind, dtype)).train(mode == "training")
    with torch.set_grad_enabled(mode != "inference"):
        call(model, batch(kind, dtype))
        call(model, batch(kind, dtype), sequence_plan=vilt_fast.sequence_plan(model, **batch(kind, dtype)))
    (few, rows), again = last_rows
    assert few == read_by(kind, model) < rows and again == (few, rows)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", TASKS)
def test_values_and_every_gradient_are_the_reference_s(kind, train):
    theirs, ours = (model.train(train) for model in pair(kind))
    inputs = batch(kind)
    masks = real_positions(theirs, inputs)
    wanted = labels(kind)
    found = []
    for model in (ours, theirs):
        output = call(model, inputs, **({} if wanted is None else {"labels": wanted}))
        (output.logits.square().sum() if wanted is None else output.loss).backward()
        found.append((output, gradients(model)))
    assert_same_output(kind, found[0][0], found[1][0], masks)
    if wanted is not None or kind not in PER_TOKEN:
        assert_same_gradients(found[0][1], found[1][1])


WHO_LISTENS = {
    "hidden states": (lambda m: None, {"output_hidden_states": True}),
    "attentions": (lambda m: None, {"output_attentions": True}),
    "a hook on the norm": (lambda m: m.vilt.layernorm.register_forward_hook(lambda *_: None), {}),
    "a hook on the pooler": (lambda m: m.vilt.pooler.dense.register_forward_hook(lambda *_: None), {}),
    "a hook on the last block": (lambda m: m.vilt.encoder.layer[-1].register_forward_hook(lambda *_: None), {}),
}


@pytest.mark.parametrize("who", WHO_LISTENS)
@pytest.mark.parametrize("kind", ["masked_lm", "question_answering"])
def test_who_listens_hears_of_all_rows(kind, who):
    change, flags = WHO_LISTENS[who]
    theirs, ours = pair(kind)
    inputs = batch(kind)
    masks = real_positions(theirs, inputs)
    outputs, heard = [], []
    for model in (theirs, ours):
        change(model)
        last = model.vilt.pooler if who.endswith("pooler") else model.vilt.layernorm
        if who.startswith("a hook"):
            last.register_forward_pre_hook(lambda module, args: heard.append(args[0].shape))
        outputs.append(call(model, inputs, **flags))
    assert_same_output(kind, outputs[1], outputs[0], masks)
    if who.startswith("a hook"):
        assert heard[0] == heard[1]


class Mean(nn.Module):
    """A pooler that reads every row."""

    def forward(self, hidden):
        return hidden[:, :3].mean(1)


@pytest.mark.parametrize("part", ["pooler", "layernorm"])
def test_replaced_parts_get_all_rows(part):
    theirs, ours = pair("question_answering")
    inputs = {name: t[[0]] for name, t in batch("question_answering").items()}
    for model in (theirs, ours):
        if part == "pooler":
            model.vilt.pooler = Mean()
        else:
            model.vilt.layernorm = nn.Sequential(nn.LayerNorm(32).double(), nn.Tanh())
    assert_same_output("question_answering", call(ours, inputs), call(theirs, inputs), [None])


def test_captured_graphs_compute_it_too(monkeypatch):
    played(monkeypatch)
    for kind in TASKS:
        plain, ours = (vilt_fast.accelerate(build(kind), cuda_graphs=graph) for graph in (False, True))
        for samples in ([0, 1, 2, 3], [2], [0, 1, 2], [3, 1], [0, 1, 2, 3]):
            inputs = {name: t[samples] for name, t in batch(kind).items()}
            with torch.no_grad():
                torch.testing.assert_close(call(ours, inputs).logits, call(plain, inputs).logits)
        for kind_of_graph, bucket, *rest in ours.vilt.forward.graphs._graphs:
            read = bucket.wanted if kind_of_graph == "blocks" else rest[0]
            assert read is not None

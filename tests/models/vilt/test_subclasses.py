"""Classes that derive from HuggingFace's and have a `forward` of their own."""

import copy

import pytest
import torch
from support.models import (
    KINDS,
    as_dtype,
    assert_close,
    assert_same_gradients,
    batch,
    build,
    call,
    changed,
    gradients,
    leaves,
    text_mask,
)
from torch import nn

import vilt_fast
from vilt_fast import functional
from vilt_fast.alignment.align import align
from vilt_fast.testing import assert_within_budget


class Pooling(KINDS["trunk"]):
    """Reads every position, padded ones too."""

    def forward(self, **inputs):
        out = super().forward(**inputs)
        return out.last_hidden_state.mean(1), out.pooler_output * 2, out.hidden_states, out.attentions


class Answers(KINDS["question_answering"]):
    def forward(self, **inputs):
        return super().forward(**inputs).logits * 2


def as_class(kind, name, **config):
    model = kind(build(name, **config).config).double().eval()
    model.load_state_dict(build(name, **config).state_dict())
    return model


def swapped(model):
    return [m for m in model.modules() if "forward" in m.__dict__]


INPUTS = {
    "ragged": {},
    "no padding": {"attention_mask": None, "pixel_mask": None},
    "one key": {"attention_mask": torch.zeros_like(text_mask()), "pixel_mask": None},
    "embeds": {"input_ids": None, "inputs_embeds": batch("trunk", text="embeds")["inputs_embeds"]},
}


@pytest.mark.parametrize("flags", [{}, {"output_hidden_states": True}, {"output_attentions": True}])
@pytest.mark.parametrize("given", INPUTS)
def test_the_encoder_of_a_trunk_with_another_forward_is_accelerated(given, flags):
    theirs = as_class(Pooling, "trunk")
    ours = vilt_fast.accelerate(copy.deepcopy(theirs))
    assert swapped(ours) == [ours.encoder]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = [call(m, changed(**INPUTS[given]), **flags) for m in (ours, theirs)]
        for (path, mine), (_, other) in zip(*map(leaves, found), strict=True):
            assert (mine is None) == (other is None)
            if mine is not None:
                assert_close(mine, other, path)
    for model in (ours, theirs):
        out = call(model, changed(**INPUTS[given]))
        (out[0].square().sum() + out[1].sum()).backward()
    assert_same_gradients(gradients(ours), gradients(theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", INPUTS)
def test_inference_stays_within_the_budget(given, dtype, monkeypatch):
    calls = []
    encoder = functional.encoder
    monkeypatch.setattr(functional, "encoder", lambda *a, **k: calls.append(1) or encoder(*a, **k))
    exact, theirs = as_class(Pooling, "trunk"), as_class(Pooling, "trunk").to(dtype)
    ours = vilt_fast.accelerate(copy.deepcopy(theirs))
    inputs = changed(**INPUTS[given])
    with torch.no_grad():
        found = [call(m, as_dtype(inputs, dtype)) for m in (ours, theirs)] + [call(exact, inputs)]
    for mine, other, right in zip(*(out[:2] for out in found), strict=True):
        assert_within_budget(mine, other, right)
    assert len(calls) == 1


def test_a_mask_that_says_more_than_who_is_looked_at_takes_the_modules_own_way():
    theirs = build("trunk").encoder
    ours = as_class(Pooling, "trunk")
    vilt_fast.accelerate(ours)
    x, lowest = torch.randn(2, 7, 32, dtype=torch.float64), torch.finfo(torch.float64).min
    causal = torch.full((7, 7), lowest, dtype=torch.float64).triu(1)[None, None].expand(2, 1, 7, 7)
    nobody = torch.full((2, 1, 7, 7), lowest, dtype=torch.float64)
    for mask in (None, causal, torch.randn(2, 1, 7, 7, dtype=torch.float64), nobody, nobody[:, :, :1], causal[:1]):
        assert_close(ours.encoder(x, mask).last_hidden_state, theirs(x, mask).last_hidden_state)
        assert_close(ours.encoder(x, mask, return_dict=False)[0], theirs(x, mask, return_dict=False)[0])


def test_hooks_in_such_an_encoder_see_what_they_saw():
    theirs = as_class(Pooling, "trunk")
    ours = vilt_fast.accelerate(copy.deepcopy(theirs))
    seen = []
    for m in (theirs, ours):
        m.encoder.layer[1].register_forward_hook(lambda m, args, out: seen.append((*args[:2], out[0])))
        call(m, batch("trunk"))
    for mine, other in zip(*seen, strict=True):
        assert_close(mine, other)


def test_what_such_a_trunk_does_not_know():
    ours = vilt_fast.accelerate(as_class(Pooling, "trunk"))
    with pytest.raises(TypeError, match="ViltEncoder takes no sequence_plan"):
        vilt_fast.sequence_plan(ours, **batch("trunk"))
    with pytest.raises(TypeError, match="forward of its own, around"):
        align(ours, batch("trunk"))
    vilt_fast.restore(ours)
    assert not swapped(ours)


def test_other_code_all_the_way_is_refused_by_name():
    class Encoder(type(build("trunk").encoder)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    ours = as_class(Pooling, "trunk")
    ours.encoder.__class__ = Encoder
    with pytest.raises(TypeError, match="Pooling overrides forward of ViltModel.*as a part of Pooling"):
        vilt_fast.accelerate(ours)
    assert not swapped(ours)
    around = vilt_fast.accelerate(nn.ModuleList([ours, build("trunk")]))
    assert swapped(around) == [around[1]]


def test_the_trunk_of_a_task_with_another_forward_is_accelerated():
    theirs = as_class(Answers, "question_answering")
    ours = vilt_fast.accelerate(copy.deepcopy(theirs), patch_order="reference")
    assert swapped(ours) == [ours.vilt]
    assert_close(call(ours, batch("trunk")), call(theirs, batch("trunk")))

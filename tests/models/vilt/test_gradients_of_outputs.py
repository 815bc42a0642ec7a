"""Gradients with respect to what a model returns (attentions, hidden states): relevance maps, GradCAM."""

import pytest
import torch
from support.models import EXTRAS, batch, leaves, pair


def gradients(model, inputs, kind):
    """({name: gradient of one number of the output}, {name: the output})."""
    torch.manual_seed(3)
    out = model(**inputs, **EXTRAS)
    score = out.pooler_output if kind == "trunk" else out.logits
    if kind == "token_classification":
        score = score[inputs["attention_mask"] != 0]
    score = score[..., -1].sum()
    named = dict(leaves({"attentions": out.attentions, "hidden_states": out.hidden_states}))
    if kind == "trunk":
        named["last_hidden_state"] = out.last_hidden_state
    found = torch.autograd.grad(score, list(named.values()), allow_unused=True)
    assert all(g is not None for g in found), [n for n, g in zip(named, found, strict=True) if g is None]
    return dict(zip(named, found, strict=True)), named


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("kind", ["trunk", "question_answering", "retrieval", "token_classification", "nlvr2"])
def test_they_are_the_reference_s(kind, ragged):
    theirs, ours = pair(kind)
    inputs = batch(kind)
    if not ragged:
        inputs |= {name: torch.ones_like(inputs[name]) for name in ("attention_mask", "pixel_mask")}
    want, _ = gradients(theirs, inputs, kind)
    got, shown = gradients(ours, inputs, kind)
    for name, gradient in got.items():
        # At padded places ours are zero, and so are the values there: the reference computes what means nothing.
        real = shown[name].ne(0) if ragged else torch.ones_like(gradient, dtype=torch.bool)
        torch.testing.assert_close(
            gradient[real], want[name][real], rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_training_with_hidden_states_asked_for_is_training():
    _, ours = pair("question_answering")
    plain = ours(**batch("question_answering")).logits
    asked = ours(**batch("question_answering"), **EXTRAS).logits
    torch.testing.assert_close(asked, plain, rtol=1e-11, atol=1e-12)

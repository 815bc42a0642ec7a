"""What PyTorch can make of a model besides its values and their gradients: gradients of gradients."""

import pytest
import torch
from support.models import PER_TOKEN, assert_same_gradients, batch, call, gradients, pair


def score(kind, model, inputs):
    """Numbers of the output that mean something."""
    output = call(model, inputs)
    if kind == "trunk":
        return output.pooler_output
    return output.logits[inputs["attention_mask"] != 0] if kind in PER_TOKEN else output.logits


def penalized(kind, model, inputs):
    """Gradients of all parameters and floating inputs after a penalty on the gradients of these inputs."""
    inputs = {k: v.clone().requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()}
    watched = {k: v for k, v in inputs.items() if v.requires_grad}
    total = score(kind, model, inputs).pow(2).sum()
    recorded = torch.autograd.grad(total, list(watched.values()), create_graph=True)
    sum(g.pow(2).sum() for g in recorded).backward()
    return gradients(model) | {k: v.grad for k, v in watched.items()}


@pytest.mark.parametrize(
    ("kind", "image"), [("trunk", "pixels"), ("trunk", "embeds"), ("masked_lm", "pixels"), ("nlvr2", "pixels")]
)
@pytest.mark.parametrize("train", [False, True])
def test_a_penalty_on_gradients(kind, image, train):
    theirs, ours = pair(kind)
    inputs = batch(kind, text="embeds", image=image)
    found, expected = (penalized(kind, model.train(train), inputs) for model in (ours, theirs))
    assert_same_gradients(found, expected)
    assert sum(g is not None and bool(g.any()) for g in found.values()) > 40

"""What PyTorch makes of a model besides values and gradients: gradients of gradients, torch.func, tangents."""

import pytest
import torch
from support.models import PER_TOKEN, assert_same_gradients, batch, call, gradients, pair
from support.original_vilt import ViLTransformerSS
from torch import func
from torch.autograd import forward_ad

import vilt_fast


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


# --- torch.func and forward-mode AD: the module's own way -------------------------------------------------------------


def of_parameters(kind, model, inputs):
    """(a function of the parameters, its one argument)."""

    def run(parameters):
        return score(kind, lambda **given: func.functional_call(model, parameters, (), given), inputs)

    return run, {name: p.detach() for name, p in model.named_parameters()}


def of_inputs(kind, model, inputs):
    """The same of the floating inputs."""
    watched = {k: v for k, v in inputs.items() if v.is_floating_point()}
    return lambda given: score(kind, model, inputs | given), watched


def ones(given):
    return {name: torch.ones_like(t) for name, t in given.items()}


def dual(function, given):
    """(value, tangent) by forward-mode AD itself."""
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(t, torch.ones_like(t)) for name, t in given.items()}
        return forward_ad.unpack_dual(function(duals))


def pulled_back(function, given):
    value, back = func.vjp(function, given)
    return value, *back(torch.ones_like(value))[0].values()


TRANSFORMS = {
    "grad": lambda f, given: func.grad(lambda g: f(g).pow(2).sum())(given).values(),
    "vjp": pulled_back,
    "jvp": lambda f, given: func.jvp(f, (given,), (ones(given),)),
    "tangents": dual,
    "tangents without gradients": torch.no_grad()(dual),
    "a Hessian times a vector": lambda f, given: func.jvp(
        func.grad(lambda g: f(g).pow(2).sum()), (given,), (ones(given),)
    )[1].values(),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("of", [of_parameters, of_inputs])
@pytest.mark.parametrize(("kind", "dtype"), [("trunk", torch.float64), ("masked_lm", torch.float32)])
def test_transforms_are_the_reference_s(transform, of, kind, dtype):
    inputs, found = batch(kind, dtype, text="embeds"), []
    for model in pair(kind, dtype, num_hidden_layers=1):
        found.append([t for t in TRANSFORMS[transform](*of(kind, model, inputs))])
    for mine, other in zip(*found, strict=True):
        assert torch.equal(mine, other) and mine.isfinite().all()
    assert found[0][-1].any()


@pytest.mark.parametrize("kind", ["question_answering", "nlvr2"])
def test_tangents_of_other_tasks(kind):
    inputs = batch(kind)
    theirs, ours = (dual(*of_inputs(kind, model, inputs)) for model in pair(kind, num_hidden_layers=1))
    assert torch.equal(ours.tangent, theirs.tangent) and ours.tangent.any()


def test_a_transform_of_something_else():
    """torch.func wraps whatever is computed within it."""
    _, ours = pair("trunk")
    expected = call(ours, batch("trunk")).pooler_output
    found = func.grad(lambda w: (call(ours, batch("trunk")).pooler_output.detach() @ w).sum())(expected[0])
    torch.testing.assert_close(found, expected.sum(0))


@torch.no_grad()
def test_the_tangents_of_a_hook_are_not_lost():
    """No input and no parameter has one, so the model is packed as ever."""
    found = []
    for model in pair("trunk", num_hidden_layers=1):
        model.embeddings.register_forward_hook(
            lambda module, inputs, out: (forward_ad.make_dual(out[0], out[0].cos()), out[1])
        )
        with forward_ad.dual_level():
            found.append(forward_ad.unpack_dual(call(model, batch("trunk")).pooler_output).tangent)
    torch.testing.assert_close(*found)


@torch.no_grad()
def test_a_level_without_tangents_changes_nothing():
    _, ours = pair("trunk", torch.float32)
    expected = call(ours, batch("trunk", torch.float32)).pooler_output
    with forward_ad.dual_level():
        torch.testing.assert_close(call(ours, batch("trunk", torch.float32)).pooler_output, expected)


def test_tangents_of_the_original():
    model = ViLTransformerSS().double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ids, masks = torch.randint(1, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    given = {"text_ids": ids, "text_labels": ids, "text_masks": masks}

    def pooled(inputs):
        return call(lambda image: model.infer(given | {"image": [image]})["cls_feats"], inputs)

    pixels = {"image": torch.randn(2, 3, 48, 80, dtype=torch.float64)}
    expected = dual(pooled, pixels)
    vilt_fast.accelerate(model)
    found = dual(pooled, pixels)
    assert torch.equal(found.tangent, expected.tangent) and found.tangent.any()


def test_a_plan_is_refused():
    _, ours = pair("question_answering")
    inputs = batch("question_answering")
    plan = vilt_fast.sequence_plan(ours, **inputs)
    with pytest.raises(RuntimeError, match="call it without sequence_plan"):
        func.grad(lambda g: ours(**inputs | g, sequence_plan=plan).logits.sum())(
            {"pixel_values": inputs["pixel_values"]}
        )

"""Evaluation mode with gradients recorded: the fast forward, and every gradient, computed when it is wanted."""

import copy

import pytest
import torch
from support.models import as_dtype, batch, build, call, gradients, labels, leaves

import vilt_fast
from vilt_fast import functional
from vilt_fast.engine import packed
from vilt_fast.functional import LayerParameters
from vilt_fast.testing import assert_within_budget

LAYERS = 3
PRECISIONS = {"float32": (torch.float32, None), "bfloat16": (torch.bfloat16, None), "int8": (torch.float32, "int8")}


def accelerated(precision="float32", kind="trunk", **config):
    dtype, quantize = PRECISIONS[precision]
    return vilt_fast.accelerate(build(kind, dtype, **config), quantize=quantize, patch_order="reference")


def inputs_of(model, kind="trunk"):
    return batch(kind, next(model.parameters()).dtype)


def backward(model, kind="trunk", *, between=lambda: None, **more):
    """{name: gradient} of all parameters and of the pixels, of a loss that reads the pooled or the labelled output."""
    inputs = inputs_of(model, kind)
    inputs["pixel_values"] = inputs["pixel_values"].requires_grad_()
    wanted = labels(kind, inputs["pixel_values"].dtype)
    output = call(model, inputs, **({} if wanted is None else {"labels": wanted}), **more)
    loss = output.pooler_output.square().sum() if wanted is None else output.loss
    between()
    loss.backward()
    found = gradients(model) | {"pixel_values": inputs["pixel_values"].grad}
    model.zero_grad()
    return found


def assert_all_within_budget(got, near, want):
    """All gradients together, as an optimizer takes them: a bias of eight numbers says nothing about an error."""
    names = [n for n, g in want.items() if g is not None and got[n] is not None]
    for name in want.keys() - set(names):
        assert not any(g is not None and g.any() for g in (got[name], want[name])), name
    assert_within_budget(*(torch.cat([grads[n].flatten() for n in names]) for grads in (got, near, want)))


@pytest.fixture
def ran(monkeypatch):
    """{"native": blocks that the fused encoder computed, "recomputed": blocks that a backward did}."""
    count = {"native": 0, "recomputed": 0}
    encoder, of_parameters = functional.encoder, packed.of_parameters

    def counted(rows, parameters, *args, **kwargs):
        count["native"] += len(LayerParameters.layers(parameters))
        return encoder(rows, parameters, *args, **kwargs)

    def counted_again(rows, parameters, *args):
        count["recomputed"] += len(LayerParameters.layers(parameters))
        return of_parameters(rows, parameters, *args)

    monkeypatch.setattr(functional, "encoder", counted)
    monkeypatch.setattr(packed, "of_parameters", counted_again)
    return count


@pytest.mark.parametrize("kind", ["trunk", "masked_lm", "nlvr2", "question_answering"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_values_are_those_without_gradients(precision, kind, ran):
    model = accelerated(precision, kind)
    recorded = call(model, inputs_of(model, kind))
    assert ran == {"native": LAYERS, "recomputed": 0}
    with torch.no_grad():
        plain = call(model, inputs_of(model, kind))
    for (path, a), (_, b) in zip(leaves(recorded), leaves(plain), strict=True):
        assert a is b or torch.equal(a, b), path
    assert any(t is not None and t.requires_grad for _, t in leaves(recorded))


@pytest.mark.parametrize("kind", ["trunk", "masked_lm", "nlvr2", "question_answering"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_gradient_is_within_the_budget(kind, dtype, ran):
    theirs, ours, exact = build(kind, dtype), build(kind, dtype), build(kind, dtype).double()
    vilt_fast.accelerate(ours, patch_order="reference")
    assert_all_within_budget(*(backward(model, kind) for model in (ours, theirs, exact)))
    assert ran == {"native": LAYERS, "recomputed": LAYERS}


def test_training_records_at_once(ran):
    model = accelerated().train()  # its dropouts are 0
    backward(model)
    assert ran == {"native": 0, "recomputed": 0}


def test_int8_has_the_gradients_of_the_parameters(ran):
    plain, ours = backward(accelerated()), backward(accelerated("int8"))
    assert ran == {"native": 2 * LAYERS, "recomputed": 2 * LAYERS}
    for name, gradient in plain.items():
        if gradient is not None and gradient.norm() > 1e-3:
            assert (ours[name] - gradient).norm() < 0.2 * gradient.norm(), name


def test_fp8_has_them_too(ran):
    plain, ours = build("trunk", torch.float32), build("trunk", torch.float32)
    vilt_fast.accelerate(plain)
    vilt_fast.accelerate(ours, quantize="fp8")
    with torch.no_grad():
        want = call(ours, inputs_of(ours)).pooler_output
    got = call(ours, inputs_of(ours)).pooler_output
    # Another kernel adds up the stream between blocks; what its rounding moves is far below what fp8 costs.
    assert (got - want).norm() < 0.3 * (want - call(plain, inputs_of(plain)).pooler_output).norm()
    ran["recomputed"] = 0
    exact, gradient = (backward(m)["encoder.layer.0.output.dense.weight"] for m in (plain, ours))
    assert ran["recomputed"] == 2 * LAYERS
    assert (gradient - exact).norm() < 0.5 * exact.norm()


def test_a_parameter_that_changes_in_between_is_an_error():
    model = accelerated()
    output = call(model, inputs_of(model)).pooler_output.sum()
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_what_happens_to_the_modules_in_between_changes_nothing():
    config = dict(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    model, same = accelerated(**config), accelerated(**config)
    layer = model.encoder.layer[0]

    def between():
        model.train()
        layer.output.dense.register_forward_hook(lambda *_: 1 / 0)
        layer.layernorm_before.eps = 1.0

    got, want = backward(model, between=between), backward(same)
    for name, gradient in want.items():
        assert gradient is got[name] or torch.equal(got[name], gradient), name


def test_twice_from_one_graph_and_within_a_checkpoint():
    model = accelerated()
    weight = model.encoder.layer[0].output.dense.weight
    score = call(model, inputs_of(model)).pooler_output.sum()
    first, second = (torch.autograd.grad(score, weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)

    def run(pixels):
        return call(model, inputs_of(model) | {"pixel_values": pixels}).pooler_output.sum()

    pixels = inputs_of(model)["pixel_values"].requires_grad_()
    torch.utils.checkpoint.checkpoint(run, pixels, use_reentrant=False).backward()
    assert torch.equal(weight.grad, first)


def test_a_block_in_two_places_has_both_gradients():
    plain, exact = build("trunk", torch.float32), build("trunk", torch.float32).double()
    for model in (plain, exact):
        model.encoder.layer[2] = model.encoder.layer[0]
    ours = vilt_fast.accelerate(copy.deepcopy(plain), patch_order="reference")
    name = "encoder.layer.0.intermediate.dense.weight"
    assert_within_budget(*(backward(model)[name] for model in (ours, plain, exact)), what=name)


@pytest.mark.parametrize("trained", [1, 3])
def test_blocks_before_the_first_gradient_are_not_computed_again(trained, ran):
    model, whole = accelerated(), accelerated()
    model.requires_grad_(False)
    for layer in model.encoder.layer[trained:]:
        layer.requires_grad_()
    model.pooler.requires_grad_()
    output = call(model, inputs_of(model)).pooler_output.square().sum()
    output.backward()
    assert ran == {"native": LAYERS, "recomputed": LAYERS - trained}
    want = backward(whole)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and want[name].norm() > 1e-3:
            torch.testing.assert_close(parameter.grad, want[name], rtol=1e-4, atol=1e-4)


def test_autocast_of_the_forward_is_that_of_the_backward(ran):
    theirs, ours, exact = (build("question_answering", torch.float32) for _ in range(3))
    vilt_fast.accelerate(ours, patch_order="reference")
    found = []
    for model in (ours, theirs, exact.double()):
        inputs = as_dtype(inputs_of(model, "question_answering"), next(model.parameters()).dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=model is not exact):
            logits = call(model, inputs).logits
        logits.float().square().sum().backward()
        found.append(gradients(model))
    assert ran == {"native": LAYERS, "recomputed": LAYERS}
    assert_all_within_budget(*found)


def test_a_gradient_that_flows_into_the_rows_alone():
    model = accelerated().requires_grad_(False)
    same = vilt_fast.accelerate(build("trunk"), patch_order="reference")
    grads = []
    for m in (model, same):
        inputs = batch("trunk", next(m.parameters()).dtype, text="embeds")
        inputs["inputs_embeds"].requires_grad_()
        call(m, inputs).pooler_output.sum().backward()
        grads.append(inputs["inputs_embeds"].grad)
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=1e-4, atol=1e-4)


def test_hooks_and_hidden_states_have_gradients_at_once(ran):
    for change, more in ((lambda m: m.encoder.layer[1].register_full_backward_hook(lambda *_: None), {}),
                         (lambda m: None, {"output_hidden_states": True})):  # fmt: skip
        model = accelerated()
        change(model)
        ran |= {"native": 0, "recomputed": 0}
        output = call(model, inputs_of(model), **more)
        assert ran["native"] == (0 if more else 2)  # the blocks around the one that is listened to
        if more:
            found = torch.autograd.grad(output.pooler_output.sum(), output.hidden_states)
            assert all(g.isfinite().all() for g in found)


def test_transforms_and_tracers_see_every_operation(ran):
    class Pooled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = accelerated()
            self.inputs = inputs_of(self.model)
            self.plan = vilt_fast.sequence_plan(self.model, **self.inputs)

        def forward(self, pixels):
            return self.model(**self.inputs | {"pixel_values": pixels}, sequence_plan=self.plan).pooler_output

    module = Pooled().eval()
    traced = torch.jit.trace(module, module.inputs["pixel_values"], check_trace=False)
    assert ran == {"native": 0, "recomputed": 0}
    traced(module.inputs["pixel_values"]).sum().backward()
    assert module.model.encoder.layer[0].output.dense.weight.grad.any()

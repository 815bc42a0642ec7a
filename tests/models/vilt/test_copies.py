"""Copies of accelerated modules, and what others wrap around them: a swap computes with its own module's parameters."""

import copy
import functools
import gc
import types
import weakref

import pytest
import torch
from support.copies import pickled, saved
from support.models import KINDS, PER_TOKEN, assert_close, batch, build, call, pair, trunk_of
from test_original import build as build_original
from test_original import make_batch
from torch import nn

import vilt_fast
from vilt_fast.testing import assert_within_budget


def answer(model, kind, inputs=None):
    """What the model computes, without what means nothing: padded positions."""
    inputs = batch(kind) if inputs is None else inputs
    out = call(model, inputs)
    if kind == "trunk":
        return out.pooler_output
    return out.logits[inputs["attention_mask"] != 0] if kind in PER_TOKEN else out.logits


def other_parameters(module):
    """Fresh ones, in this module alone: what it shares with another stays as it is there."""
    for inner in [module, *module.modules()]:
        inner.__dict__["_parameters"] = {
            k: v if v is None else nn.Parameter(v.detach() * 1.5) for k, v in inner._parameters.items()
        }


def shallow(model):
    """`copy.copy`, all the way down."""
    new = copy.copy(model)
    new.__dict__["_modules"] = {name: None if m is None else shallow(m) for name, m in model._modules.items()}
    if isinstance(getattr(new, "mlm_score", None), nn.Module):  # tied: one parameter in two places
        new.tie_weights()
    return new


def replicated(model):
    """As `torch.nn.parallel.replicate` does on each device, which needs CUDA."""
    new = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in new.items():
        for name, child in module._modules.items():
            setattr(replica, name, None if child is None else new[child])
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.detach() * 1.5)
            replica._former_parameters = {}
    return new[model]


COPIES = [copy.deepcopy, pickled, saved, shallow]


def assert_swaps_are_their_own(model):
    found = [m for m in model.modules() if "forward" in m.__dict__]
    assert found and all(m.forward.module is m for m in found)


@pytest.mark.parametrize("kind", ["trunk", "masked_lm", "question_answering", "nlvr2", "token_classification"])
@pytest.mark.parametrize("duplicate", COPIES)
def test_a_copy_computes_with_its_own_parameters(kind, duplicate):
    theirs, ours = pair(kind)
    before = answer(ours, kind)
    twin = duplicate(ours)
    assert_swaps_are_their_own(twin)
    assert_swaps_are_their_own(ours)
    for again in (twin, duplicate(twin)):
        other_parameters(again)
        expected = answer(vilt_fast.restore(copy.deepcopy(again)), kind)
        assert_close(answer(again, kind), expected)
        assert not torch.equal(expected, before)
    vilt_fast.restore(twin)
    assert not any(vilt_fast_attributes(m) for m in twin.modules())
    assert_swaps_are_their_own(ours)
    assert torch.equal(answer(ours, kind), before)
    vilt_fast.accelerate(twin)
    assert_swaps_are_their_own(twin)
    assert vilt_fast.sequence_plan(vilt_fast.refresh(twin), **batch(kind)).batch in (4, 8)


def vilt_fast_attributes(module):
    names = ("forward", "infer", "__reduce_ex__", "_replicate_for_data_parallel", "extra_repr")
    return [name for name in names if name in module.__dict__]


@pytest.mark.parametrize("kind", ["trunk", "masked_lm", "question_answering", "nlvr2"])
def test_a_replica_computes_with_its_own_parameters(kind):
    theirs, ours = pair(kind)
    with torch.no_grad():
        mine, other = replicated(ours), replicated(theirs)
        assert_swaps_are_their_own(mine)
        assert_swaps_are_their_own(ours)
        assert_close(answer(mine, kind), answer(other, kind))
        assert not torch.equal(answer(mine, kind), answer(ours, kind))
    vilt_fast.restore(mine)
    assert not any(map(vilt_fast_attributes, mine.modules()))
    assert_swaps_are_their_own(ours)


def test_a_replica_captures_nothing():
    ours = vilt_fast.accelerate(build("trunk"), cuda_graphs=True)
    assert ours._replicate_for_data_parallel().forward.graphs is None and copy.copy(ours).forward.graphs is not None


def forward(module):
    return module.__dict__.get("forward")


@pytest.mark.parametrize("duplicate", [*COPIES, replicated])
def test_a_copy_of_the_original_computes_with_its_own_parameters(duplicate):
    model = vilt_fast.accelerate(build_original(), patch_order="reference")
    twin = duplicate(model)
    assert twin.infer.module is twin and model.infer.module is model
    if duplicate is not replicated:
        other_parameters(twin)
    found = []
    for one in (twin, type(twin).infer.__get__(twin)):
        torch.manual_seed(3)
        with torch.no_grad():
            found.append((one.infer if one is twin else one)(make_batch())["cls_feats"])
    assert_close(*found)
    vilt_fast.restore(twin)
    assert not vilt_fast_attributes(twin) and model.infer.module is model


class Careful(KINDS["trunk"]):
    """Copies itself, as some do: attribute by attribute."""

    def __deepcopy__(self, memo):
        new = memo[id(self)] = type(self).__new__(type(self))
        for name, value in self.__dict__.items():
            new.__dict__[name] = copy.deepcopy(value, memo)
        return new


def test_a_class_with_its_own_deepcopy():
    ours = vilt_fast.accelerate(Careful(build("trunk").config).double().eval(), patch_order="reference")
    twin = copy.deepcopy(ours)
    assert twin.forward.module is twin
    assert_close(call(twin, batch("trunk")).pooler_output, call(ours, batch("trunk")).pooler_output)
    assert copy.deepcopy(twin).forward.module is not twin


def test_a_swap_without_a_module_says_so():
    ours = vilt_fast.accelerate(build("trunk"))
    for lost in (copy.deepcopy(ours.forward), pickled(ours.forward)):
        with pytest.raises(RuntimeError, match="belongs to no module"):
            lost(**batch("trunk"))
    kept = ours.forward
    del ours
    gc.collect()
    with pytest.raises(RuntimeError, match="belongs to no module"):
        kept(**batch("trunk"))


@pytest.mark.parametrize("kind", ["trunk", "question_answering", "nlvr2", "original"])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_deleted_model_is_gone_at_once(kind, quantize):
    ours = build_original() if kind == "original" else build(kind)
    vilt_fast.accelerate(ours, quantize=quantize)
    with torch.no_grad():
        ours.infer(make_batch()) if kind == "original" else call(ours, batch(kind))
    parts = [weakref.ref(m) for m in (ours, ours.transformer if kind == "original" else trunk_of(ours).encoder)]
    gc.collect()
    gc.disable()
    try:
        del ours
        assert [part() for part in parts] == [None, None]
    finally:
        gc.enable()


# --- what HF Accelerate does, as it does it ---------------------------------------------------------------------------


def converted(function):
    def forward(*args, **kwargs):
        out = function(*args, **kwargs)
        out.logits = out.logits.float()
        return out

    forward.__wrapped__ = function
    return forward


def prepared(model):
    """`Accelerator(mixed_precision="bf16").prepare`."""
    model._original_forward = model.forward
    autocast = torch.autocast("cpu", torch.bfloat16)
    if hasattr(model.forward, "__func__"):
        model.forward = types.MethodType(autocast(model.forward.__func__), model)
        model.forward = types.MethodType(converted(model.forward.__func__), model)
    else:
        model.forward = converted(autocast(model.forward))
    return model


def unwrapped(model):
    """`Accelerator.unwrap_model(keep_fp32_wrapper=False)`."""
    forward, original = model.forward, model.__dict__.pop("_original_forward", None)
    if original is not None:
        while hasattr(forward, "__wrapped__"):
            forward = forward.__wrapped__
            if forward == original:
                break
        model.forward = types.MethodType(forward, model)
    return model


def hooked(model):
    """`accelerate.hooks.add_hook_to_module`, with a hook that does nothing."""
    model._old_forward = model.forward
    model._hf_hook = object()

    def new_forward(module, *args, **kwargs):
        return module._old_forward(*args, **kwargs)

    model.forward = functools.update_wrapper(functools.partial(new_forward, model), model._old_forward)
    return model


def unhooked(model):
    model.forward = model._old_forward
    del model._old_forward, model._hf_hook
    return model


def test_a_model_that_was_prepared_and_unwrapped_is_accelerated_and_restored():
    theirs = unwrapped(prepared(build("question_answering")))
    ours = copy.deepcopy(theirs)
    before = forward(ours)
    assert before.__func__ is type(ours).forward
    for one in (ours, copy.deepcopy(ours)):
        vilt_fast.accelerate(one, patch_order="reference")
        twin = copy.deepcopy(one)
        assert_swaps_are_their_own(one)
        assert_close(call(one, batch("trunk")).logits, call(theirs, batch("trunk")).logits)
        for each in (one, twin):
            vilt_fast.restore(each)
            assert forward(each) == types.MethodType(type(each).forward, each)
            assert_close(call(each, batch("trunk")).logits, call(theirs, batch("trunk")).logits)
    assert forward(ours) == before


@pytest.mark.parametrize("wrap", [prepared, hooked])
def test_what_is_wrapped_around_a_model_before_is_named(wrap):
    ours = wrap(build("question_answering"))
    before = dict(ours.__dict__)
    message = {prepared: "unwrap_model", hooked: "remove_hook"}[wrap]
    with pytest.raises(TypeError, match=f"ViltForQuestionAnswering already has a forward.*{message}"):
        vilt_fast.accelerate(ours)
    assert before == ours.__dict__ and "forward" not in ours.vilt.__dict__


@pytest.mark.parametrize("steps", [
    [prepared], [prepared, unwrapped], [prepared, vilt_fast.restore], [prepared, unwrapped, vilt_fast.restore],
    [prepared, vilt_fast.restore, unwrapped], [prepared, unwrapped, vilt_fast.accelerate, vilt_fast.restore],
    [hooked], [hooked, unhooked], [hooked, vilt_fast.restore], [hooked, vilt_fast.restore, unhooked],
])  # fmt: skip
def test_what_is_wrapped_around_a_model_afterwards_stays(steps):
    theirs, ours = pair("question_answering", torch.float32)
    ours = copy.deepcopy(ours)
    for step in steps:
        step(ours)
        if step not in (vilt_fast.restore, vilt_fast.accelerate):
            step(theirs)
        if step is vilt_fast.restore:
            assert not any(name.startswith("__reduce") for name in ours.__dict__)
    inputs = batch("question_answering", torch.float32)
    mine, other = answer(ours, "question_answering", inputs), answer(theirs, "question_answering", inputs)
    exact = answer(build("question_answering"), "question_answering")
    assert_within_budget(mine, other, exact)
    assert torch.equal(mine, other) or vilt_fast.restore not in steps


@pytest.mark.parametrize("duplicate", COPIES)
def test_a_copy_of_what_was_prepared_and_unwrapped(duplicate):
    ours = unwrapped(prepared(pair("question_answering")[1]))
    twin = duplicate(ours)
    assert_swaps_are_their_own(twin)
    other_parameters(twin)
    expected = answer(vilt_fast.restore(copy.deepcopy(twin)), "question_answering")
    assert_close(answer(twin, "question_answering"), expected)
    assert "forward" in ours.vilt.__dict__


def test_a_wrapper_that_nobody_can_look_into_wraps_the_own_method_after_restore():
    theirs, ours = pair("trunk")
    inner = ours.forward
    ours.forward = lambda **inputs: inner(**inputs).pooler_output * 2
    assert_close(call(ours, batch("trunk")), call(theirs, batch("trunk")).pooler_output * 2)
    vilt_fast.restore(ours)
    assert not vilt_fast_attributes(ours)[1:]
    assert torch.equal(call(ours, batch("trunk")), call(theirs, batch("trunk")).pooler_output * 2)

"""`accelerate` and `restore`: in place, per instance, and invisible to everything that treats the model as a model."""

import copy
import inspect

import pytest
import torch
import torch.distributed as dist
from support.changes import CHANGES, moved_there_and_back, moved_to_bfloat16, one_layer_moved
from support.copies import pickled, saved
from support.models import (
    KINDS,
    as_dtype,
    assert_close,
    assert_same_gradients,
    assert_same_output,
    assert_same_structure,
    batch,
    build,
    call,
    gradients,
    labels,
    leaves,
    pair,
    real_positions,
    trunk_of,
)
from torch import nn

import vilt_fast
from vilt_fast.testing import assert_within_budget

# What is called, what copies of it are made by, and what `repr` asks.
SWAP = ("forward", "__reduce_ex__", "_replicate_for_data_parallel", "extra_repr")


def is_accelerated(model):
    return any("forward" in m.__dict__ for m in model.modules())


def snapshot(model):
    """What must not change: parameters and buffers as objects, `state_dict` in order, hooks, attributes."""
    modules = {
        name: (type(m), {k: v for k, v in m.__dict__.items() if k not in ("training", *SWAP)})
        for name, m in model.named_modules()
    }
    attributes = {name: (kind, sorted(d), {k: id(v) for k, v in d.items()}) for name, (kind, d) in modules.items()}
    tensors = [(name, id(t), t._version) for name, t in [*model.named_parameters(), *model.named_buffers()]]
    return attributes, tensors, [(k, v.clone()) for k, v in model.state_dict().items()]


def assert_snapshot(model, before):
    attributes, tensors, state = snapshot(model)
    assert attributes == before[0] and tensors == before[1]
    assert [k for k, _ in state] == [k for k, _ in before[2]]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(state, before[2], strict=True))


def equal(first, second):
    return all(
        (a is None and b is None) or torch.equal(a, b)
        for (_, a), (_, b) in zip(leaves(first), leaves(second), strict=True)
    )


# --- in place, and back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_nothing_but_the_swap_changes_and_restore_is_bitwise(kind, quantize):
    theirs, ours = build(kind, torch.float32), build(kind, torch.float32)
    before = snapshot(ours)
    inputs = batch(kind, torch.float32)
    assert vilt_fast.accelerate(ours, quantize=quantize) is ours
    assert is_accelerated(ours)
    assert_snapshot(ours, before)
    with torch.no_grad():
        call(ours, inputs, output_hidden_states=True)
    call(ours, inputs)
    assert_snapshot(ours, before)
    assert vilt_fast.restore(ours) is ours
    assert not is_accelerated(ours)
    assert_snapshot(ours, before)
    assert equal(call(ours, inputs), call(theirs, inputs))
    assert vilt_fast.restore(ours) is ours
    assert not any(name in vars(m) for m in ours.modules() for name in SWAP)


def test_restoring_a_plain_model_is_nothing():
    ours = build("trunk")
    before = snapshot(ours)
    vilt_fast.restore(vilt_fast.refresh(ours))
    assert_snapshot(ours, before)


def test_accelerating_again_replaces_the_options():
    theirs, ours = pair("nlvr2", options={"patch_order": "raster"})
    vilt_fast.accelerate(ours, patch_order="reference")
    masks = real_positions(theirs, batch("nlvr2"))
    flags = {"output_hidden_states": True}
    expected = call(theirs, batch("nlvr2"), **flags)
    assert_same_output("nlvr2", call(ours, batch("nlvr2"), **flags), expected, masks)
    vilt_fast.restore(ours)
    assert not is_accelerated(ours)


def test_other_instances_and_the_classes_are_left_alone():
    theirs, ours = pair("masked_lm")
    assert not is_accelerated(theirs)
    assert type(ours) is type(theirs) and "forward" not in trunk_of(theirs).__dict__
    assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)
    assert inspect.signature(ours.vilt.forward) == inspect.signature(theirs.vilt.forward)


@pytest.mark.parametrize("kind", ["masked_lm", "token_classification", "nlvr2", "question_answering"])
def test_restoring_only_the_inner_model(kind):
    theirs, ours = pair(kind)
    vilt_fast.restore(ours.vilt)
    assert "forward" not in ours.vilt.__dict__
    assert equal(call(ours, batch(kind)), call(theirs, batch(kind)))
    vilt_fast.restore(ours)
    assert not is_accelerated(ours)


def test_a_module_around_two_vilts():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = build("trunk"), build("question_answering", seed=1)

        def forward(self, **inputs):
            return self.first(**inputs).pooler_output, self.second(**inputs).logits

    theirs = Two()
    ours = vilt_fast.accelerate(copy.deepcopy(theirs), patch_order="reference")
    assert "forward" not in ours.__dict__
    for mine, other in zip(call(ours, batch("trunk")), call(theirs, batch("trunk")), strict=True):
        assert_close(mine, other)
    vilt_fast.restore(ours.first)
    assert not is_accelerated(ours.first) and is_accelerated(ours.second)
    vilt_fast.restore(ours)
    assert not is_accelerated(ours)


def test_a_subclass_that_keeps_the_forward():
    theirs = build("trunk")

    class Mine(type(theirs)):
        extra = 1

    ours = Mine(theirs.config).double().eval()
    ours.load_state_dict(theirs.state_dict())
    vilt_fast.accelerate(ours, patch_order="reference")
    assert_close(call(ours, batch("trunk")).pooler_output, call(theirs, batch("trunk")).pooler_output)


# --- copies and files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_copies_are_accelerated_and_on_their_own(kind, duplicate, quantize):
    ours = vilt_fast.accelerate(build(kind, torch.float32), quantize=quantize)
    inputs = batch(kind, torch.float32)
    with torch.no_grad():
        expected = call(ours, inputs)
        twin = duplicate(ours)
        assert is_accelerated(twin) and equal(call(twin, inputs), expected)
        for module in twin.modules():
            if "forward" in module.__dict__:
                assert module.forward.module is module
        for parameter in twin.parameters():
            parameter.mul_(1.5)
        fresh = vilt_fast.accelerate(build(kind, torch.float32), quantize=quantize)
        fresh.load_state_dict(twin.state_dict())
        assert equal(call(twin, inputs), call(fresh, inputs))
        assert equal(call(ours, inputs), expected)
        vilt_fast.restore(twin)
        assert is_accelerated(ours) and not is_accelerated(twin)
        assert equal(call(ours, inputs), expected)


def test_a_copy_with_a_generator_draws_on_its_own():
    ours = vilt_fast.accelerate(build("trunk", max_image_length=3), generator=torch.Generator().manual_seed(1))
    twin = copy.deepcopy(ours)
    first = [call(ours, batch("trunk")).pooler_output for _ in range(3)]
    assert all(torch.equal(a, call(twin, batch("trunk")).pooler_output) for a in first)


@pytest.mark.parametrize("kind", ["masked_lm", "question_answering"])
def test_save_and_load_before_during_and_after(kind, tmp_path):
    model = build(kind, torch.float32)
    inputs = batch(kind, torch.float32)
    plain = call(model, inputs)
    model.save_pretrained(tmp_path / "before")
    vilt_fast.accelerate(model, patch_order="reference")
    model.save_pretrained(tmp_path / "during")
    accelerated = call(model, inputs)
    vilt_fast.restore(model)
    model.save_pretrained(tmp_path / "after")
    files = [(tmp_path / when / "model.safetensors").read_bytes() for when in ("before", "during", "after")]
    assert files[0] == files[1] == files[2]
    configs = [(tmp_path / when / "config.json").read_text() for when in ("before", "during", "after")]
    assert configs[0] == configs[1] == configs[2]
    loaded = type(model).from_pretrained(tmp_path / "during").eval()
    assert not is_accelerated(loaded)
    assert equal(call(loaded, inputs), plain)
    assert equal(call(vilt_fast.accelerate(loaded, patch_order="reference"), inputs), accelerated)


def test_functional_call_computes_with_the_given_parameters():
    theirs, ours = pair("trunk")
    other = {k: v + 0.1 for k, v in theirs.named_parameters()}
    found = []
    for model in (theirs, ours):
        torch.manual_seed(3)
        found.append(torch.func.functional_call(model, other, kwargs=batch("trunk")).pooler_output)
    assert_close(*found)
    assert_close(call(ours, batch("trunk")).pooler_output, call(theirs, batch("trunk")).pooler_output)


# --- nothing derived from a weight outlives a call --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["trunk", "masked_lm", "nlvr2"])
@pytest.mark.parametrize(
    ("change", "dtype"),  # a layer of another dtype among bfloat16 ones would need its own casts in the reference too
    [*((c, torch.float32) for c in CHANGES), *((c, torch.bfloat16) for c in CHANGES if c is not one_layer_moved)],
)
def test_changes_are_seen_at_the_next_call(kind, dtype, change):
    theirs, ours = pair(kind, dtype)
    before = call(ours, batch(kind, dtype))
    with torch.no_grad():
        call(ours, batch(kind, dtype))
    change(theirs)
    change(ours)
    now = next(theirs.parameters()).dtype
    rows = {}
    for seed in range(3):
        inputs = batch(kind, now, seed=seed)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                expected, actual = call(theirs, inputs), call(ours, inputs)
            assert_same_structure(actual, expected)
            masks = real_positions(theirs, inputs)
            if now == torch.float64:
                assert_same_output(kind, actual, expected, masks)
                continue
            with torch.no_grad():
                exact = call(_doubled(theirs), as_dtype(inputs, torch.float64))
            pick = {"trunk": "pooler_output"}.get(kind, "logits")
            mask = (inputs["attention_mask"] != 0) if kind == "masked_lm" else slice(None)
            rows.setdefault(grad, []).append([o[pick][mask] for o in (actual, expected, exact)])
    for parts in rows.values():
        assert_within_budget(*map(torch.cat, zip(*parts, strict=True)), what=change.__name__)
    if change not in (moved_there_and_back, moved_to_bfloat16) and dtype == now:
        assert not equal(call(ours, batch(kind, now)), before)


def _doubled(model):
    exact = copy.deepcopy(model).double()
    for module in exact.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return exact


# --- parallel training ------------------------------------------------------------------------------------------------


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained(model, kind):
    inputs = batch(kind) | {"labels": labels(kind)}
    output = call(model, inputs)
    output.loss.backward()
    return output


@pytest.mark.parametrize("kind", ["question_answering", "nlvr2"])
def test_distributed_data_parallel(process_group, kind):
    theirs, ours = pair(kind)
    parallel = nn.parallel.DistributedDataParallel(ours)
    assert_close(trained(parallel, kind).logits, trained(theirs, kind).logits)
    assert_same_gradients(gradients(ours), gradients(theirs))
    restored = vilt_fast.restore(parallel)
    assert not is_accelerated(restored)
    vilt_fast.accelerate(restored, patch_order="reference")
    assert is_accelerated(ours)
    ours.zero_grad()
    assert_close(trained(restored, kind).logits, call(theirs, batch(kind)).logits)


@pytest.mark.parametrize("kind", ["question_answering", "nlvr2", "masked_lm"])
@pytest.mark.parametrize("first", ["accelerate", "shard"])
@pytest.mark.parametrize("parts", ["layers", "everything", "root only"])
def test_fully_sharded(process_group, kind, first, parts):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    theirs, ours = pair(kind)
    if first == "shard":
        vilt_fast.restore(ours)
    mesh = init_device_mesh("cpu", (1,))
    trunk = trunk_of(ours)
    if parts != "root only":
        for layer in trunk.encoder.layer:
            fully_shard(layer, mesh=mesh)
    if parts == "everything" and kind != "masked_lm":  # whose decoder shares the embedding
        for module in (trunk.embeddings, trunk.layernorm, trunk.pooler, trunk):
            fully_shard(module, mesh=mesh)
    fully_shard(ours, mesh=mesh)
    if first == "shard":
        vilt_fast.accelerate(ours, patch_order="reference")
    for _ in range(2):
        ours.zero_grad(), theirs.zero_grad()
        mine, other = trained(ours, kind).loss, trained(theirs, kind).loss
        assert_close(mine, other)
    whole = {k: g if g is None else g.full_tensor() for k, g in ((n, p.grad) for n, p in ours.named_parameters())}
    assert_same_gradients(whole, gradients(theirs))
    with torch.no_grad():
        assert torch.isfinite(call(ours, batch(kind)).logits).all()


# --- torch.compile ----------------------------------------------------------------------------------------------------


COMPILED = [
    pytest.param("trunk", torch.float32, False, marks=pytest.mark.core),
    ("trunk", torch.float64, True),
    ("masked_lm", torch.float64, True),
    ("nlvr2", torch.float32, False),
]


@pytest.mark.parametrize(("kind", "dtype", "grad"), COMPILED)
def test_compile_gives_the_same_result(kind, dtype, grad):
    torch._dynamo.reset()
    theirs, ours = pair(kind, dtype, num_hidden_layers=1)
    compiled = torch.compile(ours, backend="aot_eager")
    exact = copy.deepcopy(theirs).double()
    for seed in range(2):
        inputs = batch(kind, dtype, seed=seed)
        with torch.set_grad_enabled(grad):
            mine, other = call(compiled, inputs), call(ours, inputs)
        assert_same_structure(mine, other)
        with torch.no_grad():
            right = call(vilt_fast.accelerate(exact, patch_order="reference"), as_dtype(inputs, torch.float64))
        for (path, a), (_, b), (_, c) in zip(*map(leaves, (mine, other, right)), strict=True):
            if dtype == torch.float64:
                assert_close(a, b, path)
            else:
                assert_within_budget(a, b, c, what=path)
    if grad:
        found = []
        for model in (compiled, ours):
            ours.zero_grad()
            call(model, batch(kind))[0].sum().backward()
            found.append(gradients(ours))
        assert_same_gradients(*found)

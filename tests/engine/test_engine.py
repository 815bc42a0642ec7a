"""The packed forward: what must not matter to it, and which way each block takes."""

import copy

import pytest
import torch
from support.models import (
    EXTRAS,
    PATCH,
    TEXT,
    as_dtype,
    assert_close,
    assert_same_output,
    assert_same_structure,
    batch,
    build,
    call,
    changed,
    compare,
    leaves,
    only_real,
    pair,
    real_positions,
)
from torch import nn

import vilt_fast
from vilt_fast import functional
from vilt_fast.models.vilt import plan as packing
from vilt_fast.testing import assert_within_budget, poisoned

# --- what must not matter ---------------------------------------------------------------------------------------------


def outputs_of(model, inputs, **flags):
    """The output with autograd and without, in one list of tensors."""
    result = []
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            result += [t for _, t in leaves(call(model, inputs, **flags)) if t is not None]
    return result


def garbage_in_padding(inputs):
    """The same inputs with other ids, and NaN, wherever there is padding; position 0, which is pooled from, stays."""
    inputs = dict(inputs)
    padded = inputs["attention_mask"] == 0
    padded[:, 0] = False
    if "input_ids" in inputs:
        inputs["input_ids"] = torch.where(padded, (inputs["input_ids"] + 17) % 50, inputs["input_ids"])
    else:
        inputs["inputs_embeds"] = poisoned(inputs["inputs_embeds"], padded)
    inputs["token_type_ids"] = torch.where(padded, 1 - inputs["token_type_ids"], inputs["token_type_ids"])
    mask = inputs["pixel_mask"] == 0
    if "pixel_values" in inputs:
        channels = mask.dim() - 2
        inputs["pixel_values"] = inputs["pixel_values"].masked_fill(mask.unsqueeze(channels), float("nan"))
    else:
        inputs["image_embeds"] = poisoned(inputs["image_embeds"], mask.flatten(-2))
    return inputs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", ["ids", "embeds"])
@pytest.mark.parametrize("image", ["pixels", "embeds"])
@pytest.mark.parametrize("kind", ["trunk", "nlvr2", "masked_lm"])
def test_what_lies_in_padding_changes_nothing(kind, dtype, text, image):
    ours = vilt_fast.accelerate(build(kind, dtype))
    inputs = batch(kind, dtype, text=text, image=image)
    for flags in ({}, EXTRAS):
        clean, dirty = (outputs_of(ours, i, **flags) for i in (inputs, garbage_in_padding(inputs)))
        assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(clean, dirty, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("where", "sample"),  # the text of sample 2 is all padding
    [("pixel_values", 0), ("pixel_values", 2), ("image_embeds", 0), ("inputs_embeds", 0), ("inputs_embeds", 1)],
)
def test_nan_stays_in_its_sample(dtype, where, sample):
    ours = vilt_fast.accelerate(build("trunk", dtype))
    text = "embeds" if where == "inputs_embeds" else "ids"
    inputs = batch("trunk", dtype, text=text, image="embeds" if where == "image_embeds" else "pixels")
    broken = dict(inputs)
    broken[where] = inputs[where].clone()
    broken[where][sample].view(-1)[33] = float("nan")  # a real token's in every case: the second, or of the first patch
    others = torch.arange(4) != sample
    for clean, dirty in zip(outputs_of(ours, inputs, **EXTRAS), outputs_of(ours, broken, **EXTRAS), strict=True):
        assert torch.equal(clean[others], dirty[others])
    assert call(ours, broken).pooler_output[sample].isnan().all()


def test_a_batch_is_its_samples():
    """Every sample alone gives what it gives in the batch: nothing leaks across."""
    ours = vilt_fast.accelerate(build("trunk"))
    inputs = batch("trunk")
    together = call(ours, inputs)
    for b in range(4):
        alone = call(ours, {k: v[b : b + 1] for k, v in inputs.items()})
        assert_close(alone.pooler_output[0], together.pooler_output[b])
        width = alone.last_hidden_state.shape[1]
        assert_close(alone.last_hidden_state[0], together.last_hidden_state[b, :width])


@pytest.mark.parametrize("kind", ["trunk", "nlvr2", "masked_lm"])
@pytest.mark.parametrize("text", ["ids", "embeds"])
@pytest.mark.parametrize("image", ["pixels", "embeds"])
def test_inputs_and_parameters_are_not_modified(kind, text, image):
    for dtype in (torch.float64, torch.float32):
        ours = vilt_fast.accelerate(build(kind, dtype))
        inputs = batch(kind, dtype, text=text, image=image)
        before, weights = copy.deepcopy(inputs), copy.deepcopy(ours.state_dict())
        outputs_of(ours, inputs, **EXTRAS)
        assert all(torch.equal(inputs[k], before[k]) for k in inputs)
        assert all(torch.equal(v, weights[k]) for k, v in ours.state_dict().items())


def test_outputs_are_the_callers_own():
    """Writing into one output changes neither another output nor the next call."""
    ours = vilt_fast.accelerate(build("trunk", torch.float32))
    inputs = changed(attention_mask=None, pixel_mask=None, pixel_values=batch("trunk")["pixel_values"].float())
    with torch.no_grad():
        first = call(ours, inputs, **EXTRAS)
        kept = [t.clone() for _, t in leaves(first)]
        for _, tensor in leaves(first):
            tensor.fill_(7)
            assert sum(bool((t == 7).all()) for _, t in leaves(first)) == 1
            tensor.zero_()
        assert all(torch.equal(t, k) for (_, t), k in zip(leaves(call(ours, inputs, **EXTRAS)), kept, strict=True))


def test_sampled_patches_follow_the_generator_and_leave_the_default_one_alone():
    def pooled(seed):
        model = build("trunk", max_image_length=4)
        vilt_fast.accelerate(model, generator=torch.Generator().manual_seed(seed))
        return torch.stack([call(model, batch("trunk")).pooler_output for _ in range(2)])

    assert torch.equal(pooled(1), pooled(1)) and not torch.equal(pooled(1), pooled(2))
    assert not torch.equal(*pooled(1).unbind(0))
    ours = vilt_fast.accelerate(build("trunk"))
    torch.manual_seed(0)
    ours(**batch("trunk"))
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))  # raster order draws nothing


@pytest.mark.parametrize("ahead", [False, True])
def test_a_plan_made_in_inference_mode_serves_training_too(ahead):
    packing._with_pixels.cache_clear()
    _, ours = pair("trunk")
    with torch.inference_mode():
        plan = vilt_fast.sequence_plan(ours, **batch("trunk"))
        ours(**batch("trunk"))
    ours(**batch("trunk"), sequence_plan=plan if ahead else None).last_hidden_state.sum().backward()
    assert all(p.grad is not None for p in ours.encoder.parameters())


def test_a_plan_can_be_made_once():
    for kind in ("trunk", "masked_lm", "token_classification"):
        ours = vilt_fast.accelerate(build(kind))
        inputs = batch(kind)
        plan = vilt_fast.SequencePlan.from_masks(
            inputs["attention_mask"],
            inputs["pixel_mask"],
            text_shape=(4, TEXT),
            pixel_shape=(4, 3, 48, 80),
            patch_size=(PATCH, PATCH),
            position_grid=4,
            position_dtype=torch.float64,
        )
        expected, actual = call(ours, inputs), call(ours, inputs, sequence_plan=plan)
        assert all(a is b or torch.equal(a, b) for (_, a), (_, b) in zip(leaves(actual), leaves(expected), strict=True))


# --- which way a block takes ------------------------------------------------------------------------------------------


@pytest.fixture
def native_blocks(monkeypatch):
    """A list that grows by one entry a block whenever the fused encoder runs."""
    ran = []
    encoder = functional.encoder

    def counted(rows, parameters, *args, **kwargs):
        ran.extend([kwargs["compute"]] * (len(parameters) // 16))
        return encoder(rows, parameters, *args, **kwargs)

    monkeypatch.setattr(functional, "encoder", counted)
    return ran


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["trunk", "masked_lm", "nlvr2"])
def test_inference_is_one_native_call(native_blocks, kind, dtype):
    ours = vilt_fast.accelerate(build(kind, dtype))
    inputs = batch(kind, dtype)
    with torch.no_grad():
        ours(**inputs)
    assert native_blocks == [str(dtype).removeprefix("torch.")] * 3
    native_blocks.clear()
    with torch.inference_mode():
        ours(**inputs, output_hidden_states=True)
    assert len(native_blocks) == 3


def test_what_the_native_encoder_cannot_do_goes_another_way(native_blocks):
    def run(model, **flags):
        native_blocks.clear()
        with torch.no_grad():
            call(model, batch("trunk", next(model.parameters()).dtype), **flags)
        return len(native_blocks)

    def made(dtype=torch.float32, **config):
        return vilt_fast.accelerate(build("trunk", dtype, **config))

    assert run(made()) == 3
    assert run(made(), output_attentions=True) == 0
    assert run(made(torch.float64)) == 0
    assert run(made(torch.float16)) == 0
    assert run(made(hidden_act="relu")) == 0
    assert run(made(hidden_dropout_prob=0.1).train()) == 0
    assert run(made(attention_probs_dropout_prob=0.1).train()) == 0
    assert run(made(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)) == 3
    assert run(made().train()) == 3
    hooked = made()
    hooked.encoder.layer[1].output.dense.register_forward_hook(lambda *_: None)
    assert run(hooked) == 2
    mixed = made()
    mixed.encoder.layer[0].bfloat16()
    assert run(mixed) in (2, 3)
    with torch.autocast("cpu", torch.float16):
        assert run(made()) == 0


def test_blocks_that_go_three_ways_in_one_model():
    """Native, packed, padded and native again, against the reference in each dtype."""

    def change(model):
        model.encoder.layer[1].intermediate.intermediate_act_fn = nn.ReLU()
        model.encoder.layer[2].register_forward_hook(lambda module, args, out: None)

    compare(batch("trunk"), change=change, config={"num_hidden_layers": 4})
    for dtype in (torch.float32, torch.bfloat16):
        theirs, ours = pair("trunk", dtype, num_hidden_layers=4)
        change(theirs), change(ours)
        inputs = batch("trunk", dtype)
        masks = real_positions(theirs, inputs)
        with torch.no_grad():
            exact = call(copy.deepcopy(theirs).double(), as_dtype(inputs, torch.float64), output_hidden_states=True)
            expected, actual = (call(m, inputs, output_hidden_states=True) for m in (theirs, ours))
        assert_same_output("trunk", actual, expected, masks, exact=exact)


@pytest.mark.parametrize("kind", ["trunk", "masked_lm", "nlvr2", "question_answering"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])  # float16: the reference raises
@pytest.mark.parametrize("grad", [True, False])
def test_autocast(kind, dtype, grad):
    theirs, ours = pair(kind, dtype)
    exact_model = build(kind, dtype).double()
    rows = {}
    for flags, dense in (({}, False), (EXTRAS, False), (EXTRAS, True)):
        for seed in range(3):
            inputs = batch(kind, dtype, seed=seed)
            if dense:
                del inputs["attention_mask"], inputs["pixel_mask"]
            masks = real_positions(theirs, inputs)
            with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
                expected, actual = call(theirs, inputs, **flags), call(ours, inputs, **flags)
            with torch.no_grad():
                exact = call(exact_model, as_dtype(inputs, torch.float64), **flags)
            assert_same_structure(actual, expected)
            for (path, mine), (_, other), (_, right) in zip(*map(leaves, (actual, expected, exact)), strict=True):
                if mine is not None:
                    other, right = (only_real(path, t, masks, kind)[0] for t in (other, right))
                    rows.setdefault((path, bool(flags), dense), []).append((mine, other, right))
    for path, parts in rows.items():
        mine, other, right = map(torch.stack, zip(*parts, strict=True))
        if dtype == torch.float64:  # which autocast leaves alone
            assert_close(mine, other, path)
        else:
            assert_within_budget(mine, other, right, what=path)

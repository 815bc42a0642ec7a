"""CUDA graphs of the encoder: buckets, buffers and what makes a capture stale. Real graphs on a GPU; without one the
recording is a plain call that writes to the same memory, so that everything around it is the same."""

import copy
import threading
import warnings

import pytest
import torch
from support.copies import pickled
from support.graphs import (
    GPU,
    assert_same,
    cache,
    call_quietly,
    in_place,
    inputs_of,
    small,
    through_data,
)
from support.models import batch, build, call
from torch import nn

import vilt_fast
from vilt_fast.engine import graphs

# --- buckets ----------------------------------------------------------------------------------------------------------


def test_buckets_hold_their_plans_and_waste_little():
    model = vilt_fast.accelerate(build("trunk"))
    for samples in ([0], [0, 1], [0, 1, 2], [3, 1, 0, 2]):
        plan = vilt_fast.sequence_plan(model, **{k: v[samples] for k, v in batch("trunk").items()})
        bucket = graphs.Bucket.of(plan)
        assert bucket.rows >= plan.total_rows and bucket.samples >= plan.batch and bucket.max_seqlen >= plan.max_seqlen
        assert bucket.rows - plan.total_rows <= max(63, plan.total_rows / 8)


def test_a_bucket_never_takes_attention_off_the_way_that_its_batches_take():
    attention = pytest.importorskip("vilt_fast.kernels.attention")
    for longest in range(1, 400):
        bucket = graphs.length_of(longest)
        for pairs in (12, 12 * 64):
            own, of_bucket = (attention._forward_config(90, 2, 64, n, n, pairs, 132) for n in (longest, bucket))
            if own.get("SINGLE", True):  # one without is for whole samples
                assert of_bucket.get("SINGLE", True) and of_bucket["BLOCK_N"] == own["BLOCK_N"], (longest, pairs)


# --- right ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "padding"), [("trunk", "zero"), ("nlvr2", "zero"), ("masked_lm", "zero"), ("trunk", "reference")]
)
def test_same_results_in_any_order_of_batches(kind, padding, device):
    plain, model = small(device, kind, padding=padding)
    for seed, samples in enumerate(([0, 1, 2, 3], [2], [0, 1, 2], [1, 3], [3, 2, 1, 0], [2], [0, 1])):
        inputs = {k: v[samples].to(device) for k, v in batch(kind, torch.float32, seed=seed).items()}
        assert_same(model, plain, inputs)
    trunk = model if kind == "trunk" else model.vilt
    assert 1 < len(trunk.forward.graphs) < 7  # some batches shared a bucket


def test_what_a_batch_leaves_behind_reaches_no_other(device):
    plain, model = small(device)
    spoiled = inputs_of(device)
    spoiled["attention_mask"][2] = 1  # more rows than the next batch, in the same bucket
    spoiled["pixel_values"] = spoiled["pixel_values"] * float("nan")
    call_quietly(model, spoiled)
    assert_same(model, plain, inputs_of(device))
    assert len(cache(model)) == 1


def test_results_are_the_callers_own(device):
    _, model = small(device)
    plan = vilt_fast.sequence_plan(model, **inputs_of(device))
    rows, made = torch.randn(2, plan.total_rows, 8, device=device), graphs.Graphs()
    first, second = (made.blocks(lambda: lambda x, spans, wanted: x * 2, r, plan, ()) for r in rows)
    assert len(made) == 1
    assert torch.equal(first, rows[0] * 2) and torch.equal(second, rows[1] * 2)


def test_captured_in_one_mode_and_replayed_in_another(device):
    plain, model = small(device)
    inputs = inputs_of(device)
    for context in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(call(model, inputs).pooler_output, call(plain, inputs).pooler_output)
    _, other = small(device)
    with torch.no_grad():
        call(other, inputs)
    with torch.inference_mode():
        torch.testing.assert_close(call(other, inputs).pooler_output, call(plain, inputs).pooler_output)


def test_one_capture_a_bucket_and_none_in_training(device):
    _, model = small(device)
    call(model, inputs_of(device))
    call(model.train(), inputs_of(device)).last_hidden_state.sum().backward()
    assert len(cache(model)) == 0
    model.eval()
    for _ in range(3):
        call_quietly(model, inputs_of(device))
        assert len(cache(model)) == 1
    with torch.no_grad():
        call(model, inputs_of(device), output_hidden_states=True)
        call(model, inputs_of(device), output_attentions=True)
    assert len(cache(model)) == 1
    call_quietly(model.train(), inputs_of(device))  # live dropout: no graph, and what there was is another model's
    assert len(cache(model)) == 0


# --- stale ------------------------------------------------------------------------------------------------------------


def another_eps(model):
    for layer in model.encoder.layer:
        layer.layernorm_before.eps = 0.1


def loaded(model):
    model.load_state_dict({k: v * 0.9 for k, v in model.state_dict().items()})


def halved(model):
    model.half() if GPU else model.double()


@pytest.mark.parametrize("quantize", [None, "fp8"])
@pytest.mark.parametrize("change", [in_place, through_data, another_eps, loaded, halved])
def test_changes_are_seen(change, quantize, device):
    plain, model = small(device, quantize=quantize)
    before = assert_same(model, plain, inputs_of(device)).last_hidden_state
    captured = list(cache(model)._graphs.values())
    change(plain)
    change(model)
    dtype = next(model.parameters()).dtype
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs_of(device).items()}
    after = assert_same(model, plain, inputs).last_hidden_state
    assert after.dtype != before.dtype or not torch.allclose(before, after, rtol=1e-3)
    if quantize is None:  # what is written into the same memory is read there; all else takes another graph
        assert (list(cache(model)._graphs.values()) == captured) == (change in (in_place, loaded))


def other_heads(model):
    for module in model.modules():
        if hasattr(module, "num_attention_heads"):
            module.num_attention_heads, module.attention_head_size = 2, module.all_head_size // 2


def other_function_within(model):
    for layer in model.vilt.encoder.layer:
        layer.intermediate.intermediate_act_fn.act = torch.tanh


@pytest.mark.parametrize("change", [other_heads, other_function_within, nn.Module.double])
def test_changes_are_seen_where_blocks_alone_are_a_graph(change, device):
    plain, model = small(device, "nlvr2")
    inputs = {k: v.to(device) for k, v in batch("nlvr2", torch.float32).items()}
    before = assert_same(model, plain, inputs).logits
    assert {key[0] for key in model.vilt.forward.graphs._graphs} == {"blocks"}
    change(plain)
    change(model)
    dtype = next(model.parameters()).dtype
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    after = assert_same(model, plain, inputs).logits
    assert after.dtype != before.dtype or not torch.allclose(before, after, rtol=1e-3)


def test_hooks_are_honoured(device):
    plain, model = small(device)
    assert_same(model, plain, inputs_of(device))
    for m in (plain, model):
        m.encoder.layer[1].register_forward_hook(lambda module, args, output: (output[0] * 2, *output[1:]))
    assert_same(model, plain, inputs_of(device))


@pytest.mark.parametrize("where, name", [(nn.Linear, "forward"), (nn.functional, "layer_norm")])
def test_what_is_assigned_to_a_class_is_honoured(device, monkeypatch, where, name):
    plain, model = small(device)
    before = assert_same(model, plain, inputs_of(device)).last_hidden_state
    own = getattr(where, name)
    monkeypatch.setattr(where, name, lambda *args, **kwargs: own(*args, **kwargs) * 2)
    after = assert_same(model, plain, inputs_of(device)).last_hidden_state
    assert not torch.allclose(before, after)
    monkeypatch.undo()
    torch.testing.assert_close(assert_same(model, plain, inputs_of(device)).last_hidden_state, before)


def test_autocast(device):
    plain, model = small(device)
    assert_same(model, plain, inputs_of(device))
    for _ in range(2):
        with torch.autocast(device, torch.bfloat16):
            assert_same(model, plain, inputs_of(device))
        assert_same(model, plain, inputs_of(device))
    assert len(cache(model)) == 2


# --- kept -------------------------------------------------------------------------------------------------------------


def test_no_more_than_so_many_are_kept(device, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    plain, model = small(device)
    for samples in ([0], [0, 1], [0, 1, 2], [0]):
        assert_same(model, plain, inputs_of(device, samples))
        assert len(cache(model)) <= 2


def test_copies_have_graphs_of_their_own(device):
    plain, model = small(device)
    assert_same(model, plain, inputs_of(device))
    for duplicate in (copy.deepcopy(model), pickled(model)):
        assert len(cache(duplicate)) == 0
        in_place(duplicate)
        assert_same(model, plain, inputs_of(device))


def test_threads_take_turns(device):
    plain, model = small(device)
    wanted = [call_quietly(plain, inputs_of(device, seed=seed)).last_hidden_state for seed in range(4)]
    wrong = []

    def work(seed):
        for _ in range(5):
            got = call_quietly(model, inputs_of(device, seed=seed)).last_hidden_state
            if not torch.allclose(got, wanted[seed], rtol=1e-3, atol=1e-4):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_cpu_is_not_touched():
    model = vilt_fast.accelerate(build("trunk", torch.float32), cuda_graphs=True)
    call_quietly(model, inputs_of("cpu"))
    assert len(cache(model)) == 0


@pytest.mark.gpu
def test_streams_take_turns():
    """Also those that replay different graphs: all share one pool of memory."""
    plain, model = small("cuda")
    batches = [inputs_of("cuda", slice(0, 1 + seed % 4), seed=seed) for seed in range(8)]
    wanted = [call_quietly(plain, inputs).last_hidden_state for inputs in batches]
    for inputs in batches:  # captured, so that what follows only replays
        call_quietly(model, inputs)
    torch.cuda.synchronize()
    found = []
    for inputs in batches:
        with torch.cuda.stream(torch.cuda.Stream()):
            found.append(call_quietly(model, inputs).last_hidden_state)
    torch.cuda.synchronize()
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.gpu
def test_a_replay_waits_for_nothing():
    _, model = small("cuda")
    inputs = inputs_of("cuda")
    plan = vilt_fast.sequence_plan(model, **inputs)
    with torch.no_grad():
        model(**inputs, sequence_plan=plan)
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(**inputs, sequence_plan=plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# --- said -------------------------------------------------------------------------------------------------------------


def ways(model, inputs):
    with torch.no_grad():
        rows = vilt_fast.explain(model, **inputs).rows
    return [row.way for row in rows if row.part.startswith("block ")]


def test_a_replay_is_said_and_what_takes_its_place_too(device):
    _, model = small(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ways(model, inputs_of(device)) == ways(model, inputs_of(device)) == ["CUDA graph"] * 2
    handle = model.encoder.layer[0].register_forward_hook(lambda *_: None)
    lost = "cuda_graphs was asked for, but the stack of blocks does without: a forward hook"
    with pytest.warns(UserWarning, match=lost) as said:
        assert ways(model, inputs_of(device)) == ways(model, inputs_of(device)) == ["padded", "packed"]
    assert len(said) == 1
    handle.remove()
    assert ways(model, inputs_of(device)) == ["CUDA graph"] * 2

"""CUDA graphs of the encoder: buckets, buffers and what makes a capture stale. Real graphs on a GPU; without one the
recording is a plain call that writes to the same memory, so that everything around it is the same."""

import contextlib
import copy
import functools
import gc
import pickle
import threading
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from support.graphs import Again, played
from support.models import batch, build, call, leaves
from torch import nn

import vilt_fast
from vilt_fast.engine import graphs
from vilt_fast.models.vilt import whole

GPU = torch.cuda.is_available()
SMALL = {"hidden_size": 64, "num_hidden_layers": 2}


@pytest.fixture
def device(monkeypatch):
    if GPU:
        return "cuda"
    played(monkeypatch)
    return "cpu"


def small(device, kind="trunk", **options):
    """(plain accelerated model, the same with graphs), equal weights."""
    model = build(kind, torch.float32, **SMALL).to(device)
    with_graphs = vilt_fast.accelerate(copy.deepcopy(model), cuda_graphs=True, **options)
    return vilt_fast.accelerate(model, cuda_graphs=False, **options), with_graphs


def inputs_of(device, samples=slice(None), **more):
    found = batch("trunk", torch.float32, **more)
    return {k: v[samples].to(device) for k, v in found.items()}


def cache(model):
    return model.forward.graphs


@torch.no_grad()
def assert_same(model, other, inputs, **more):
    """Bucketed rows go through the same kernels, but matrix products may be tiled otherwise."""
    mine, plain = call(model, inputs, **more), call(other, inputs, **more)
    for (path, a), (_, b) in zip(leaves(mine), leaves(plain), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, path=path: f"{path}: {text}")
    return mine


# --- buckets ----------------------------------------------------------------------------------------------------------


def test_buckets_hold_their_plans_and_waste_little():
    model = vilt_fast.accelerate(build("trunk"))
    for samples in ([0], [0, 1], [0, 1, 2], [3, 1, 0, 2]):
        plan = vilt_fast.sequence_plan(model, **{k: v[samples] for k, v in batch("trunk").items()})
        bucket = graphs.Bucket.of(plan)
        assert bucket.rows >= plan.total_rows and bucket.samples >= plan.batch and bucket.max_seqlen >= plan.max_seqlen
        assert bucket.rows - plan.total_rows <= max(63, plan.total_rows / 8)


# --- recorded ---------------------------------------------------------------------------------------------------------


class Played:
    """torch.cuda with two devices, as far as a recording goes: notes which stream work is launched on."""

    def __init__(self, monkeypatch):
        self.device, self.on, self.log, self.streams = 0, {0: "default 0", 1: "default 1"}, [], []
        played = self

        class Stream:
            def __init__(self, device):
                self.device = torch.device(device).index
                played.streams.append(self)

            def wait_stream(self, other):
                played.log.append(("waits", self, other))

        @contextlib.contextmanager
        def device(which):
            before, self.device = self.device, torch.device(which).index
            yield
            self.device = before

        @contextlib.contextmanager
        def stream(which):
            before, self.device = self.device, which.device
            default, self.on[which.device] = self.on[which.device], which
            yield
            self.device, self.on[which.device] = before, default

        @contextlib.contextmanager
        def graph(graph, pool=None, stream=None, capture_error_mode=None):
            with torch.cuda.stream(stream or Stream("cuda:0")):
                self.log.append(("captures", pool))
                yield

        class Default:
            def __init__(self, device):
                self.device = device

            wait_stream = Stream.wait_stream

        for name, fake in {
            "Stream": Stream, "device": device, "stream": stream, "graph": graph,
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
            "current_stream": lambda device=None: Default(self.device if device is None else device.index),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(graphs, "_capture_stream", functools.cache(graphs._capture_stream.__wrapped__))

    def launch(self, device):
        """What a function does: a kernel of a tensor's device goes to the stream that is current on that device."""
        self.log.append(("launches", self.on[device]))
        return "result"


def test_a_recording_is_made_on_one_stream_of_the_tensors_own_device(monkeypatch):
    played = Played(monkeypatch)
    for device in (0, 1, 1):  # the current device stays the first all the time
        recording = graphs.Recording(lambda device=device: played.launch(device), torch.device("cuda", device), "pool")
        assert recording.result == "result" and played.device == 0
    assert [stream.device for stream in played.streams] == [0, 1]  # one a device, and no other
    first, second = played.streams
    kinds = [kind for kind, *_ in played.log]
    assert kinds == ["waits", "launches", "launches", "waits", "captures", "launches"] * 3
    assert [what for kind, what, *_ in played.log if kind == "launches"] == [first] * 3 + [second] * 6
    assert [what for kind, what, *_ in played.log if kind == "captures"] == ["pool"] * 3
    assert all(entry[1].device == entry[2].device for entry in played.log if entry[0] == "waits")


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


@torch.no_grad()
def call_quietly(model, inputs):
    return call(model, inputs)


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


def in_place(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)


def through_data(model):
    for p in model.parameters():
        p.data = p.data * 1.1


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
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
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


# --- whole forwards ---------------------------------------------------------------------------------------------------

TASKS = ["trunk", "trunk_without_pooler", "question_answering", "retrieval", "masked_lm", "token_classification"]


def kinds(model):
    trunk = model if hasattr(model, "embeddings") else model.vilt
    return {key[0] for key in trunk.forward.graphs._graphs}


@pytest.mark.parametrize("padding", ["zero", "reference"])
@pytest.mark.parametrize("kind", TASKS)
def test_a_task_is_one_graph_and_so_is_a_trunk(kind, padding, device):
    plain, model = small(device, kind, padding=padding)
    for seed, samples in enumerate(([0, 1, 2, 3], [1], [3, 0], [0, 1, 2, 3], [2])):
        inputs = {k: v[samples].to(device) for k, v in batch(kind, torch.float32, seed=seed).items()}
        assert_same(model, plain, inputs)
        inputs["token_type_ids"] = None
        assert_same(model, plain, inputs)
    assert kinds(model) == {"whole" if kind.startswith("trunk") else "whole with its head"}
    with torch.no_grad():
        rows = vilt_fast.explain(model, **inputs).rows
    assert {row.way for row in rows} == {"CUDA graph"}


def test_the_canvas_and_the_padded_width_are_none_of_the_graph(device):
    """Images of the same patches on a larger canvas, texts of the same tokens in a longer one; other pixels."""
    plain, model = small(device)
    assert_same(model, plain, inputs_of(device))
    wider = inputs_of(device)
    wider["pixel_values"] = nn.functional.pad(wider["pixel_values"], (0, 40, 0, 23), value=float("nan"))
    wider["pixel_mask"] = nn.functional.pad(wider["pixel_mask"], (0, 40, 0, 23))
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        wider[name] = nn.functional.pad(wider[name], (0, 2))
    torch.testing.assert_close(
        call_quietly(model, wider).pooler_output, call_quietly(model, inputs_of(device)).pooler_output
    )
    assert len(cache(model)) == 1
    assert_same(model, plain, inputs_of(device) | {"pixel_values": inputs_of(device)["pixel_values"].double()})
    assert len(cache(model)) == 2


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("kind", "change", "expected"),
    [
        ("question_answering", lambda m: m.classifier.append(Doubled(5, 5)), "whole with its head"),
        ("question_answering", lambda m: m.vilt.pooler.dense.register_forward_hook(lambda *_: None), "blocks"),
        ("trunk", lambda m: setattr(m, "layernorm", nn.Sequential(m.layernorm)), "blocks"),
        ("nlvr2", lambda m: None, "blocks"),
        ("trunk", lambda m: m.embeddings.text_embeddings.register_forward_hook(lambda *_: None), "blocks"),
    ],
)
def test_what_cannot_be_in_the_graph_stays_outside(kind, change, expected, device):
    plain, model = small(device, kind)
    for m in (plain, model):
        torch.manual_seed(1)
        change(m)
        m.to(device).eval()
    for _ in range(2):
        assert_same(model, plain, {k: v.to(device) for k, v in batch(kind, torch.float32).items()})
    assert kinds(model) == {expected}
    if expected.startswith("whole"):
        with torch.no_grad():
            *_, head = vilt_fast.explain(model, **batch(kind, torch.float32)).rows
        assert head.part == "head" and head.way == "packed"


@pytest.mark.parametrize("where", ["embeddings", "layernorm", "pooler", "classifier"])
def test_changes_around_the_blocks_are_seen(where, device):
    plain, model = small(device, "question_answering")
    inputs = {k: v.to(device) for k, v in batch("question_answering", torch.float32).items()}
    before = assert_same(model, plain, inputs).logits
    for m in (plain, model):
        part = m.classifier if where == "classifier" else getattr(m.vilt, where)
        through_data(part)
    after = assert_same(model, plain, inputs).logits
    assert not torch.allclose(before, after)
    for m in (plain, model):
        in_place(m)
        m.classifier[2].approximate = "tanh" if where == "classifier" else "none"
    assert_same(model, plain, inputs)
    for m in (plain, model):
        m.vilt.pooler.dense.weight = nn.Parameter(m.vilt.pooler.dense.weight.detach() + 0.01)
    assert_same(model, plain, inputs)


def test_a_model_that_is_restored_and_accelerated_again_replays_nothing_old(device):
    plain, model = small(device)
    assert_same(model, plain, inputs_of(device))
    with vilt_fast.restored(model):
        through_data(model)
    through_data(plain)
    assert_same(model, plain, inputs_of(device))
    vilt_fast.restore(model)
    vilt_fast.accelerate(model)
    assert len(cache(model)) == 0
    assert_same(model, plain, inputs_of(device))


class Once:
    """A recording that forgets what it was made of, as a real one does."""

    def __init__(self, function, device, pool):
        self.result = function()

    def replay(self):
        pass


def test_a_model_is_not_kept_alive(device, monkeypatch):
    if not GPU:
        monkeypatch.setattr(graphs, "Recording", Once)
    _, model = small(device)
    call_quietly(model, inputs_of(device))
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


# --- asked for, or not ------------------------------------------------------------------------------------------------


def automatic(device, kind="trunk"):
    plain, model = small(device, kind)
    return plain, vilt_fast.accelerate(vilt_fast.restore(model))


def test_graphs_are_the_default_and_say_nothing(device):
    plain, model = automatic(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(model, plain, inputs_of(device))
        assert len(cache(model)) == 1
        call(model, inputs_of(device))  # gradients
        model.encoder.layer[0].register_forward_hook(lambda *_: None)
        call_quietly(model, inputs_of(device))
    assert vilt_fast.accelerate(model, cuda_graphs=False).forward.graphs is None


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
@pytest.mark.parametrize("make", [automatic, small])
def test_a_capture_that_fails_is_said_once_and_leaves_the_model_working(make, error, device, monkeypatch):
    plain, model = make(device)
    tried = []

    def fails(function, device, pool):
        tried.append(1)
        raise error("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "Recording", fails)
    with pytest.warns(UserWarning, match="is off from now on: a capture has failed .operation not permitted") as said:
        for samples in ([0, 1, 2], [0], [0, 1, 2]):
            assert_same(model, plain, inputs_of(device, samples))
    assert len(said) == len(tried) == 1 and len(cache(model)) == 0
    with torch.no_grad():
        row = next(row for row in vilt_fast.explain(model, **inputs_of(device)).rows if row.part == "block 0")
    assert row.way == "packed" and (device == "cpu" or "has failed" in row.why)


def test_a_shape_outside_every_bucket_runs_as_it_is(device, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_ROWS", 64)
    monkeypatch.setattr(whole, "MOST_ROWS", 64)
    plain, model = automatic(device)
    assert_same(model, plain, inputs_of(device))
    assert len(cache(model)) == 0
    _, insists = small(device)
    with pytest.warns(UserWarning, match="rows are more than a graph is captured for"):
        call_quietly(insists, inputs_of(device))


def test_captures_that_do_not_pay_are_not_made(device, monkeypatch):
    monkeypatch.setattr(graphs, "FREE", 2)
    monkeypatch.setattr(graphs, "PAID_BY", 3)
    plain, model = automatic(device)
    for _ in range(2):
        for samples in ([0, 1, 2, 3], [0], [1, 3]):
            assert_same(model, plain, inputs_of(device, samples))
    assert len(cache(model)) == 3 and Again.made in (0, 3)  # the third when the first two had been replayed
    monkeypatch.setattr(graphs, "PAID_BY", 1000)
    _, other = automatic(device)
    for samples in ([0, 1, 2, 3], [0], [1, 3]):
        assert_same(other, plain, inputs_of(device, samples))
    assert len(cache(other)) == 2


# --- buckets of attention, two devices --------------------------------------------------------------------------------


def test_a_bucket_never_takes_attention_off_the_way_that_its_batches_take():
    attention = pytest.importorskip("vilt_fast.kernels.attention")
    for longest in range(1, 400):
        bucket = graphs.length_of(longest)
        for pairs in (12, 12 * 64):
            own, of_bucket = (attention._forward_config(90, 2, 64, n, n, pairs, 132) for n in (longest, bucket))
            if own["SINGLE"]:
                assert of_bucket["SINGLE"] and of_bucket["BLOCK_N"] == own["BLOCK_N"], (longest, pairs)


def test_graphs_of_two_devices_share_nothing(monkeypatch):
    """One pool, one event, one stream and one set of buffers each, whichever device is current."""
    played_devices, pools, events = Played(monkeypatch), iter(("pool 0", "pool 1")), []

    class Event:
        def __init__(self):
            self.device, self.log = played_devices.device, []
            events.append(self)

        def wait(self):
            self.log.append(("waits", played_devices.device))

        def record(self):
            self.log.append(("records", played_devices.device))

    for name, fake in {"graph_pool_handle": lambda: next(pools), "Event": Event}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    # Memory of a device that is not there.
    monkeypatch.setattr(
        graphs, "_buffer", lambda one, known, at: known.setdefault((at, one.dtype), torch.zeros(one.shape))
    )
    made = graphs.Graphs()
    for index in (0, 1, 0, 1):
        device = torch.device("cuda", index)
        given = {"x": graphs.Given((4,), torch.float32, lambda to: None, shared=True)}

        def prepare(index=index):
            return lambda at: (played_devices.launch(index), torch.ones(2))[1:]

        (result,) = made.run(("of a test", 4), device, given, prepare)
        assert result.tolist() == [1, 1]
    assert len(made) == 2 and {device.index for device, _ in made._buffers} == {0, 1}
    assert [event.device for event in events] == [0, 1]
    assert all({device for _, device in event.log} == {event.device} for event in events)
    assert [what for kind, what, *_ in played_devices.log if kind == "captures"] == ["pool 0", "pool 1"]
    launched = [what for kind, what, *_ in played_devices.log if kind == "launches"]
    assert launched == [played_devices.streams[0]] * 3 + [played_devices.streams[1]] * 3

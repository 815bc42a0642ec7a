"""CUDA graphs of two devices, played: each is recorded on a stream of its own device, and they share nothing."""

import contextlib
import functools
from types import SimpleNamespace

import torch

from vilt_fast.engine import graphs


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
        given = {"x": graphs.Given((4,), torch.float32, shared=True)}

        def prepare(index=index, given=given):
            return given, lambda at: (played_devices.launch(index), torch.ones(2))[1:]

        (result,) = made.run(("of a test", 4), device, lambda at, before: None, prepare)
        assert result.tolist() == [1, 1]
    assert len(made) == 2 and {device.index for device, _ in made._buffers} == {0, 1}
    assert [event.device for event in events] == [0, 1]
    assert all({device for _, device in event.log} == {event.device} for event in events)
    assert [what for kind, what, *_ in played_devices.log if kind == "captures"] == ["pool 0", "pool 1"]
    launched = [what for kind, what, *_ in played_devices.log if kind == "launches"]
    assert launched == [played_devices.streams[0]] * 3 + [played_devices.streams[1]] * 3

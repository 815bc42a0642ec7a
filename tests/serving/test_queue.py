"""The queue: what is packed with what, what is refused, given up, or finished."""

import dataclasses
import json
import socket
import threading
import time

import numpy as np
import pytest
import torch
from support import served
from support.models import build

from vilt_fast.models import find_pairs
from vilt_fast.scoring import pictures as pictures_of
from vilt_fast.scoring.workers import Engine, Unreadable
from vilt_fast.serving.batching import Batching, Full

IMAGES = served.photographs()


@dataclasses.dataclass
class Gate:
    """A queue whose batches and images wait until somebody opens."""

    queue: Batching
    batches: list
    open: threading.Event
    process: object

    def submit(self, lengths, images=(0,), files=IMAGES):
        pictures = pictures_of.read([files[n] for n in images], lambda: self.process)
        pairs = [(np.arange(1, length + 1), n % len(pictures)) for n, length in enumerate(lengths)]
        return self.queue.submit(pairs, pictures)


@pytest.fixture
def gate(request):
    model = build("retrieval", torch.float32)
    settings = {"budget": 40, "most": 20, "workers": 1} | getattr(request, "param", {})
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    kept = lambda logits: logits[:, 0].numpy()  # noqa: E731
    with Engine(find_pairs(model), settings["workers"], kept) as engine, torch.no_grad():
        found = Gate(None, [], threading.Event(), served.processor(model).image_processor)
        own = engine.batch

        def held(texts, images):
            found.batches.append([len(text) for text in texts])
            assert found.open.wait(20)
            return own(texts, images)

        engine.batch = held
        found.queue = Batching(engine, settings["budget"], settings["most"])
        yield found
        found.open.set()
        found.queue.close()
    torch.set_num_threads(before)


def test_who_comes_meanwhile_is_packed_to_the_budget(gate):
    """Rows of a pair: its text and [CLS] and 16 patches. The first goes at once, the rest in order, 40 rows at most."""
    first = gate.submit([3])
    served.until(lambda: gate.batches)
    rest = [gate.submit([length]) for length in (2, 2, 5, 1, 12, 12)]
    gate.open.set()
    for future in (first, *rest):
        assert len(future.result(20)) == 1
    assert gate.batches == [[3], [2, 2], [5, 1], [12], [12]]


@pytest.mark.parametrize("gate", [{"budget": 1000, "workers": 2}], indirect=True)
def test_idle_threads_share_what_is_there(gate):
    served.until(lambda: gate.queue._idle == 2)
    future = gate.submit([1, 2, 3, 4, 5, 6])
    served.until(lambda: len(gate.batches) == 2)
    assert sorted(sum(gate.batches, [])) == [1, 2, 3, 4, 5, 6] and all(len(batch) == 3 for batch in gate.batches)
    gate.open.set()
    assert len(future.result(20)) == 6


def test_results_come_in_the_order_of_the_pairs(gate):
    gate.open.set()
    alone = [gate.submit([length], [n % 3]).result(20)[0] for n, length in enumerate((5, 2, 7, 1, 4, 3))]
    together = gate.submit((5, 2, 7, 1, 4, 3), (0, 1, 2)).result(20)
    assert np.array_equal(alone, together) and len({float(value[0]) for value in alone}) == 6


def test_a_full_queue(gate):
    first = gate.submit([1] * 12)
    with pytest.raises(Full) as full:
        gate.submit([1] * 9)
    assert 1 <= full.value.seconds <= 60
    gate.queue.room(8)
    with pytest.raises(Full):
        gate.queue.room(9)
    second = gate.submit([1] * 8)
    gate.open.set()
    assert len(first.result(20)) == 12 and len(second.result(20)) == 8
    served.until(lambda: gate.queue.taken == 0)
    assert len(gate.submit([1] * 20).result(20)) == 20


def test_what_nobody_waits_for_is_not_computed(gate):
    first = gate.submit([3])
    served.until(lambda: gate.batches)
    gone = gate.submit([2] * 10, (0, 1))
    last = gate.submit([4])
    assert gate.queue.taken == 12 and gone.cancel() and gate.queue.taken == 2
    gate.open.set()
    assert first.result(20) and last.result(20)
    assert gate.batches == [[3], [4]]


def test_one_that_fails_leaves_the_others_alone(gate):
    bad = gate.submit([2, 3], (0, 1), [IMAGES[0], IMAGES[1][:100]])
    good = gate.submit([4])
    gate.open.set()
    with pytest.raises(Unreadable, match="image 1: "):
        bad.result(20)
    assert len(good.result(20)) == 1
    with pytest.raises(ZeroDivisionError):
        gate.queue.call(lambda: 1 / 0).result(20)
    assert gate.queue.call(lambda: torch.is_grad_enabled()).result(20) == [False]
    served.until(lambda: gate.queue.taken == 0)


def test_closing_finishes_what_was_taken(gate):
    futures = [gate.submit([n + 1] * 2, (n,)) for n in range(4)]
    closing = threading.Thread(target=gate.queue.close)
    closing.start()
    served.until(lambda: gate.queue._closing)
    with pytest.raises(Full):
        gate.submit([1])
    assert closing.is_alive()
    gate.open.set()
    closing.join(20)
    assert all(future.done() and len(future.result()) == 2 for future in futures)


def _slow(client, seconds):
    """Batches take so long; returns the list of how many pairs each of them has."""
    engine, sizes = client.service._engine, []
    own = engine.batch
    engine.batch = lambda texts, images: (sizes.append(len(texts)), time.sleep(seconds), own(texts, images))[2]
    return sizes


def _body(n=0, texts=1):
    return {"query": {"image": served.text_of(IMAGES[n])}, "texts": ["a cat"] * texts}


def test_429_says_when_to_try_again():
    with served.serving("retrieval", pairs=4, queue=4, workers=1) as client:
        _slow(client, 0.3)
        statuses, waits = [], []

        def ask(n):
            status, said, headers = client.ask("/rerank", _body(n % 5, 2))
            statuses.append(status)
            if status == 429:
                waits.append(int(headers["Retry-After"]))
                assert said["error_type"] == "Overloaded"

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(statuses) == {200, 429} and statuses.count(200) >= 2 and all(1 <= wait <= 60 for wait in waits)
        assert client.ask("/rerank", _body())[0] == 200


def test_a_result_that_does_not_come_in_time_and_a_client_that_goes():
    with served.serving("retrieval", seconds=0.4, workers=1) as client:
        _slow(client, 1.0)
        status, said, headers = client.ask("/rerank", _body())
        assert status == 503 and said["error_type"] == "Timeout" and "0.4 s" in said["error"]
        assert headers["Retry-After"] == "1"
        served.until(lambda: not client.service.queue.taken)
    with served.serving("retrieval", workers=1) as client:
        sizes = _slow(client, 0.5)
        first = threading.Thread(target=client.ask, args=("/rerank", _body()))
        first.start()
        served.until(lambda: sizes == [1])
        body = json.dumps(_body(1, 3)).encode()
        with socket.create_connection(("127.0.0.1", client.port)) as going:
            head = b"POST /rerank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            going.sendall(head % len(body) + body)
            served.until(lambda: client.service.queue.taken == 4)
        first.join()
        served.until(lambda: not client.service.queue.taken)
        assert sizes == [1]  # nothing of what the other wanted


def test_what_computes_nan_or_fails_is_no_answer():
    model = build("retrieval", torch.float32)
    with torch.no_grad():
        model.rank_output.bias.fill_(float("nan"))
    with served.serving(model=model) as client:
        status, said, _ = client.ask("/rerank", _body())
        assert status == 500 and said["error_type"] == "Backend" and "NaN" in said["error"]
        engine, own = client.service._engine, client.service._engine.batch
        engine.batch = lambda *given: 1 / 0
        status, said, _ = client.ask("/rerank", _body())
        assert status == 500 and "ZeroDivisionError while computing" in said["error"]
        engine.batch = own
        assert client.ask("/health")[0] == 200


def test_a_service_that_ends_answers_what_it_is_computing():
    found = []
    with served.serving("retrieval", workers=1) as client:
        _slow(client, 0.5)
        threads = [threading.Thread(target=lambda n=n: found.append(client.ask("/rerank", _body(n)))) for n in range(3)]
        for thread in threads:
            thread.start()
        served.until(lambda: client.service.queue.taken == 3)
    for thread in threads:
        thread.join()
    assert [status for status, _, _ in found] == [200] * 3

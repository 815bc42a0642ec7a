"""`vilt-fast serve` on a tiny checkpoint, in a process of its own; what it says of arguments that cannot be."""

import json
import os
import signal
import socket
import sys

import pytest
import torch
from support import served
from support.models import build

import vilt_fast
from vilt_fast import commands as cli
from vilt_fast.scoring.workers import MOST_WORKERS
from vilt_fast.serving import server


@pytest.fixture(autouse=True)
def _threads():
    """As many as before: the command sets their number for its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a checkpoint that answers and one that does not."""
    where = tmp_path_factory.mktemp("home")
    for kind in ("question_answering", "masked_lm"):
        model = build(kind, torch.float32)
        model.save_pretrained(where / kind)
        served.processor(model).save_pretrained(where / kind)
    return where


def test_it_answers_and_finishes_what_it_took_when_it_is_told_to_end(home, tmp_path):
    """SIGTERM while one request is half there and one connection idle: the one is answered, both are closed."""
    image = served.photographs()[2]
    body = {"inputs": {"image": served.text_of(image), "question": "two dogs"}, "parameters": {"top_k": 2}}
    whole = json.dumps(body).encode()
    head = b"POST /vqa HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer k\r\n"
    head += b"Content-Length: %d\r\n\r\n" % len(whole)
    given = [home / "question_answering", "--threads", 1, "--dtype", "int8", "--api-key", "k"]
    with served.process(tmp_path, *given) as (client, running, told):
        assert f"Serving {home / 'question_answering'} at http://127.0.0.1:{client.port}" in told()
        status, answers, _ = client.ask("/vqa", body, {"Authorization": "Bearer k"})
        assert status == 200 and client.ask("/vqa", body)[0] == 401
        with (
            socket.create_connection(("127.0.0.1", client.port), 20) as half,
            socket.create_connection(("127.0.0.1", client.port), 20) as idle,
        ):
            half.sendall(head + whole[:100])
            client.ask("/health")  # by now the other has been seen
            os.kill(running.pid, signal.SIGTERM)
            assert idle.recv(100) == b""
            with pytest.raises(ConnectionError):
                socket.create_connection(("127.0.0.1", client.port), 2)
            half.sendall(whole[100:])
            got = b""
            while part := half.recv(1 << 16):
                got += part
        assert got.startswith(b"HTTP/1.1 200") and json.loads(got.partition(b"\r\n\r\n")[2]) == answers
        running.join(20)
        assert running.exitcode == 0 and "Stopped: what was taken has been answered." in told()
        assert "Traceback" not in told()
    model = vilt_fast.accelerate(build("question_answering", torch.float32), quantize="int8")
    torch.set_num_threads(1)
    expected = vilt_fast.score(model, ["two dogs"], [image], top_k=2, processor=served.processor(model))
    assert [(a["answer"], a["score"]) for a in answers] == [(n, float(s)) for n, s in expected.answer(0, 0)]


def test_what_cannot_be_served_is_said(home, monkeypatch, capsys):
    def said(*arguments):
        status = cli.main(["serve", *map(str, arguments)])
        return status, capsys.readouterr().err

    monkeypatch.delenv("VILT_FAST_MODEL", raising=False)
    status, err = said("--port", 0)
    assert status == 2 and "MODEL is missing" in err
    status, err = said(home / "masked_lm", "--port", 0)
    assert status == 2 and "ViltForMaskedLM answers no questions and ranks nothing" in err
    status, err = said(home / "nothing", "--port", 0)
    assert status == 2 and "there is no folder" in err
    with socket.create_server(("127.0.0.1", 0)) as other:
        status, err = said(home / "question_answering", "--port", other.getsockname()[1])
        assert status == 2 and "cannot listen at 127.0.0.1" in err
    status, err = said(home / "question_answering", "--host", "no.such.host.invalid")
    assert status == 2 and "cannot listen at" in err
    status, err = said(home / "question_answering", "--port", 0, "--threads", 1, "--workers", 3)
    assert status == 2 and f"3 workers here, but 1: at most {MOST_WORKERS}, one for each of 1 threads" in err
    for key in ("", "a\nb", " a", "schlüssel"):
        status, err = said(home / "question_answering", "--port", 0, "--api-key", key)
        assert status == 2 and "printable ASCII" in err
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "vilt_fast.serving.app")
    status, err = said(home / "question_answering", "--port", 0)
    assert status == 2 and 'pip install "vilt_fast[serve]"' in err


@pytest.mark.parametrize("given, key, warned", [([], None, True), ([], "k", False), (["--api-key", "j"], "k", False)])
def test_who_can_reach_it(home, monkeypatch, capsys, given, key, warned):
    """A key from the environment; a warning where others reach a service without one."""
    seen = {}
    monkeypatch.setattr(server, "run", lambda app, listening, limits: seen.update(app=app, limits=limits))
    monkeypatch.delenv("VILT_FAST_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("VILT_FAST_API_KEY", key)
    options = ["--port", "0", "--max-pixels", "77", "--max-queue", "9", "--timeout", "1.5", *given]
    for host, public in (("127.0.0.1", False), ("0.0.0.0", True)):
        assert cli.main(["serve", str(home / "question_answering"), "--host", host, *options]) == 0
        assert ("whoever reaches this machine" in capsys.readouterr().err) == (public and warned)
    assert (
        seen["limits"].pixels == 77 and seen["limits"].pairs == seen["limits"].queue == 9
    )  # what could never be taken
    assert seen["limits"].seconds == 1.5
    (door,) = seen["app"].user_middleware
    assert door.kwargs["key"] == (given[-1] if given else key)
    near, far = ("localhost", "127.8.8.8", "::1"), ("::", "0.0.0.0", "10.0.0.1", "a")
    assert all(map(server.is_loopback, near)) and not any(map(server.is_loopback, far))

"""Whatever is sent gets an answer that says what is wrong with it, and the service lives."""

import io
import json
import socket
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image
from support import served

from vilt_fast.serving import server

GOOD = served.photographs()[0]
IMAGE = served.text_of(GOOD)


@pytest.fixture(scope="module")
def client():
    with served.serving(body=300_000, bodies=700_000, pixels=40_000, text=60, read_seconds=0.6) as found:
        yield found
        assert _lives(found)


@pytest.fixture(scope="module")
def ranker():
    with served.serving("retrieval", pairs=3) as found:
        yield found


def _vqa(image=IMAGE, question="a cat", **parameters):
    return {"inputs": {"image": image, "question": question}, "parameters": parameters}


def _lives(client):
    return client.ask("/vqa", _vqa())[0] == 200


def _refused(client, body, status, said, path="/vqa", headers=None):
    got, content, _ = client.ask(path, body, headers)
    assert got == status and {*content} == {"error", "error_type"} and said in content["error"], (got, content)
    assert len(content["error"]) < 600


def _head(length=None, extra=b""):
    size = b"Transfer-Encoding: chunked" if length is None else b"Content-Length: %d" % length
    return b"POST /vqa HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + extra + size + b"\r\n\r\n"


def _png(width, height):
    """The header of an image of this size, and next to nothing behind it."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "body, status, said",
    [
        (b"", 400, "no JSON"),
        (b"{", 400, "no JSON"),
        (b"\xff\xfe{}", 400, "no JSON"),
        (b"[" * 100_000, 400, "nested too deeply"),
        (b'{"inputs": ' * 20_000 + b"1" + b"}" * 20_000, 400, "nested too deeply"),
        (b'{"inputs": {"question": "a", "question": "b"}}', 400, "'question' is there twice"),
        (b'{"parameters": {"top_k": NaN}}', 400, "NaN is no JSON"),
        (b'{"parameters": {"top_k": -Infinity}}', 400, "-Infinity is no JSON"),
        (b'{"parameters": {"top_k": 1' + b"0" * 5000 + b"}}", 400, "no JSON"),
        (b"[]", 422, "dictionary"),
        (b"null", 422, "dictionary"),
        ({}, 422, "inputs: Field required"),
        ({"inputs": 3}, 422, "inputs"),
        ({"inputs": {"image": IMAGE}}, 422, "inputs.question"),
        ({"inputs": {"image": 7, "question": "a"}}, 422, "inputs.image"),
        ({"inputs": {"image": [IMAGE], "question": {"a": 1}}}, 422, "inputs."),
        (_vqa(top_k=0), 422, "parameters.top_k"),
        (_vqa(top_k=10**30), 422, "parameters.top_k"),
        (_vqa(top_k=1.5), 422, "parameters.top_k"),
        (_vqa(top_k=1e999), 400, "Infinity is no JSON"),
        (_vqa(top_k="3"), 422, "parameters.top_k"),
        (_vqa(top_k=True), 422, "parameters.top_k"),
        (_vqa(temperature=1), 422, "parameters.temperature"),
        (_vqa() | {"model": "x"}, 422, "model"),
        (_vqa("not base64!"), 422, "is no base64"),
        (_vqa("äöü"), 422, "is no base64"),
        (_vqa("/etc/passwd"), 422, "no URL and no path is read"),
        (_vqa("../../etc/passwd"), 422, "no URL and no path is read"),
        (_vqa("http://127.0.0.1/a.png"), 422, "no URL and no path is read"),
        (_vqa("file:///etc/passwd"), 422, "no URL and no path is read"),
        (_vqa("data:text/html;base64,AAAA"), 422, "no URL and no path is read"),
        (_vqa(""), 422, "is no JPEG, PNG"),
        (_vqa(served.text_of(b"no image at all")), 422, "is no JPEG, PNG"),
        (_vqa(served.text_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")), 422, "is no JPEG, PNG"),
        (_vqa(served.text_of(GOOD[: len(GOOD) // 2])), 422, "inputs.image: OSError"),
        (_vqa(served.text_of(_png(60_000, 60_000))), 413, "too many pixels"),
        (_vqa(served.text_of(_png(2**31 - 1, 2**31 - 1))), 413, "too many pixels"),
        (_vqa(served.text_of(_png(0, 10))), 422, "inputs.image"),
        (_vqa(served.text_of(_png(300, 200))), 413, "300 x 200 pixels; at most 40000"),
        (_vqa(served.text_of(served.encoded(np.zeros((1, 20_000, 3), np.uint8)))), 422, "too thin"),
        (_vqa(question=""), 422, "inputs.question is empty"),
        (_vqa(question=" \n"), 422, "inputs.question is empty"),
        (_vqa(question="a" * 61), 413, "61 characters; at most 60"),
        (_vqa(question="a " * 20), 422, "22 tokens; the model takes 1 to 12"),
        (b'{"inputs": {"image": "%s", "question": "\\ud800"}}' % IMAGE.encode(), 422, "surrogate"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(client, body, status, said):
    _refused(client, body, status, said)


def test_what_only_decoding_tells(client):
    """A bomb whose header is honest and whose content is not; a file that was cut off."""
    bomb = served.encoded(np.zeros((200, 200, 3), np.uint8))
    assert client.ask("/vqa", _vqa(served.text_of(bomb)))[0] == 200
    jpeg = served.encoded(served.noise(80, 80), "JPEG")
    _refused(client, _vqa(served.text_of(jpeg[:700])), 422, "inputs.image")
    for mode in ("L", "LA", "P", "RGBA", "CMYK", "1"):
        kind = "JPEG" if mode == "CMYK" else "PNG"
        file = io.BytesIO()
        Image.fromarray(served.noise(80, 90)).convert(mode).save(file, kind)
        assert client.ask("/vqa", _vqa(served.text_of(file.getvalue())))[0] == 200, mode


@pytest.mark.parametrize(
    "body, status, said",
    [
        ({"query": {"image": IMAGE}, "texts": []}, 422, "texts is empty"),
        ({"query": {"image": IMAGE}, "texts": ["a"] * 4}, 413, "4 documents; at most 3"),
        ({"query": {"image": IMAGE}, "texts": ["a", ""]}, 422, "texts[1] is empty"),
        ({"query": {"image": IMAGE}, "texts": ["a", {"image": IMAGE}]}, 422, "texts[1] must be a text"),
        ({"query": {"image": IMAGE}, "texts": "a"}, 422, "texts"),
        ({"query": {"image": IMAGE}, "texts": [None]}, 422, "texts.0"),
        ({"query": {"image": IMAGE}, "texts": ["a " * 20]}, 422, 'pass "truncate": true'),
        ({"query": {"image": IMAGE, "text": "a"}, "texts": ["a"]}, 422, "query"),
        ({"query": "a", "texts": ["b"]}, 422, "texts[0] must be a image"),
        ({"query": "a", "texts": [{"image": IMAGE}], "return_text": True}, 422, "return_text"),
        ({"query": "a", "texts": [{"image": IMAGE}, {"image": served.text_of(GOOD[:300])}]}, 422, "texts[1]: "),
        ({"query": "a", "texts": ["b"], "truncation_direction": "Left"}, 422, "truncation_direction"),
        ({"query": "a", "texts": ["b"], "raw_scores": "yes"}, 422, "raw_scores"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_ranking_is_said(ranker, body, status, said):
    _refused(ranker, body, status, said, "/rerank")


def test_a_text_that_is_cut_where_that_is_asked_for(ranker, client):
    asked = {"query": {"image": IMAGE}, "texts": ["a " * 20], "truncate": True}
    assert ranker.ask("/rerank", asked)[0] == 200
    assert client.ask("/vqa", _vqa(question="a " * 20, truncate=True))[0] == 200


def test_other_content(client):
    body = json.dumps(_vqa()).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "image/png"):
        _refused(client, body, 415, "Content-Type: application/json", headers={"Content-Type": kind})
    _refused(client, body, 415, "Content-Encoding", headers={"Content-Encoding": "gzip"})
    assert client.ask("/vqa", body, {"Content-Type": "Application/JSON; charset=utf-8"})[0] == 200


@pytest.mark.parametrize(
    "path", ["/../../etc/passwd", "/page/../asked.py", "/%2e%2e/app.py", "/index.html", "//", "/a" * 900]
)
def test_paths_lead_nowhere(client, path):
    assert client.raw(b"GET " + path.encode() + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").startswith(
        b"HTTP/1.1 404"
    )


def test_bodies_that_are_too_large(client):
    """Told before it comes; found out while it comes; the rest is never kept."""
    got = client.raw(_head(300_001))
    assert got.startswith(b"HTTP/1.1 413") and b"at most 300000 bytes" in got
    assert b"HTTP/1.1 413" in client.raw(_head(10**18))
    assert client.raw(_head(10**30)).startswith(b"HTTP/1.1 4")
    part = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    got = client.raw(_head(), *[part] * 6)
    assert got.startswith(b"HTTP/1.1 413") and b"at most 300000 bytes" in got
    assert client.raw(b"POST /vqa HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n").startswith(b"HTTP/1.1 400")
    both = b"POST /vqa HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd"
    assert b'"error_type": "Request"' in client.raw(both)


def test_bytes_of_all_requests_together(client):
    """Three that are half there take all the room; it is given back when they are gone."""
    held = []
    try:
        for _ in range(3):
            held.append(socket.create_connection(("127.0.0.1", client.port)))
            held[-1].sendall(_head(290_000) + b" " * 230_000)
        served.until(lambda: b"vilt_fast_body_bytes 690000.0" in client.ask("/metrics")[1], 5)
        status, said, headers = client.ask("/vqa", _vqa() | {"parameters": {"top_k": 1}, "x": " " * 20_000})
        assert status == 429 and headers["Retry-After"] == "1" and "bytes of other requests" in said["error"]
    finally:
        for one in held:
            one.close()
    served.until(lambda: b"vilt_fast_body_bytes 0.0" in client.ask("/metrics")[1], 5)
    assert _lives(client)


def test_slow_clients(client, monkeypatch):
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.4)
    start = time.monotonic()
    got = client.raw(_head(1000) + b"{", *[b" "] * 6, pause=0.2)  # a byte now and then
    assert got.startswith(b"HTTP/1.1 408") and b"took longer than 0.6 s" in got
    assert client.raw() == b""  # nothing at all
    assert client.raw(b"POST /vqa HT").startswith(b"HTTP/1.1 408")  # half a head
    assert client.raw(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n").count(b"HTTP/1.1 ") == 1  # no next request
    assert time.monotonic() - start < 12
    assert _lives(client)


def test_connections_that_are_half_closed_or_dropped(client):
    whole = json.dumps(_vqa()).encode()
    for parts in ([_head(1000) + b"{"], [_head(1000)], [b"POST /v"], [], [_head(len(whole)) + whole]):
        client.raw(*parts, shut=True)
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", client.port)) as dropped:
            dropped.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
            dropped.sendall(_head(len(whole)) + whole)
    served.until(lambda: not client.service.queue.taken, 10)
    assert _lives(client)


def test_what_is_no_http(client):
    for noise in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\x00" * 70_000, b"GET\r\n\r\n"):
        got = client.raw(noise + b"\r\n\r\n")
        assert not got or got.startswith(b"HTTP/1.1 400") and b'"error"' in got
    big = b"".join(b"X-%d: %s\r\n" % (n, b"a" * 1000) for n in range(1000))
    assert client.raw(b"GET / HTTP/1.1\r\nHost: x\r\n" + big + b"\r\n").startswith(b"HTTP/1.1 400")
    upgrade = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n\r\n"
    assert client.raw(upgrade).startswith(b"HTTP/1.1 200")


def test_more_connections_than_are_taken():
    with served.serving(connections=4) as client:
        held = [socket.create_connection(("127.0.0.1", client.port)) for _ in range(4)]
        got = client.raw(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert got.startswith(b"HTTP/1.1 503") and b"too many connections" in got and b"Retry-After" in got
        for one in held:
            one.close()
        served.until(lambda: client.ask("/health")[0] == 200, 5)


def test_requests_at_random_from_many_at_once(client):
    """Good and bad ones together: each gets its own answer."""
    bad = [(_vqa("zz"), 422), (b"{", 400), (_vqa(served.text_of(GOOD[:200])), 422), (_vqa(top_k=0), 422)]
    wrong, first = [], client.ask("/vqa", _vqa())[1]

    def ask(seed):
        draw = np.random.default_rng(seed)
        for _ in range(8):
            body, status = bad[draw.integers(len(bad))] if draw.random() < 0.5 else (_vqa(), 200)
            got, said, _ = client.ask("/vqa", body)
            if got != status or status == 200 and said != first:
                wrong.append((got, status, said))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong

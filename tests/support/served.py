"""A tiny model served on a free port of this machine: by a thread of this process, or by a process of its own."""

import base64
import contextlib
import dataclasses
import http.client
import io
import json
import os
import socket
import sys
import threading
import time

import numpy as np
import torch
import uvicorn
from PIL import Image
from transformers import ViltProcessor

from support import scored, scoring
from support.models import build
from vilt_fast import commands
from vilt_fast.commands.samples import word_tokenizer
from vilt_fast.serving import app as apps
from vilt_fast.serving import server
from vilt_fast.serving.limits import Limits
from vilt_fast.serving.metrics import Metrics
from vilt_fast.serving.service import Service

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a cat on the red sofa two dogs ##s".split()
TEXTS = ["a cat on the red sofa", "two dogs", "the cat", "a sofa"]
JSON = {"Content-Type": "application/json"}


def processor(model):
    return ViltProcessor(scoring.processor(model), word_tokenizer(WORDS))


def encoded(image, kind="PNG", **options) -> bytes:
    """An array [height, width, 3] as a file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def photographs(count=5):
    """Files of small images, all of them different."""
    sizes = [scoring.SIZES[n % len(scoring.SIZES)] for n in range(count)]
    return [encoded(image) for image in scoring.photographs(sizes)]


class Client:
    """Talks to a service; `port` for whoever wants the socket itself."""

    def __init__(self, port, service=None):
        self.port, self.service = port, service

    def ask(self, path, body=None, headers=None, method=None):
        """(status, JSON or bytes, headers) of one request; a dict is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        given = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            given = JSON | given
        connection.request(method or ("GET" if body is None else "POST"), path, body, given)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if answer.headers.get("content-type", "").startswith("application/json"):
            content = json.loads(content)
        return answer.status, content, answer.headers

    def raw(self, *parts, shut=False, pause=0.0, timeout=20):
        """What comes back for bytes that are sent as they are, in so many parts, until the connection is closed."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as plain:
            with contextlib.suppress(ConnectionError):
                for part in parts:
                    plain.sendall(part)
                    time.sleep(pause)
                if shut:
                    plain.shutdown(socket.SHUT_WR)
            found = b""
            with contextlib.suppress(ConnectionError):
                while part := plain.recv(1 << 16):
                    found += part
            return found


@contextlib.contextmanager
def serving(
    kind="question_answering", dtype=torch.float32, *, key=None, model=None, saved=None, workers=None, **limits
):
    """A client of a service in this process; with the processor of the folder `saved`, if there is one."""
    model = build(kind, dtype) if model is None else model
    told, process = Metrics(), ViltProcessor.from_pretrained(saved) if saved else processor(model)
    limits = dataclasses.replace(Limits(), **limits)
    service = Service(model, limits=limits, processor=process, workers=workers, token_budget=64, seen=told.seen)
    app = apps.build(service, told, name="tiny", dtype="float32", key=key)
    listening = server.bound("127.0.0.1", 0)
    running = uvicorn.Server(server.config(app, service.limits))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        until(lambda: running.started)
        yield Client(listening.getsockname()[1], service)
    finally:
        running.should_exit = True
        thread.join(30)
        listening.close()


def until(true, seconds=20.0):
    """Wait for something; AssertionError where it does not come."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


@contextlib.contextmanager
def process(folder, *arguments):
    """(client, process, its output so far as a function) of `vilt-fast serve` in a process of its own."""
    output = folder / "output.txt"
    running = scored.start(str(output), [*map(str, arguments), "--port", "0"], target=_command)
    told = lambda: output.read_text() if output.exists() else ""  # noqa: E731
    try:
        until(lambda: "Serving" in told() or not running.is_alive(), 60)
        found = told().partition("http://127.0.0.1:")[2].split(" ")[0]
        yield Client(int(found or 0)), running, told
    finally:
        running.kill()
        running.join()


def _command(output, arguments):
    """The command, its output to a file."""
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with open(output, "w", buffering=1) as file:
        sys.stdout = sys.stderr = file
        status = commands.main(["serve", *arguments])
    os._exit(status)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)

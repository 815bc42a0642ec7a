"""Rows of serving: a tiny model, served by this process, asked by the clients of the benchmark."""

import contextlib
import os

import torch
from support import served
from support.models import build
from transformers import ViltForQuestionAnswering

import vilt_fast
from benchmarks import destination, measure, run, serve, table
from vilt_fast.commands import checkpoint


def test_rows_of_a_service(tmp_path, monkeypatch, capsys):
    sizes = dict(image_size=64, patch_size=32, vocab_size=600, max_position_embeddings=40, num_labels=9)

    @contextlib.contextmanager
    def in_this_process(folder, workers, log):
        model = vilt_fast.accelerate(ViltForQuestionAnswering.from_pretrained(folder).eval(), quantize="int8")
        with served.serving(model=model, saved=folder, workers=workers) as client:
            yield client.port, os.getpid()

    monkeypatch.setattr(serve, "_service", in_this_process)
    monkeypatch.setattr(serve, "_REQUESTS", {"short": 12})
    monkeypatch.setattr(serve, "CLIENTS", 4)
    monkeypatch.setattr(serve, "QUARTERS", 2)
    monkeypatch.setattr(checkpoint, "random_vqa", lambda: build("question_answering", torch.float32, **sizes))
    monkeypatch.setattr(measure, "best_of", lambda call, seconds=0: (call(), 1e-3)[1])
    monkeypatch.setattr(destination, "NEW", tmp_path)
    out = tmp_path / "serve.csv"
    assert run.main(["serve", "--cases", "short", "--threads", "1", "--out", str(out)]) == 0
    rows = {row["provider"]: row for row in table.read(out)}
    assert list(rows) == ["score_int8", "service_int8"] and float(rows["score_int8"]["ratio"]) == 1
    assert float(rows["service_int8"]["error"]) == 0 and float(rows["service_int8"]["p50_ms"]) > 0
    assert "0 of 12 requests lost, 12 answers equal to the last bit; p50 " in capsys.readouterr().err

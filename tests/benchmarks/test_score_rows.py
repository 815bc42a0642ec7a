"""Rows of scoring, on a tiny model and photographs of a few pixels."""

import pytest
from support.models import build

from benchmarks import destination, measure, run, score, table
from vilt_fast.commands import checkpoint


def test_rows_of_a_grid_and_of_files(tmp_path, monkeypatch, capsys):
    import torch

    sizes = dict(image_size=64, patch_size=32, vocab_size=200, max_position_embeddings=40, num_labels=5)
    monkeypatch.setattr(checkpoint, "random_vqa", lambda: build("question_answering", torch.float32, **sizes))
    monkeypatch.setattr(score, "JPEGS", 2)
    monkeypatch.setattr(score, "MEGAPIXELS", (150, 200))
    monkeypatch.setattr(measure, "best_of", lambda call, seconds=0: (call(), 1e-3)[1])
    monkeypatch.setattr(destination, "NEW", tmp_path)
    out = tmp_path / "score.csv"
    assert run.main(["score", "--cases", "small", "jpegs", "--repeats", "1", "--out", str(out)]) == 0
    rows = {(row["case"], row["provider"]): row for row in table.read(out)}
    ours = [f"ours_{dtype}" for dtype in ("float32", "bfloat16", "int8")]
    grid = ["hf_padded", "hf_loop", "hf_padded_bf16", *ours]
    assert list(rows) == [("small", name) for name in grid] + [
        ("jpegs", name) for name in ("hf_eager", "ours_int8_exact", "ours_int8_fast")
    ]
    assert float(rows["small", "ours_float32"]["error"]) < 1e-5 and float(rows["small", "hf_padded"]["ratio"]) == 1
    assert float(rows["jpegs", "ours_int8_exact"]["error"]) < 0.1
    assert "ours_float32 ranks the images as hf_loop for 8 of 8 texts" in capsys.readouterr().err
    for case in ("b1", "small"):
        what = "score" if case == "b1" else "linear"
        with pytest.raises(SystemExit) as ended:
            run.main([what, "--cases", case, "--out", str(tmp_path / "other.csv")])
        assert ended.value.code == 2

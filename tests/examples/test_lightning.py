"""The example of Lightning: stopped after an epoch and gone on."""

import importlib.util
from pathlib import Path

import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "lightning_module.py"
SMALL = ["--scenes", "40", "--tokens", "300"]  #: eight batches an epoch


def example():
    spec = importlib.util.spec_from_file_location("lightning_module", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path):
    main = example().main
    whole = main([*SMALL, "--epochs", "3", "--out", str(tmp_path / "whole")])
    first = main([*SMALL, "--epochs", "1", "--out", str(tmp_path / "halves")])
    then = main([*SMALL, "--epochs", "3", "--out", str(tmp_path / "halves"), "--resume"])
    assert len(first) < len(set(whole)) and first + then == whole
    a, b = (torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "halves"))
    assert all(torch.equal(a["state_dict"][name], b["state_dict"][name]) for name in a["state_dict"])

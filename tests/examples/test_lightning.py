"""The example of Lightning: stopped after an epoch and gone on."""

import pytest
import torch
from support.examples import example

SMALL = ["--scenes", "40", "--tokens", "300"]  #: eight batches an epoch


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path):
    main = example("lightning_module").main
    whole = main([*SMALL, "--epochs", "3", "--out", str(tmp_path / "whole")])
    first = main([*SMALL, "--epochs", "1", "--out", str(tmp_path / "halves")])
    then = main([*SMALL, "--epochs", "3", "--out", str(tmp_path / "halves"), "--resume"])
    assert len(first) < len(set(whole)) and first + then == whole
    a, b = (torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "halves"))
    assert all(torch.equal(a["state_dict"][name], b["state_dict"][name]) for name in a["state_dict"])
    with pytest.raises(SystemExit, match="another run, of {'samples': 40"):
        main(["--scenes", "41", "--tokens", "300", "--epochs", "2", "--out", str(tmp_path / "whole"), "--resume"])

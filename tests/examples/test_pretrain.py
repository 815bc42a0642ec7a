"""The example of a plain loop: stopped and gone on, and on two processes."""

import os
import subprocess
import sys

import pytest
import torch
from support.examples import EXAMPLES, example

SMALL = ["--scenes", "40", "--tokens", "300"]  #: eight batches an epoch


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path):
    main = example("pretrain").main
    whole = main([*SMALL, "--steps", "14", "--out", str(tmp_path / "whole")])
    first = main([*SMALL, "--steps", "5", "--out", str(tmp_path / "halves")])
    then = main([*SMALL, "--steps", "14", "--out", str(tmp_path / "halves"), "--resume"])  # into the second epoch
    assert first + then == whole and len(set(whole)) == 14
    a, b = (torch.load(tmp_path / name / "checkpoint-0.pt") for name in ("whole", "halves"))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert (a["epoch"], a["batch"]) == (b["epoch"], b["batch"]) != (0, 14)
    with pytest.raises(SystemExit, match="another run"):
        main(["--scenes", "41", "--tokens", "300", "--out", str(tmp_path / "whole"), "--resume"])


def test_two_processes_keep_equal_weights(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(
        [*command, EXAMPLES / "pretrain.py", *SMALL, "--steps", "3", "--out", tmp_path],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    a, b = (torch.load(tmp_path / f"checkpoint-{rank}.pt") for rank in range(2))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    moments = [state["optimizer"]["state"][0]["exp_avg"] for state in (a, b)]
    assert torch.equal(*moments) and moments[0].any()  # of gradients that both have had a part in
    assert done.stdout.count("step 3: ") == 1

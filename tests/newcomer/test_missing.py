"""What is missing is said: no compiler, no native part, no rich, no matplotlib."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.models import build

from vilt_fast import testing

ROOT = Path(__file__).parents[2]

#: Runs commands in a process in which some modules cannot be imported; begins each, and what it printed, with "<".
PLAY = """
import sys
for name in sys.argv[1].split():
    sys.modules[name] = None
from benchmarks import host, run
from vilt_fast import commands
mains = {"benchmarks.run": run.main, "benchmarks.host": host.main}
for line in sys.argv[2].splitlines():
    for stream in (sys.stdout, sys.stderr):
        print("<", line, file=stream, flush=True)
    words = line.split()
    try:
        status = mains[words[0]](words[1:]) if words[0] in mains else commands.main(words)
    except SystemExit as stop:
        status = stop.code
    print("status", status, flush=True)
"""


def run(folder, *arguments, **environment):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_without_the_native_part_rich_and_matplotlib(tmp_path):
    """Commands and benchmarks work or say what to install."""
    checkpoint = tmp_path / "checkpoint"
    testing.random_weights(build("question_answering", torch.float32)).save_pretrained(checkpoint)
    json, table = f"check {checkpoint} --batch 1 --json", f"check {checkpoint} --batch 1"
    expected = {
        "info": 0, json: 0, table: 2, f"{json} --dtype int8": 2, "demo": 2, "align photo.jpg cat": 2,
        "benchmarks.run model": 2, "benchmarks.run transport --update": 2, "benchmarks.host": 2,
    }  # fmt: skip
    done = run(tmp_path, "-c", PLAY, "rich matplotlib vilt_fast._C", "\n".join(expected))
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    out = dict(zip(expected, done.stdout.split("< ")[1:], strict=True))
    err = dict(zip(expected, done.stderr.split("< ")[1:], strict=True))
    assert {command: int(text.split()[-1]) for command, text in out.items()} == expected
    assert "not built: pure Python install" in " ".join(out["info"].split()) and str(ROOT) in out["info"]
    assert '"ok": true' in out[json] and '"int8": "' in out[json]
    assert "compiler" in err[f"{json} --dtype int8"]
    for command, package in ((table, "rich"), ("demo", "matplotlib"), ("align photo.jpg cat", "matplotlib")):
        assert package in err[command] and 'pip install "vilt_fast[demo]"' in err[command]
    for command in expected:
        assert ("run: pip install -e ." in err[command]) == command.startswith("benchmarks")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_installing_without_a_compiler_says_so(tmp_path):
    bare = run(ROOT, "setup.py", "--name", PATH=str(tmp_path), CXX="")
    assert bare.stdout.split()[-1] == "vilt_fast" and "no C++ compiler found" in bare.stderr
    assert "no C++ compiler found" not in run(ROOT, "setup.py", "--name").stderr


def test_a_picture_without_matplotlib_says_so(monkeypatch, tmp_path):
    from vilt_fast import Alignment

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    one = Alignment(torch.rand(1, 6), ("cat",), (2, 3), (8, 12), 0.5)
    with pytest.raises(ImportError, match=r'pip install "vilt_fast\[demo\]"'):
        one.save(tmp_path / "cat.png", image=torch.zeros(8, 12, 3, dtype=torch.uint8))

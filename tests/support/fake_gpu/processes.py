"""What the tests start: a process of its own, whose kernels are compiled and not interpreted."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def played(*steps: dict) -> dict:
    """What `python -m support.fake_gpu` found in these steps. AssertionError with its last words if anything was wrong.

    Triton keeps what it has compiled, by source, arguments, compiler and target, in build/fake_gpu.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), environment.get("PYTHONPATH", "")]),
        "TRITON_CACHE_DIR": environment.get("TRITON_CACHE_DIR") or str(ROOT / "build" / "fake_gpu"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", "-m", "support.fake_gpu", json.dumps(steps)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"it ended with {done.returncode} (a signal, if negative): {done.stderr[-4000:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["compiled"] and found["launched"], found
    return found

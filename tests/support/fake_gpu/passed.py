"""Which steps of the played GPU have passed, and of which sources: passed.csv, committed, written by `make fake-gpu`.

A step is an op, or a run of whole models. Under a release of Triton it is known by a digest of all that decides what it
compiles: the kernels, what these import of each other, and what plays. What stands in the table is not compiled again,
what does not is; and a test fails where a row is no longer of what lies in kernels/.

    python -m support.fake_gpu.passed 3.9.0     what has to be compiled under that release; fails where there is such
"""

import ast
import csv
import fcntl
import hashlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
TABLE = ROOT / "tests" / "fake_gpu" / "passed.csv"
FIELDS = ("step", "triton", "sources")

OPS = (
    "attention", "patch_embed", "linear", "linear_qkv", "linear_fp8", "linear_gelu", "add_layer_norm",
    "linear_cross_entropy", "text_embed", "word_patch_distance", "ipot", "sinkhorn",
)  # fmt: skip
#: {op: that whose calls it is among}
WITHIN = {"quantize_fp8": "linear_fp8", "linear_gelu_fp8": "linear_fp8", "add_layer_norm_fp8": "add_layer_norm"}
DTYPES = ("bfloat16", "float16", "float32")
#: {step: what `processes.played` is told}
STEPS = (
    {op: dict(what="ops", op=op, dtypes=DTYPES) for op in OPS}
    | {f"{run} {dtype}": dict(what="models", run=run, dtype=dtype) for run in ("forward", "training", "serving")
       for dtype in DTYPES}
    | {f"{run} fp8": dict(what="models", run=run, dtype="bfloat16", quantize="fp8") for run in ("forward", "serving")}
)  # fmt: skip


def releases(root: Path = ROOT) -> tuple[str, str]:
    """Of Triton, that all steps pass under: the one for development, and the older one of the Makefile."""
    pinned = re.search(r"triton==([\d.]+)", (root / "pyproject.toml").read_text(encoding="utf-8"))
    older = re.search(r"^OLD_TRITON = ([\d.]+)$", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    return pinned[1], older[1]


def sources(step: str, root: Path = ROOT) -> str:
    """The digest of what a step compiles."""
    kernels, play = root / "kernels", root / "tests" / "support" / "fake_gpu"
    files = [play / "driver.py", play / "__main__.py"]
    if step in OPS:
        files += _with_imports(kernels, [step, f"{step}_bwd", *(op for op, other in WITHIN.items() if other == step)])
        calls = _without_other_calls(play / "ops.py", step)
    else:
        files += [*sorted(kernels.glob("*.py")), play / "models.py"]
        calls = ""
    found = hashlib.sha256((calls + _measured(root, step)).encode())
    for file in files:
        found.update(f"{file.name}\n".encode() + file.read_bytes())
    return found.hexdigest()[:16]


def _with_imports(kernels, names):
    """The files of these kernels, and of those that they import."""
    known, waiting = {}, [name for name in names if (kernels / f"{name}.py").exists()]
    while waiting:
        name = waiting.pop()
        if name in known:
            continue
        known[name] = kernels / f"{name}.py"
        for node in ast.walk(ast.parse(known[name].read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                waiting += [node.module] if node.module else [alias.name for alias in node.names]
    return [known[name] for name in sorted(known)]


def _measured(root, step):
    """The configurations that order.csv has for a step in place of the kernels' own."""
    with open(root / "vilt_fast" / "order.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["configuration"]]
    mine = [row for row in rows if step not in OPS or row["op"] in (step, f"{step}_bwd")]
    return "".join(f"{row['device']} {row['op']} {row['size']} {row['configuration']}\n" for row in mine)


def _without_other_calls(file, op):
    """The text of ops.py, but for the calls of other ops."""
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name in OPS and node.name != op:
            lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)
    return "\n".join(line for line in lines if line is not None)


def table(path: Path = TABLE) -> dict[tuple[str, str], str]:
    """{(step, release of Triton): digest}."""
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        return {(row["step"], row["triton"]): row["sources"] for row in csv.DictReader(file)}


def stale(triton: str, root: Path = ROOT, path: Path = TABLE) -> list[str]:
    """The steps that have not passed under a release of Triton, of what lies there."""
    known = table(path)
    return [step for step in STEPS if known.get((step, triton)) != sources(step, root)]


def outdated(root: Path = ROOT, path: Path = TABLE) -> list[tuple[str, str]]:
    """Rows of the table that are of other sources than lie there: (step, release)."""
    return [(step, triton) for (step, triton), digest in table(path).items() if digest != sources(step, root)]


def note(step: str, triton: str, digest: str, path: Path = TABLE) -> None:
    """Write that a step has passed; several processes may do so."""
    with open(path, "a+", newline="", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        known = table(path) | {(step, triton): digest}
        releases = sorted({release for _, release in known}, reverse=True)
        rows = [(s, release, known[s, release]) for release in releases for s in STEPS if (s, release) in known]
        file.seek(0)
        file.truncate()
        written = csv.writer(file, lineterminator="\n")
        written.writerow(FIELDS)
        written.writerows(rows)


if __name__ == "__main__":
    found = stale(sys.argv[1])
    print(f"Triton {sys.argv[1]}, to compile:", ", ".join(found) or "nothing")
    sys.exit(bool(found))

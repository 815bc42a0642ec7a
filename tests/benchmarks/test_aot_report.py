"""The report of what compiles ahead of time: one case of every kernel on sm_90, and kernels that must not pass.

The compilers run in processes of their own, without the interpreter in which this process imports Triton.
"""

import csv
import json

import pytest

from benchmarks.compiled import aot_report

BAD = '''
import os
import triton
import triton.language as tl


@triton.jit
def _copy(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at))


@triton.jit
def _spill(x, out, BLOCK: tl.constexpr):
    """Every element of a large tile is needed again after a sum over all of it, in a single warp."""
    at = tl.arange(0, BLOCK)
    tile = tl.load(x + at)
    for _ in range(3):
        tile = tile * tl.sum(tile, 0)
    tl.store(out + at, tile)


@triton.jit
def _product(a, b, out, BLOCK: tl.constexpr, K: tl.constexpr, steps, DOT: tl.constexpr):
    rows, cols, ks = tl.arange(0, BLOCK), tl.arange(0, BLOCK), tl.arange(0, K)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(steps):
        left = tl.load(a + step * K + rows[:, None] * K + ks[None, :])
        right = tl.load(b + step * K + ks[:, None] * BLOCK + cols[None, :])
        if DOT:
            acc = tl.dot(left, right, acc)
        else:
            acc += tl.sum(left.to(tl.float32)[:, :, None] * right.to(tl.float32)[None, :, :], 1)
    tl.store(out + rows[:, None] * BLOCK + cols[None, :], acc)


@triton.jit
def _wrong(x, out, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK)) + tl.arange(0, 2 * BLOCK))


class Fatal(dict):
    """Constants over which the compiling process dies."""

    def items(self):
        os._exit(7)


def case(name, kernel, signature, constexprs, matmul=False, num_warps=4, num_stages=1, arches=(90,), **more):
    return dict(name=name, kernel=kernel, signature=signature, constexprs=constexprs, matmul=matmul,
                num_warps=num_warps, num_stages=num_stages, arches=arches, **more)


def aot_cases():
    both = dict(x="*fp32", out="*fp32")
    product = dict(a="*fp16", b="*fp16", out="*fp32", steps="i32")
    yield case("good", _copy, both, dict(BLOCK=128))
    yield case("spilling", _spill, both, dict(BLOCK=8192), num_warps=1)
    yield case("spilling", _spill, both, dict(BLOCK=32768), num_warps=1, arches=("gfx942",))
    yield case("spilling far from home", _spill, both, dict(BLOCK=8192), num_warps=1, home=False)
    yield case("too large", _product, product, dict(BLOCK=128, K=256, DOT=True), matmul=True, num_stages=4)
    yield case("no dot", _product, product, dict(BLOCK=16, K=16, DOT=False), matmul=True)
    yield case("does not compile", _wrong, both, dict(BLOCK=128))
    yield case("fatal", _copy, both, Fatal(BLOCK=128))
    yield case("incomplete", _copy, dict(x="*fp32"), dict(BLOCK=128))
    yield case("good after all that", _product, product, dict(BLOCK=64, K=32, DOT=True), matmul=True, num_stages=2)
'''


pytestmark = pytest.mark.xdist_group("compiler")


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """Rows of the kernels above by name of the case."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "bad_kernels.py").write_text(BAD)
    cache = folder / "cache"
    steps = []
    version, rows = aot_report.rows(
        ["bad_kernels"], jobs=1, cache=cache, paths=[folder], step=lambda done, total: steps.append((done, total))
    )
    assert steps == [(i + 1, 10) for i in range(10)]
    return folder, version, rows


def problem(bad, name, arch="sm_90"):
    return next(row["problem"] for row in bad[2] if (row["case"], row["arch"]) == (name, arch))


@pytest.mark.parametrize("name", ["good", "good after all that"])
def test_a_good_kernel_has_no_problem(bad, name):
    assert problem(bad, name) == ""


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_spills_are_reported(bad, arch):
    assert problem(bad, "spilling", arch).startswith("spills ")
    row = next(row for row in bad[2] if (row["case"], row["arch"]) == ("spilling", arch))
    assert row["stack_bytes"] > 0 and row["spill_instructions"] > 0 and row["remark"] == ""


def test_spills_far_from_home_are_a_remark(bad):
    row = next(row for row in bad[2] if row["case"] == "spilling far from home")
    assert row["problem"] == "" and row["stack_bytes"] > 0
    assert row["remark"] == f"spills {row['stack_bytes']} bytes a thread, beyond the sizes of ViLT"
    far = row | dict(matmul=False, home=False, shared_bytes=row["shared_limit"] + 1)
    assert "shared memory" in aot_report.judged(far)["problem"], "nothing but a spill is forgiven"


def test_too_much_shared_memory_is_reported(bad):
    assert f"the limit is {227 * 1024}" in problem(bad, "too large")


def test_a_product_without_matrix_instructions_is_reported(bad):
    assert problem(bad, "no dot") == "multiplies matrices without matrix instructions"


def test_compilation_failures_are_reported_and_do_not_stop_the_rest(bad):
    assert problem(bad, "does not compile").startswith("does not compile: CompilationError: at 2:40")
    assert problem(bad, "fatal") == "does not compile: the compiler's process ended with status 7: "
    assert problem(bad, "incomplete") == "does not compile: ValueError: the case says nothing of out"


def test_rows_hold_what_was_asked_for(bad, tmp_path):
    _, version, rows = bad
    aot_report.write(tmp_path / "aot.csv", rows)
    with open(tmp_path / "aot.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert tuple(written[0]) == aot_report.FIELDS
    row = next(row for row in written if row["case"] == "good after all that")
    assert (row["op"], row["kernel"], row["arch"]) == ("bad_kernels", "_product", "sm_90")
    assert (row["tensor_core_kind"], row["num_warps"], row["num_stages"]) == ("wgmma", "4", "2")
    assert int(row["registers"]) > 16 and int(row["binary_bytes"]) > 1000 and float(row["seconds"]) > 0
    assert 0 < int(row["shared_bytes"]) <= int(row["shared_limit"]) == 227 * 1024
    header, lines = aot_report.summary(rows)
    assert [line[:3] for line in lines] == [("bad_kernels", "sm_90", "9"), ("bad_kernels", "gfx942", "1")]
    assert all(len(line) == len(header) for line in lines)
    assert version.count(".") == 2


def test_the_second_run_compiles_only_what_has_changed(bad):
    folder, _, rows = bad
    stored = sorted((folder / "cache").glob("*.json"))
    assert len(stored) == 6  # one for both cases of the same kernel and options; all but those that did not compile
    for file in stored:  # a mark that only a row from the cache can carry
        file.write_text(json.dumps(json.loads(file.read_text()) | {"seconds": -1}))
    changed = BAD.replace("tile * tl.sum(tile, 0)", "tile + tl.sum(tile, 0)")
    (folder / "bad_kernels.py").write_text(changed)
    _, again = aot_report.rows(["bad_kernels"], jobs=1, cache=folder / "cache", paths=[folder])
    seconds = {(row["case"], row["arch"]): row["seconds"] for row in again if row["seconds"] is not None}
    assert {key for key, value in seconds.items() if value > 0} == {
        (row["case"], row["arch"]) for row in rows if row["kernel"] == "_spill"
    }
    assert {key for key, value in seconds.items() if value == -1} == {
        (row["case"], row["arch"]) for row in rows if row["seconds"] is not None and row["kernel"] != "_spill"
    }


def test_limits_of_an_architecture():
    row = {"op": "x", "kernel": "x", "case": "x", "arch": "sm_89", "matmul": False, "stack_bytes": 0, "tensor_cores": 0}
    row |= {"shared_bytes": 99 * 1024, "tensor_memory": 512}
    assert aot_report.judged(row)["problem"] == ""
    assert "shared memory" in aot_report.judged(row | {"shared_bytes": 99 * 1024 + 1})["problem"]
    assert "tensor memory" in aot_report.judged(row | {"tensor_memory": 513})["problem"]


def test_one_case_of_every_kernel_passes_on_sm_90(tmp_path, capsys):
    """Exit status, table and CSV of the command, on what ships."""
    out = tmp_path / "aot.csv"
    status = aot_report.main(
        ["--check", "--arches", "sm_90", "--one-each", "--jobs", "1", "--cache", str(tmp_path), "--out", str(out)]
    )
    said = capsys.readouterr()
    assert status == 0, said.err
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["op"] for row in rows} == {name.rpartition(".")[2] for name in aot_report.shipped()}
    products = [row for row in rows if row["op"] in ("attention", "attention_bwd", "linear", "patch_embed")]
    others = ("_patch_embed_rows_kernel", "_linear_sum_kernel")  # which multiply no matrices
    assert products and all(row["tensor_core_kind"] for row in products if row["kernel"] not in others)
    assert "0 with problems" in said.out


def test_a_problem_is_a_failure_only_with_check(monkeypatch, tmp_path, capsys):
    row = dict.fromkeys(aot_report.FIELDS, 0) | {"op": "x", "case": "tile", "kernel": "k", "arch": "sm_90"}
    row |= {"problem": "spills 8 bytes a thread", "remark": "", "tensor_core_kind": ""}
    monkeypatch.setattr(aot_report, "rows", lambda *_, **__: ("3.9.0", [row]))
    assert aot_report.main(["--ops", "attention"]) == 0
    assert aot_report.main(["--ops", "attention", "--check"]) == 1
    assert "sm_90 tile (k): spills 8 bytes a thread" in capsys.readouterr().err
    row |= {"problem": "", "remark": "spills 8 bytes a thread, beyond"}
    assert aot_report.main(["--ops", "attention", "--check"]) == 0
    assert "sm_90 tile (k): spills 8 bytes a thread, beyond" in capsys.readouterr().err
    monkeypatch.setattr(aot_report, "rows", lambda *_, **__: ("3.9.0", []))
    assert aot_report.main(["--ops", "attention", "--check"]) == 1, "nothing compiled is nothing proven"


def test_bad_arguments(capsys):
    for argv in (["--ops", "nonsense"], ["--arches", "sm_70"], ["--jobs", "0"]):
        with pytest.raises(SystemExit):
            aot_report.main(argv)
    assert "no kernel module nonsense" in capsys.readouterr().err

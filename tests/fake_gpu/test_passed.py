"""The table of what has been compiled, and when it is true."""

import itertools
import shutil

import pytest
from support.fake_gpu import passed
from support.fake_gpu.passed import OPS, ROOT, STEPS


def test_what_the_table_says_is_of_what_lies_in_kernels():
    found = passed.outdated()
    assert not found, f"run `make fake-gpu` and commit tests/fake_gpu/passed.csv: {found} have changed since"


def test_the_table_names_steps_and_releases():
    assert set(passed.table()) <= set(itertools.product(STEPS, passed.releases()))


def test_every_op_with_triton_kernels_is_called():
    from vilt_fast.ops import registry

    known = {op.removesuffix("_bwd") for op, backend in registry._ROWS if backend == "triton"}
    assert known - set(passed.WITHIN) == set(OPS)


@pytest.fixture
def copy(tmp_path):
    """A house that has passed."""
    for folder in ("kernels", "tests/support/fake_gpu"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "vilt_fast").mkdir()
    shutil.copy(ROOT / "vilt_fast" / "order.csv", tmp_path / "vilt_fast")
    for step in STEPS:
        passed.note(step, "3.9.0", passed.sources(step, tmp_path), tmp_path / "passed.csv")
    return tmp_path


@pytest.mark.parametrize(
    ("edited", "ops"),
    [
        ("kernels/attention_single.py", {"attention"}),
        ("kernels/_gelu.py", {"linear", "linear_qkv", "linear_gelu", "linear_fp8", "add_layer_norm"}),
        ("kernels/ipot.py", {"ipot", "sinkhorn", "word_patch_distance"}),
        ("kernels/_tiles.py", set(OPS)),
        ("tests/support/fake_gpu/driver.py", set(OPS)),
    ],
)
def test_an_edit_makes_stale_what_it_reaches(copy, edited, ops):
    assert passed.stale("3.9.0", copy, copy / "passed.csv") == []
    assert passed.stale("3.6.0", copy, copy / "passed.csv") == list(STEPS)
    with open(copy / edited, "a") as file:
        file.write("\n# one more line\n")
    runs = set(STEPS) - set(OPS)
    assert set(passed.stale("3.9.0", copy, copy / "passed.csv")) == ops | runs
    assert {step for step, _ in passed.outdated(copy, copy / "passed.csv")} == ops | runs


def test_calls_of_one_op_are_those_of_no_other(copy):
    calls = copy / "tests/support/fake_gpu/ops.py"
    calls.write_text(calls.read_text().replace("def ipot(dtype):\n", "def ipot(dtype):\n    yield from ()\n"))
    assert passed.stale("3.9.0", copy, copy / "passed.csv") == ["ipot"]


def test_a_measured_configuration_is_compiled(copy):
    with open(copy / "vilt_fast" / "order.csv", "a") as file:
        file.write("sm_90,linear,any,reference triton,,measured\nsm_90,attention_bwd,any,triton,BLOCK_M=64,measured\n")
    runs = set(STEPS) - set(OPS)
    assert set(passed.stale("3.9.0", copy, copy / "passed.csv")) == {"attention"} | runs

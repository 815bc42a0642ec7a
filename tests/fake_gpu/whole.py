"""Everything that a GPU would be given, which takes a quarter of an hour: `make fake-gpu`, with two releases of Triton.

Not collected by itself: its name is not that of a test.
"""

import pytest
from support.fake_gpu.processes import played

DTYPES = ["bfloat16", "float16", "float32"]
OPS = (
    "attention", "patch_embed", "linear", "linear_qkv", "linear_fp8", "linear_gelu", "add_layer_norm",
    "linear_cross_entropy", "text_embed", "word_patch_distance", "ipot", "sinkhorn",
)  # fmt: skip


def test_every_op_with_triton_kernels_is_called():
    from vilt_fast.ops import registry

    known = {op.removesuffix("_bwd") for op, backend in registry._ROWS if backend == "triton"}
    assert known - {"quantize_fp8"} == set(OPS)  # which linear_fp8 calls


@pytest.mark.parametrize("op", OPS)
def test_every_call_of_an_op_compiles_and_fits_and_nothing_that_ships_is_left(op):
    played(dict(what="ops", op=op, dtypes=DTYPES))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("run", ["forward", "training"])
def test_models(run, dtype):
    played(dict(what="models", run=run, dtype=dtype))


@pytest.mark.parametrize("run", ["forward", "serving"])
def test_fp8(run):
    played(dict(what="models", run=run, dtype="bfloat16", quantize="fp8"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_of_a_server_compile_once(dtype):
    played(dict(what="models", run="serving", dtype=dtype))

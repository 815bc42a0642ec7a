"""ipot, sinkhorn and word_patch_distance in CUDA C++: the sources themselves run on the CPU (cuda_on_cpu/) under the
error budget, behind the launchers and the registered ops; nvcc compiles them without spills."""

import contextlib
import ctypes
import re
import subprocess
from pathlib import Path

import pytest
import torch
from support.transport_case import (
    WEIGHTS,
    any_weights,
    assert_a_bad_cost_spoils_its_own_sample,
    assert_distance,
    assert_finds_the_permutation,
    assert_ipot,
    assert_only_real_entries_count,
    assert_sinkhorn,
    assert_the_scale_of_weights_is_free,
    costs,
    distance,
    hidden,
    ipot,
    sinkhorn,
)

from benchmarks.compiled import cuda_report
from vilt_fast import _C, functional
from vilt_fast.backends.cuda import _cuda, word_patch_distance
from vilt_fast.backends.cuda import sinkhorn as cuda_sinkhorn
from vilt_fast.ops import registry
from vilt_fast.testing import opcheck, poisoned, sliced, strided

HERE = Path(__file__).resolve().parent
SMALL = dict(texts=(9, 1, 4, 0), images=(17, 3, 20, 5))
SHARED = 232448  # bytes a block can have on sm_90


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The kernels, compiled for this CPU."""
    path = tmp_path_factory.mktemp("cuda_on_cpu") / "kernels.so"
    flags = [
        "-std=c++17",
        "-O2",
        "-shared",
        "-fPIC",
        "-Wall",
        "-Wextra",
        "-Wno-unknown-pragmas",
        "-fno-strict-aliasing",
    ]
    subprocess.run(
        ["c++", *flags, "-I", HERE / "cuda_on_cpu", "-o", path, HERE / "cuda_on_cpu" / "harness.cpp"], check=True
    )
    found = ctypes.CDLL(str(path))
    found.start()
    return found


@pytest.fixture
def emulated(library, monkeypatch):
    """The launchers of the cuda backend call the library; limit(bytes) sets how much shared memory a block can have."""
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_double
    pairs = [pointer, pointer, ctypes.c_int64, integer, integer]
    codes = {"f32": 0, "f16": 1, "bf16": 2}

    def bind(name, *types):
        def call(*arguments):
            *arguments, stream = (codes.get(x, x) if isinstance(x, str) else x for x in arguments)
            assert stream == 0
            wanted = [*pairs, *types]
            assert len(arguments) == len(wanted)
            status = getattr(library, name)(*(t(x) for t, x in zip(wanted, arguments, strict=True)))
            assert status == 0

        monkeypatch.setattr(_C, f"cuda_{name}", call, raising=False)

    bind("ipot", pointer, pointer, real, integer, integer)
    bind("sinkhorn", *[pointer] * 7, real, integer, real)
    bind("word_patch_distance", pointer, pointer, integer, integer, *[pointer] * 3, real, integer, integer)
    monkeypatch.setattr(_C, "cuda_word_patch_scratch", lambda M, N: bool(library.scratch_needed(M, N)), raising=False)
    monkeypatch.setattr(_cuda, "stream", lambda device: contextlib.nullcontext(0))
    monkeypatch.setattr(_cuda, "problem", lambda device, dtype, rows, columns: "")
    registry._remembered.cache_clear()
    library.set_shared_limit(SHARED)
    yield library.set_shared_limit
    library.set_shared_limit(SHARED)
    registry._remembered.cache_clear()


@pytest.mark.parametrize("limit", [SHARED, 20000])
@pytest.mark.parametrize("beta, iterations, inner", [(0.5, 20, 1), (0.5, 1, 1), (2.0, 17, 2), (0.02, 3, 2)])
def test_ipot(emulated, limit, beta, iterations, inner):
    """The linear and the scaled loop, costs in shared and in global memory."""
    emulated(limit)
    assert_ipot("cuda", costs(), beta=beta, iterations=iterations, inner=inner)


@pytest.mark.parametrize("shape", [(128, 1024), (64, 256), (64, 257), (65, 30)])
def test_ipot_of_large_pairs(emulated, shape):
    assert_ipot("cuda", costs(*zip(shape, strict=True)), iterations=2, inner=2)


def test_ipot_at_small_beta(emulated):
    assert_finds_the_permutation("cuda", 0.02, iterations=200)


@pytest.mark.parametrize("limit", [SHARED, 20000])
def test_any_positions_may_be_real_and_padding_may_be_nan(emulated, limit):
    emulated(limit)
    assert_only_real_entries_count("cuda", (20, 70))


@pytest.mark.parametrize("beta", [0.5, 0.02])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_cost_that_is_not_finite_spoils_its_own_sample(emulated, value, beta):
    assert_a_bad_cost_spoils_its_own_sample("cuda", **SMALL, value=value, beta=beta)


@pytest.mark.parametrize("limit", [SHARED, 20000])
@pytest.mark.parametrize("epsilon, iterations", [(0.1, 9), (2.0, 1), (0.01, 20)])
def test_sinkhorn(emulated, limit, epsilon, iterations):
    emulated(limit)
    assert_sinkhorn("cuda", costs(), epsilon=epsilon, iterations=iterations)


def test_sinkhorn_with_marginals_and_tolerance(emulated):
    cost, text_pad, image_pad = costs()
    weights = [torch.rand(text_pad.shape) + 0.1, torch.rand(image_pad.shape) * 1e3]
    weights[0][0, 2] = weights[1][0, 5] = 0  # as if padded
    weights[0][2] = 0  # nothing to move
    weights = [poisoned(weights[0], text_pad), poisoned(weights[1], image_pad)]
    plan, _, used, _ = assert_sinkhorn("cuda", (cost, text_pad, image_pad), epsilon=0.2, iterations=5, weights=weights)
    assert not plan[2].any() and used[2] == 0 and not plan[0, 2].any()
    used = sinkhorn("cuda", *costs((5, 1, 3), (6, 4, 2)), epsilon=0.2, iterations=99, tolerance=1e-4)[2]
    assert used[1] == 1 < used[0] < 99


@pytest.mark.parametrize("kind", WEIGHTS)
def test_sinkhorn_with_weights_of_any_size(emulated, kind):
    arguments = costs(**SMALL)
    assert_sinkhorn("cuda", arguments, iterations=20, weights=any_weights(kind, *arguments[1:]))
    assert_the_scale_of_weights_is_free("cuda", **SMALL)


@pytest.mark.parametrize("dtype, width", [(torch.float32, 76), (torch.float16, 136), (torch.bfloat16, 72)])
@pytest.mark.parametrize("limit", [SHARED, 101376, 60000], ids=["four stages", "two stages", "scratch"])
def test_distance(emulated, dtype, width, limit):
    emulated(limit)
    assert_distance("cuda", hidden(dtype, width), iterations=6)


@pytest.mark.parametrize("beta, inner, shape", [(0.02, 1, (9, 17)), (0.5, 2, (60, 140)), (0.5, 1, (128, 300))])
def test_distance_of_other_loops_and_shapes(emulated, beta, inner, shape):
    assert_distance("cuda", hidden(torch.float32, 12, *zip(shape, strict=True)), beta=beta, iterations=2, inner=inner)


def test_distance_whatever_padding_and_other_samples_hold(emulated):
    text, image, *pads = hidden(width=8, **SMALL)
    want = distance("cuda", text, image, *pads, iterations=4)[0]
    got = distance("cuda", poisoned(text, pads[0]), poisoned(image, pads[1]), *pads, iterations=4)[0]
    assert torch.equal(got, want) and got[3] == 0
    for layout in (strided, sliced):
        assert torch.equal(distance("cuda", layout(text), layout(image), *pads, iterations=4)[0], want)
    text[1, 0, 0] = float("nan")
    got = distance("cuda", text, image, *pads, iterations=4)[0]
    assert got.isnan().tolist() == [False, True, False, False]
    assert torch.equal(got[[0, 2, 3]], want[[0, 2, 3]])


def test_without_words_or_patches(emulated):
    for M, N in ((0, 3), (3, 0)):
        pads = torch.zeros(2, M).bool(), torch.zeros(2, N).bool()
        assert ipot("cuda", torch.zeros(2, M, N), *pads).shape == (2, M, N)
        assert sinkhorn("cuda", torch.zeros(2, M, N), *pads)[1].tolist() == [0, 0]
        assert distance("cuda", torch.ones(2, M, 8), torch.ones(2, N, 8), *pads)[0].tolist() == [0, 0]


def test_registered_ops(emulated):
    cost, *pads = costs(**SMALL)
    pads = dict(text_pad=pads[0], image_pad=pads[1])
    opcheck("ipot", "cuda", cost=cost, **pads, beta=0.5, iterations=2, inner=1)
    options = dict(epsilon=0.5, iterations=2, tolerance=1e-3)
    opcheck("sinkhorn", "cuda", keep=True, cost=cost.requires_grad_(), **pads, **options)
    text, image, *_ = hidden(width=8, **SMALL)
    for plan in (False, True):
        options = dict(beta=0.5, iterations=2, inner=1, return_plan=plan)
        opcheck("word_patch_distance", "cuda", text=text, image=image, **pads, **options)


def test_nvcc_compiles_the_kernels_without_spills():
    if cuda_report.compiler() is None:
        with pytest.raises(RuntimeError, match="nvcc is missing"):
            cuda_report.rows()
        return
    found = cuda_report.rows(arches=("90a",))
    assert all(row["stack_bytes"] == row["spill_bytes"] == 0 < row["registers"] for row in found), found
    # ipot up to 40 and up to 64 rows, sinkhorn, word_patch_distance in three dtypes
    assert len({row["kernel"] for row in found}) == 6


def test_spills_are_reported(tmp_path):
    if cuda_report.compiler() is None:
        return
    source = tmp_path / "spills.cu"
    source.write_text(
        'extern "C" __global__ void k(float* x, int i) { float a[300];'
        "for (int j = 0; j < 300; ++j) a[j * i % 300] = x[j];"
        "for (int j = 0; j < 300; ++j) x[j] = a[(j * 7 + i) % 300]; }"
    )
    (row,) = cuda_report.rows(arches=("90a",), sources=[source])
    assert row["kernel"] == "k" and row["stack_bytes"] == 1200


def test_what_is_missing_is_said(monkeypatch):
    reason = registry.why_unavailable("ipot", "cuda")
    if not getattr(_C, "cuda_archs", None):
        assert "was built without CUDA" in reason and "nvcc" in reason
    elif not torch.cuda.is_available():
        assert reason.startswith(f"it is built ({_C.cuda_archs}), but") and "driver" in reason or "GPU" in reason
        with pytest.raises(RuntimeError, match="driver|GPU"):
            _C.cuda_devices()
    cost, *pads = costs(**SMALL)
    with pytest.raises(RuntimeError, match="tensors are on cpu, it runs on NVIDIA GPUs"):
        functional.ipot(cost, *pads, backend="cuda")
    monkeypatch.setattr(_cuda, "_missing", lambda: "")
    for facts, match in (
        (dict(rows=1025), "at most 1024"), (dict(requires_grad=True), "no backward"), (dict(hidden=12), "16 bytes"),
        (dict(dtype=torch.float64), "float64"), (dict(), "^$"),
    ):  # fmt: skip
        assert re.search(match, word_patch_distance.supports(device="cuda", **facts))
    assert "through the iterations" in cuda_sinkhorn.supports(device="cuda", unrolled=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [dict(), dict(texts=(128, 7), images=(1024, 300))])
def test_on_a_gpu(dtype, shape):
    for options in (dict(), dict(beta=0.1, iterations=100, inner=2)):
        assert_ipot("cuda", costs(**shape), "cuda", **options)
        assert_distance("cuda", hidden(dtype, 768, **shape), "cuda", **options)
    assert_sinkhorn("cuda", costs(**shape), "cuda")

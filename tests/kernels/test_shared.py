"""What the Triton kernels share: which GPU they ask about, and what cases of ahead-of-time compilation say."""

import pytest
import torch
from support.triton_case import names_every_argument

from vilt_fast.kernels import _aot, _device


@pytest.fixture
def two_gpus(monkeypatch):
    """An H100 and a T4, of which the first is current; the list of those that were asked."""
    asked = []
    capabilities = [(9, 0), (7, 5)]
    monkeypatch.setattr(_device, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: asked.append(index) or capabilities[index])
    _device._arch.cache_clear()
    yield asked
    _device._arch.cache_clear()


def test_a_gpu_is_asked_itself_and_once(two_gpus):
    for _ in range(2):
        assert _device.problem() == _device.problem("cuda") == _device.problem(torch.device("cuda", 0)) == ""
        assert "compute capability 7.5, expected 8.0" in _device.problem(torch.device("cuda", 1))
        assert _device.has_e4m3() and not _device.has_e4m3("cuda:1")
    assert two_gpus == [0, 1]


def test_precision_follows_what_the_result_is_rounded_to():
    half, full = torch.bfloat16, torch.float32
    assert [_device.precision(90, *to) for to in ((), (full,), (half, full), (half,))] == [*["tf32x3"] * 3, "tf32"]
    assert _device.precision(0) == _device.precision(0, half) == "ieee"


class _Kernel:
    """As much of a jitted function as a case looks at."""

    arg_names = ["x", "seed", "stride_x", "N", "scale", "BLOCK"]


def test_a_case_names_every_argument_and_nothing_else():
    case = _aot.case(_Kernel, "name", "bf16", dict(BLOCK=16, num_warps=8, of_another_kernel=1), seed=None, scale="fp32")
    assert names_every_argument(case)
    assert case["signature"] == dict(x="*bf16", stride_x="i32", N="i32", scale="fp32")
    assert case["constexprs"] == dict(BLOCK=16, seed=None)
    assert (case["num_warps"], case["num_stages"], case["arches"]) == (8, 1, (80, 89, 90, 100, "gfx942"))


def test_targets_are_grouped_by_what_they_have_in_common():
    groups = [
        (precision, [target.name for target in targets])
        for precision, targets in _aot.alike(lambda target: target.precision)
    ]
    assert groups == [("tf32x3", ["sm_80", "sm_89", "sm_90", "sm_100"]), ("ieee", ["gfx942"])]
    assert [target.name for target in _aot.FP8_TARGETS] == ["sm_89", "sm_90", "sm_100"]

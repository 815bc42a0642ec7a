"""The registry: explicit backends never fall back, None picks the first that can, everything says why it cannot."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from vilt_fast import functional
from vilt_fast.ops import registry


@pytest.fixture
def fake_op(monkeypatch):
    """An op with three backends, of which the best refuses float64 and the next is not installed."""
    slots = {
        ("probe", "cpp"): SimpleNamespace(
            where="",
            launcher="cpp!",
            supports=lambda op, dtype=None, **f: "no float64." if dtype == torch.float64 else "",
        ),
        ("probe", "torch"): SimpleNamespace(where="", launcher="torch!", supports=lambda op, **f: "not installed."),
        ("probe", "reference"): SimpleNamespace(where="", launcher="reference!", supports=None),
    }
    monkeypatch.setattr(registry, "_SLOTS", slots)


def test_none_takes_the_first_that_supports_the_call(fake_op):
    assert registry.resolve("probe", None, "cpu", dtype=torch.float32) == "cpp"
    assert registry.resolve("probe", None, "cpu", dtype=torch.float64) == "reference"
    assert registry.resolve("probe", None, "cuda", dtype=torch.float32) == "reference"
    assert registry.launcher("probe", "cpp") == "cpp!"


def test_an_explicit_backend_never_falls_back(fake_op):
    with pytest.raises(RuntimeError, match="'cpp' cannot run this call: no float64"):
        registry.resolve("probe", "cpp", "cpu", dtype=torch.float64)
    with pytest.raises(RuntimeError, match="not installed"):
        registry.resolve("probe", "torch", "cpu")
    with pytest.raises(ValueError, match="no backend 'nosuch'; there are cpp, reference, torch"):
        registry.resolve("probe", "nosuch", "cpu")


def test_when_nothing_can_every_reason_is_given(fake_op, monkeypatch):
    monkeypatch.delitem(registry._SLOTS, ("probe", "reference"))
    with pytest.raises(RuntimeError, match="cpp: no float64. torch: not installed"):
        registry.resolve("probe", None, "cpu", dtype=torch.float64)


def test_every_entry_resolves_to_a_function():
    for (op, backend), where in registry._ROWS.items():
        module, _, name = where.partition(":")
        assert callable(getattr(importlib.import_module(module), name)), where
        assert registry.launcher(op, backend) is getattr(importlib.import_module(module), name)


def test_every_public_op_has_a_reference_and_availability_lists_all():
    public = {name for name in functional.__all__ if name not in ("SinkhornResult", "quantize_linear")}
    assert public == {op for op, backend in registry._ROWS if backend == "reference"}
    rows = registry.availability()
    assert {(op, backend) for op, backend, _ in rows} == set(registry._ROWS)
    assert all(reason == "" for _, backend, reason in rows if backend in registry.PLAIN)
    assert all(isinstance(reason, str) for _, _, reason in rows)


def test_a_missing_native_library_is_named(monkeypatch):
    from vilt_fast.backends import cpp

    monkeypatch.setattr(cpp, "_missing", lambda: "the native library vilt_fast._C is not built")
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    with pytest.raises(RuntimeError, match="_C is not built"):
        functional.linear_gelu(x, w, None, backend="cpp")
    assert functional.linear_gelu(x, w, None).shape == (3, 5)
    with pytest.raises(RuntimeError, match="_C is not built"):
        functional.quantize_linear(w)

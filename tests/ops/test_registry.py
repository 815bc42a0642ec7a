"""The registry: explicit backends never fall back, None picks the first that can, everything says why it cannot."""

import dataclasses
import importlib
from types import SimpleNamespace

import pytest
import torch

from vilt_fast import functional
from vilt_fast.ops import registry


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts(registry.Facts):
    width: int = 1
    causal: bool = False


def facts(dtype=torch.float32, device="cpu", **more):
    return Facts(device=device, dtype=dtype, **more)


def _slot(name, supports):
    heard = ("device", "dtype", "width") if supports else ()
    return SimpleNamespace(where="", launcher=f"{name}!", supports=supports, heard=heard)


@pytest.fixture
def fake_op(monkeypatch):
    """An op with three backends, of which the best refuses float64 and the next is not installed."""
    slots = {
        ("probe", "cpp"): _slot(
            "cpp", lambda *, dtype=None, device=None, width=1: "no float64." if dtype == torch.float64 else ""
        ),
        ("probe", "torch"): _slot("torch", lambda *, dtype=None, device=None, width=1: "not installed."),
        ("probe", "reference"): _slot("reference", None),
    }
    monkeypatch.setattr(registry, "_SLOTS", slots)


def test_none_takes_the_first_that_supports_the_call(fake_op):
    assert registry.resolve("probe", None, facts()) == "cpp"
    assert registry.resolve("probe", None, facts(torch.float64)) == "reference"
    assert registry.resolve("probe", None, facts(device="cuda")) == "reference"
    assert registry.launcher("probe", "cpp") == "cpp!"


def test_an_explicit_backend_never_falls_back(fake_op):
    with pytest.raises(RuntimeError, match="'cpp' cannot run this call: no float64"):
        registry.resolve("probe", "cpp", facts(torch.float64))
    with pytest.raises(RuntimeError, match="not installed"):
        registry.resolve("probe", "torch", facts())
    with pytest.raises(ValueError, match="no backend 'nosuch'; there are cpp, reference, torch"):
        registry.resolve("probe", "nosuch", facts())


def test_when_nothing_can_every_reason_is_given(fake_op, monkeypatch):
    monkeypatch.delitem(registry._SLOTS, ("probe", "reference"))
    with pytest.raises(RuntimeError, match="cpp: no float64. torch: not installed"):
        registry.resolve("probe", None, facts(torch.float64))


def test_a_fact_that_does_not_exist_is_refused():
    with pytest.raises(TypeError, match="casual"):
        facts(casual=True)


def test_a_backend_that_has_not_heard_of_a_fact_is_not_chosen(fake_op):
    assert registry.resolve("probe", None, facts(causal=False)) == "cpp", "a fact that asks for nothing"
    assert registry.resolve("probe", None, facts(causal=True)) == "reference"
    with pytest.raises(RuntimeError, match="has not heard of causal, which is True here"):
        registry.resolve("probe", "cpp", facts(causal=True))


def test_supports_that_would_swallow_facts_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "swallows.py").write_text("def supports(op, **facts): return ''\ndef probe_fwd(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry._SLOTS, ("probe", "mine"), registry._Slot("swallows:probe_fwd"))
    with pytest.raises(TypeError, match="must take each fact by name"):
        registry.why_unavailable("probe", "mine")


def test_every_entry_resolves_to_a_function():
    for (op, backend), where in registry._ROWS.items():
        module, _, name = where.partition(":")
        assert callable(getattr(importlib.import_module(module), name)), where
        assert registry.launcher(op, backend) is getattr(importlib.import_module(module), name)


def test_every_backend_has_heard_of_every_fact():
    """So that each default in an op's Facts is a question that somebody has answered."""
    for op, backend in registry._ROWS:
        if op.endswith("_bwd") or registry.why_unavailable(op, backend) is None:
            continue
        module = importlib.import_module(f"vilt_fast.ops.{'linear_fp8' if op == 'quantize_fp8' else op}")
        fields = dataclasses.fields(getattr(module, "Facts", registry.Facts))
        known = {field.name for field in fields if field.metadata.get("asked", True)}
        if registry._SLOTS[op, backend].supports is not None:
            assert set(registry._SLOTS[op, backend].heard) == known, (op, backend)


def test_every_public_op_has_a_reference_and_availability_lists_all():
    # What only knows blobs is defined by `reference/encoder.py`, compute="int8", which takes float weights.
    others = ("SinkhornResult", "LayerParameters", "quantize_linear", "linear_int8")
    public = {name for name in functional.__all__ if name not in others}
    assert public == {op for op, backend in registry._ROWS if backend == "reference"}
    rows = registry.availability()
    assert {(op, backend) for op, backend, _ in rows} == set(registry._ROWS)
    assert all(reason == "" for _, backend, reason in rows if backend in registry.PLAIN)
    assert all(isinstance(reason, str) for _, _, reason in rows)


def test_a_library_of_other_sources_is_not_called(monkeypatch):
    from vilt_fast.backends.cpp import _native

    assert not registry.why_unavailable("linear", "cpp")
    monkeypatch.setattr(_native, "INTERFACE", _native.INTERFACE + 1)
    assert "built of other sources than these; build it again" in registry.why_unavailable("linear", "cpp")


def test_a_missing_native_library_is_named(monkeypatch):
    from vilt_fast.backends.cpp import _native

    monkeypatch.setattr(_native, "missing", lambda: "the native library vilt_fast._C is not built")
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    with pytest.raises(RuntimeError, match="_C is not built"):
        functional.linear_gelu(x, w, None, backend="cpp")
    assert functional.linear_gelu(x, w, None).shape == (3, 5)
    with pytest.raises(RuntimeError, match="_C is not built"):
        functional.quantize_linear(w)

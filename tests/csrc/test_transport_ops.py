"""The ops around ipot and sinkhorn in the native library: registration, bad input, the rows of their benchmark."""

import pytest
import torch

from benchmarks import transport
from vilt_fast import _C, functional
from vilt_fast.testing import opcheck, padding_masks

CPP = {"backend": "cpp"}


def _costs(texts, images):
    cost = torch.rand(len(texts), max(texts), max(images), generator=torch.Generator().manual_seed(0)) * 2
    return cost, padding_masks(texts), padding_masks(images)


@pytest.mark.parametrize("op", ["ipot", "sinkhorn"])
def test_registration_and_compile(op):
    cost, *pads = _costs(texts=[4, 3], images=[5, 2])
    cost.requires_grad_(op == "sinkhorn")
    options = dict(beta=0.5, inner=1) if op == "ipot" else dict(epsilon=0.5, tolerance=1e-3)
    given = dict(cost=cost, text_pad=pads[0], image_pad=pads[1], iterations=5)
    opcheck(op, "cpp", keep=op == "sinkhorn", **given, **options)

    def call(c):
        result = getattr(functional, op)(c, *pads, iterations=5)
        return (result.value if op == "sinkhorn" else result) * 2

    want, got = call(cost), torch.compile(call, fullgraph=True, backend="aot_eager")(cost)
    assert torch.equal(want, got)
    if op == "sinkhorn":
        assert torch.equal(*(torch.autograd.grad(x.sum(), cost)[0] for x in (want, got)))


def test_bad_input():
    cost, text_pad, image_pad = _costs(texts=[4, 3], images=[5, 2])
    for value in (float("nan"), float("inf")):
        broken = cost.clone()
        broken[1, 0, 1] = value
        broken[0, 3, 4] = value  # padding, or not: the mask says
        for op in (functional.ipot, functional.sinkhorn):
            for pads, samples in (
                ((text_pad, image_pad), "0, 1"),
                ((text_pad, image_pad.index_fill(1, torch.tensor(4), True)), "1"),
            ):
                with pytest.raises(
                    ValueError, match=rf"{op.__name__}: cost is NaN or infinite .* samples \[{samples}\]"
                ):
                    op(broken, *pads, **CPP)
    for op in (functional.ipot, functional.sinkhorn):
        with pytest.raises(RuntimeError, match="dtype is torch.float64"):
            op(cost.double(), text_pad, image_pad, **CPP)
    with pytest.raises(ValueError, match="beta is"):
        functional.ipot(cost, text_pad, image_pad, beta=float("nan"), **CPP)
    with pytest.raises(ValueError, match="iterations is 0"):
        functional.sinkhorn(cost, text_pad, image_pad, iterations=0, **CPP)
    for sizes, options in (
        ((2, 4, 5), (0.0, 50, 1)),
        ((2, 4, 5), (0.5, 0, 1)),
        ((0, 4, 5), (0.5, 50, 1)),
        ((2, 4, 5), (1e-40, 50, 1)),
    ):
        with pytest.raises(ValueError, match="needs"):
            _C.ipot(0, 0, 0, 0, *sizes, *options, 1)


def test_benchmark_rows(monkeypatch):
    """Every provider of every case, tiny: ours and the original's loop compute the same, and ratios have one base."""
    monkeypatch.setattr(transport, "BATCH", 2)
    monkeypatch.setattr(transport, "ITERATIONS", 3)
    monkeypatch.setattr(transport, "WIDTH", 8)
    rows = transport.rows(repeats=1, sample=0)
    base = {row["case"]: row for row in rows if row["provider"] in ("original", "reference")}
    ours = {row["case"]: row for row in rows if row["provider"] == "ours"}
    names = {f"{op}_{kind}" for op in ("ipot", "distance", "sinkhorn") for kind in ("full", "mixed")}
    assert set(ours) == set(base) == names | {f"{name}_single" for name in names}
    for case, row in ours.items():
        assert row["error"] <= 2 * base[case]["error"] + torch.finfo(torch.float32).eps
        assert row["ratio"] == base[case]["p50_ms"] / row["p50_ms"] and base[case]["ratio"] == 1

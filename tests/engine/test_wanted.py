"""Rows that nobody reads are left out of the last block, and nothing else changes, whichever way it takes."""

import pytest
import torch
from support.changes import LoRA
from support.models import assert_close, batch, build
from torch import nn

import vilt_fast
from vilt_fast.engine import encode as engine
from vilt_fast.engine.packing import Selection
from vilt_fast.engine.quantization import WeightCache
from vilt_fast.models.vilt.trunk import _block
from vilt_fast.testing import assert_within_budget, offsets


def packing_of(dtype=torch.float64):
    return vilt_fast.sequence_plan(vilt_fast.accelerate(build("trunk", dtype)), **batch("trunk", dtype))


def some(packing):
    """A few rows of each sample, none of one."""
    starts = packing.cu_seqlens.tolist()
    own = [list(range(b % 2, n, 3)) if b != 1 else [] for b, n in enumerate(packing.lengths)]
    rows = torch.tensor([start + i for start, of in zip(starts, own, strict=False) for i in of])
    return Selection(rows, offsets(map(len, own)), max(map(len, own)))


def lora(layers):
    layers[-1].output.dense = LoRA(layers[-1].output.dense)


def listened(layers):
    layers[-1].register_forward_hook(lambda *_: None)


def dropping(layers):
    for module in layers.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # training, and the same every time
    layers.train()


CHANGES = {"plain": lambda layers: None, "a wrapped layer": lora, "a hook": listened, "training": dropping}


@pytest.mark.parametrize("choose", [lambda packing: packing.pooled, some], ids=["pooled", "some"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("way", [torch.float64, torch.float32, torch.bfloat16, "int8", "fp8"])
def test_they_are_the_rows_of_all(way, change, grad, choose):
    """To the error budget, of which all rows are the measure: as far from float64 as they are, or nearer."""
    dtype = way if isinstance(way, torch.dtype) else torch.float32
    weights = None if isinstance(way, torch.dtype) else WeightCache(way)
    packing = packing_of(dtype)
    wanted = choose(packing)
    rows = torch.randn(packing.total_rows, 32).to(dtype)
    weight = torch.randn(len(wanted.rows), 32).to(dtype)

    def run(dtype, weights, selection):
        """[the wanted rows of the stream, all gradients if there are any]."""
        layers = build("trunk", dtype if dtype != torch.float64 else rows.dtype).encoder.layer
        torch.manual_seed(0)
        CHANGES[change](layers)
        layers.to(dtype)
        given = rows.to(dtype).requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            stream = engine.encode(layers, _block, given, packing, weights=weights, wanted=selection).rows
        stream = stream if selection is not None else stream[wanted.rows]
        if not grad:
            return [stream]
        found = torch.autograd.grad((stream * weight).sum(), [given, *layers.parameters()])
        return [stream.detach(), torch.cat([g.flatten() for g in found])]

    exact, whole, got = run(torch.float64, None, None), run(dtype, weights, None), run(dtype, weights, wanted)
    assert got[0].shape == (len(wanted.rows), 32)
    for mine, all_of_them, right in zip(got, whole, exact, strict=True):
        if dtype == torch.float64:
            assert_close(mine, all_of_them)
        else:
            assert_within_budget(mine, all_of_them, right)


def test_nothing_is_computed_for_the_others(monkeypatch):
    packing = packing_of()
    layers = build("trunk").encoder.layer
    seen = []
    linear = nn.functional.linear
    monkeypatch.setattr(
        "vilt_fast.functional.linear_gelu", lambda x, w, b: seen.append(len(x)) or nn.functional.gelu(linear(x, w, b))
    )
    with torch.no_grad():
        rows = torch.randn(packing.total_rows, 32, dtype=torch.float64)
        engine.encode(layers, _block, rows, packing, wanted=packing.pooled)
    assert seen == [packing.total_rows, packing.total_rows, packing.batch]


def test_without_blocks_they_are_those_of_the_input():
    packing = packing_of()
    rows = torch.randn(packing.total_rows, 32)
    assert torch.equal(engine.encode([], _block, rows, packing, wanted=packing.pooled).rows, rows[packing.pool_rows])

"""CONTRIBUTING's recipe "Add a backend", executed as it stands."""

import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from vilt_fast import functional
from vilt_fast.ops import _define, registry

RECIPE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks():
    """The Python of the recipe: the module, its row, its test."""
    section = RECIPE[RECIPE.index("## Add a backend") : RECIPE.index("## Tests")]
    return [textwrap.dedent(code) for code in re.findall(r"```python\n(.*?)```", section, re.S)]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The recipe's backend, registered."""
    module, row, test = blocks()
    (tmp_path / "mine.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    ((key, where),) = eval("{" + row + "}").items()
    assert key == ("add_layer_norm", "mine") and where == "vilt_fast.backends.mine:add_layer_norm_fwd"
    monkeypatch.setitem(registry._SLOTS, key, registry._Slot(where.removeprefix("vilt_fast.backends.")))
    return test


@pytest.mark.parametrize("rows", [2, 4])
def test_the_recipe_works(mine, rows):
    names = {}
    exec(mine, names)
    with torch.no_grad():
        names["test_mine"](rows)


def test_its_limits_are_said(mine):
    x, weight = torch.randn(3, 8), torch.randn(8)
    with pytest.raises(RuntimeError, match="no backward"):
        functional.add_layer_norm(x.requires_grad_(), x, weight, None, 1e-6, backend="mine")
    with torch.no_grad(), pytest.raises(RuntimeError, match="no dropout"):
        functional.add_layer_norm(x, x, weight, None, 1e-6, dropout_p=0.5, backend="mine")


@pytest.mark.parametrize("wrong, message", [
    ("return s", r"returned float32 \[2, 8\], expected \(outputs, kept\)"),
    ("return (s,), ()", "returned 1 outputs, expected 2: s, y"),
    ("return (s, s.double()), ()", r"returned y as float64 \[2, 8\], expected float32 \[2, 8\]"),
    ("return (s, s[:1]), ()", r"returned y as float32 \[1, 8\], expected float32 \[2, 8\]"),
    ("return (s, s), (s,)", "returned 1 kept, expected 0: none"),
])  # fmt: skip
def test_a_launcher_that_breaks_the_contract_is_named(tmp_path, monkeypatch, wrong, message):
    (tmp_path / "broken.py").write_text(
        f"def add_layer_norm_fwd(*, x, residual, **rest):\n    s = x + residual\n    {wrong}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    monkeypatch.setitem(registry._SLOTS, ("add_layer_norm", "broken"), registry._Slot("broken:add_layer_norm_fwd"))
    monkeypatch.setattr(_define.OPS["add_layer_norm"], "_seen", set())
    x = torch.randn(2, 8)
    with torch.no_grad(), pytest.raises(TypeError, match=message):
        functional.add_layer_norm(x, x, None, None, 1e-6, backend="broken")

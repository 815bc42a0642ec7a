"""Kernels know each other, the reference, the table of tiles, torch and Triton; import-linter sees no kernel."""

import ast
import sys
from pathlib import Path

import pytest

KERNELS = sorted((Path(__file__).parents[2] / "kernels").glob("*.py"))
BELOW = {"torch", "triton", "reference", "order", *sys.stdlib_module_names}


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_nothing_above_is_imported(path):
    own = {other.stem for other in KERNELS}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level or not node.module.startswith(("vilt_fast", "kernels")), "relative imports only"
            found = {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        else:
            continue
        assert found <= BELOW | own, f"line {node.lineno}: {found}"

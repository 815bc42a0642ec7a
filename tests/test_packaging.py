"""What is shipped: the files of the sdist, the parts of the installed package, its one version, README's names."""

import ast
import importlib.util
import inspect
import os
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest
from support import readme

import vilt_fast

ROOT = Path(__file__).parents[1]
SOURCES = ("csrc", "kernels", "vilt_fast")
ROOT_FILES = (
    "CHANGELOG.md", "CMakeLists.txt", "CONTRIBUTING.md", "DESIGN.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md",
    "pyproject.toml", "setup.py",
)  # fmt: skip


def files_of(root):
    """Every source below `root`, but for what is built and for the second name of kernels/."""
    found = {str(p.relative_to(root)) for folder in SOURCES for p in (root / folder).rglob("*") if p.is_file()}
    return {
        name for name in found
        if "__pycache__" not in name and not name.startswith("vilt_fast/kernels/") and not name.endswith((".so", ".o"))
    }  # fmt: skip


def test_the_sdist_has_every_source(tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in (*ROOT_FILES, *SOURCES):  # a copy: building leaves its notes beside setup.py
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree)
    built = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", tmp_path / "dist"], cwd=tree, capture_output=True,
        text=True, env=os.environ | {"PYTHONPATH": ""},
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (archive,) = (tmp_path / "dist").glob("vilt_fast-*.tar.gz")
    assert archive.name == f"vilt_fast-{vilt_fast.__version__}.tar.gz"
    with tarfile.open(archive) as opened:
        shipped = {m.name.partition("/")[2] for m in opened.getmembers() if m.isfile()}
    assert files_of(ROOT) and files_of(ROOT) <= shipped
    assert set(ROOT_FILES) <= shipped
    assert not [name for name in shipped if name.endswith((".so", ".o", ".pyc"))]


@pytest.mark.core
def test_the_package_is_whole():
    home = Path(vilt_fast.__file__).parent
    assert (home / "py.typed").is_file() and (home / "serving" / "page" / "index.html").is_file()
    assert importlib.import_module("vilt_fast._C").cpu_features()["isas"]
    kernels = importlib.util.find_spec("vilt_fast.kernels.linear")
    assert kernels and Path(kernels.origin) == home / "kernels" / "linear.py"


def test_one_version():
    assert metadata.version("vilt_fast") == vilt_fast.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{vilt_fast.__version__}]" in changelog


def test_type_checkers_see_every_public_name():
    tree = ast.parse(inspect.getsource(vilt_fast))
    (checking,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name for node in checking.body for alias in node.names}
    assert seen == set(vilt_fast.__all__) == {*vilt_fast._PUBLIC, "functional"}
    for node in checking.body:
        for alias in node.names:
            if node.module:
                assert getattr(vilt_fast, alias.name).__module__ == f"vilt_fast.{node.module}"


def test_names_and_options_of_the_readme_exist():
    calls = 0
    for block in readme.blocks():
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "vilt_fast":
                assert hasattr(vilt_fast, node.attr), node.attr
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("vilt_fast."):
                called = getattr(vilt_fast, node.func.attr)
                inspect.signature(called).bind(*node.args, **{k.arg: k.value for k in node.keywords if k.arg})
                calls += 1
    assert calls

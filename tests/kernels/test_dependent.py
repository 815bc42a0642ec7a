"""Programmatic dependent launch: asked for by the table, on GPUs that have it; every kernel waits before all else."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from vilt_fast import functional, order
from vilt_fast.kernels import _dependent, add_layer_norm, linear, linear_qkv

MODULES = {module.__name__.rpartition(".")[2]: module for module in (add_layer_norm, linear, linear_qkv)}
_COMPILE = """
import importlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

found = {}
for module in sys.argv[1:]:
    for case in importlib.import_module("vilt_fast.kernels." + module).aot_cases():
        kernel = case["kernel"]
        if not case["constexprs"].get("PDL") or kernel.__name__ in found or 90 not in case["arches"]:
            continue
        signature = {name: case["signature"].get(name, "constexpr") for name in kernel.arg_names}
        options = dict(num_warps=case["num_warps"], num_stages=case["num_stages"])
        made = triton.compile(ASTSource(kernel, signature, case["constexprs"]), GPUTarget("cuda", 90, 32), options)
        found[kernel.__name__] = made.asm["ptx"]
print(json.dumps(found))
"""
#: What touches memory that another kernel may write or read, by its name in PTX.
_TOUCHES = re.compile(r"^(?:@!?%p\d+ )?(?:ld\.global|st\.global|cp\.async|cp\.reduce|atom|red\.|prefetch|tensormap)")


def test_only_where_it_was_asked_for_and_the_gpu_has_it():
    for arch in (90, 100):
        assert _dependent.options({"PDL": True, "ROWS": 1}, arch) == {"PDL": True, "ROWS": 1, "launch_pdl": True}
    for config, arch in (({"PDL": True}, 89), ({"PDL": True}, 80), ({"PDL": True}, 0), ({}, 90), ({"PDL": False}, 90)):
        assert _dependent.options(config, arch) == {"PDL": False}


@torch.no_grad()
def test_never_in_the_interpreter(monkeypatch):
    """Which has no such launch, and would fail over it."""
    for op in ("linear", "linear_gelu", "linear_qkv", "add_layer_norm"):
        monkeypatch.setitem(order.TRIED, op, {"PDL": True})
    x, weight = torch.randn(3, 16), torch.randn(16, 16)
    functional.linear(x, weight, None, backend="triton")
    functional.linear_gelu(x, weight, None, backend="triton")
    functional.linear_qkv(x, weight, weight, weight, backend="triton")
    functional.add_layer_norm(x, x, None, None, 1e-6, backend="triton")


@pytest.mark.parametrize("kind, dtype", [("tma", torch.bfloat16), ("pointer", torch.bfloat16)])
def test_a_table_adds_it_to_what_a_kernel_has(kind, dtype, monkeypatch):
    asked = {
        "linear": lambda: linear._measured(linear._config(kind, 185, 768), kind, 185, 768, 90),
        "linear_gelu": lambda: linear._config(kind, 185, 3072, gelu=True),
        "linear_qkv": lambda: linear_qkv._config(kind, 185, 768),
        "add_layer_norm": lambda: add_layer_norm.fwd_config(185, 768, dtype, 90),
    }
    before = {op: call() for op, call in asked.items()}
    for op in asked:
        monkeypatch.setitem(order.TRIED, op, {"PDL": True})
    for op, call in asked.items():
        assert call() == before[op] | ({"PDL": True} if kind == "tma" or op == "add_layer_norm" else {})


def test_every_program_waits_before_it_touches_memory():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE, *MODULES], env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert set(found) == {
        "_add_layer_norm_fwd_kernel", "_linear_fwd_kernel", "_linear_qkv_fwd_kernel", "_linear_split_fwd_kernel",
        "_linear_sum_kernel",
    }  # fmt: skip
    for kernel, ptx in found.items():
        lines = [line.strip() for line in ptx[ptx.index(".entry") :].splitlines()]
        wait = next(i for i, line in enumerate(lines) if line.startswith("griddepcontrol.wait"))
        told = next(i for i, line in enumerate(lines) if line.startswith("griddepcontrol.launch_dependents"))
        touched = [i for i, line in enumerate(lines) if _TOUCHES.match(line)]
        left = [i for i, line in enumerate(lines) if re.match(r"(?:@!?%p\d+ )?(?:bra|ret|exit)\b", line)]
        assert touched and wait < told < min(touched), kernel
        assert wait < min(left), f"{kernel}: some programs go another way"

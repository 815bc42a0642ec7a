"""The worker of `benchmarks.compiled.aot_report`: compiles kernels for GPUs that are not there and reads what came out.

Requests come as lines of JSON on standard input, answers leave as lines of JSON on standard output:

    {"list": "vilt_fast.kernels.linear"}                       -> {"cases": [{"kernel", "case", "arches"}, ...]}
    {"compile": ["vilt_fast.kernels.linear", 3, "sm_90"]}      -> one row of the report, without its verdict

Registers and the stack frame (where spills go) are read from cuobjdump, instructions from nvdisasm, and for AMD both
from the assembly and its metadata. A process of its own, because a compiler that aborts takes its process along, and
because Triton decides when it is imported whether kernels are compiled or interpreted.
"""

import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

#: SASS names of matrix instructions by kind, strongest first; AMD has one kind.
TENSOR_CORES = {
    "tcgen05": r"\bUTC[A-Z]*MMA\b",
    "wgmma": r"\b[HIQ]GMMA\b",
    "mma": r"\b[HIQD]MMA\b",
    "mfma": r"\bv_mfma_\w+",
}
SPILLS = r"\b(?:STL|LDL)\b"
OWN_SOURCE = Path(__file__).read_text(encoding="utf-8")  # as it runs, whatever happens to the file meanwhile


def cases(module):
    """Names of the configurations that a kernel module ships, in the order of its `aot_cases()`."""
    return [
        {
            "kernel": case["kernel"].__name__,
            "case": case["name"],
            "arches": [arch if isinstance(arch, str) else f"sm_{arch}" for arch in case["arches"]],
        }
        for case in importlib.import_module(module).aot_cases()
    ]


def row(module, index, arch, cache):
    """Everything known about one configuration on one architecture; from `cache` (a folder) if nothing has changed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    case = list(importlib.import_module(module).aot_cases())[index]
    kernel = case["kernel"]
    found = {
        "op": module.rpartition(".")[2],
        "kernel": kernel.__name__,
        "case": case["name"],
        "arch": arch,
        "matmul": case["matmul"],
        "home": case.get("home", True),
        "num_warps": case["num_warps"],
        "num_stages": case["num_stages"],
    }
    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
    try:
        source = ASTSource(kernel, _signature(case), case["constexprs"], _aligned(case))
        options = {name: case[name] for name in ("num_warps", "num_stages")} | {"enable_fp_fusion": True}
        key = repr((triton.__version__, arch, sorted(options.items()), source.hash(), OWN_SOURCE))
        stored = Path(cache) / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
        if stored.is_file():
            return found | json.loads(stored.read_text())
        start = time.perf_counter()
        compiled = triton.compile(source, target=target, options=options)
        measured = {"seconds": round(time.perf_counter() - start, 2), **_resources(compiled, target.backend)}
        partial = stored.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(measured))
        partial.replace(stored)
    except Exception as error:  # whatever a compiler throws is a line of the report
        text = [line.strip() for line in str(error).splitlines() if line.strip()]
        measured = {"error": ": ".join(dict.fromkeys([type(error).__name__, *text[:1], *text[-1:]]))[:300]}
    return found | measured


def _signature(case):
    unnamed = {name for name in case["kernel"].arg_names if name not in case["signature"]} - set(case["constexprs"])
    if unnamed:
        raise ValueError(f"the case says nothing of {', '.join(sorted(unnamed))}")
    return {name: case["signature"].get(name, "constexpr") for name in case["kernel"].arg_names}


def _aligned(case):
    """What the launcher finds out about ViLT's tensors: pointers and strides are multiples of 16. Sizes need not be."""
    found = {}
    for i, parameter in enumerate(case["kernel"].params):
        kind = case["signature"].get(parameter.name, "")
        stride = parameter.name.startswith("stride") and not parameter.do_not_specialize
        if kind.startswith("*") or (kind and stride):
            found[(i,)] = [["tt.divisibility", 16]]
    return found


def _resources(compiled, backend):
    found = {
        "shared_bytes": compiled.metadata.shared,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", None) or 0,
        "binary_bytes": len(compiled.asm["cubin" if backend == "cuda" else "hsaco"]),
    }
    if backend == "hip":
        text = compiled.asm["amdgcn"]
        found["registers"] = _metadata(text, "vgpr_count")
        found["stack_bytes"] = _metadata(text, "private_segment_fixed_size")
        found["spill_instructions"] = len(re.findall(r"\bscratch_(?:load|store)\w*", text))
    else:
        found["registers"], found["stack_bytes"] = resources(compiled.asm["cubin"])
        text = _told_by("nvdisasm", "-c", cubin=compiled.asm["cubin"])
        found["spill_instructions"] = len(re.findall(SPILLS, text))
    counts = {kind: len(re.findall(pattern, text)) for kind, pattern in TENSOR_CORES.items()}
    found["tensor_core_kind"] = "+".join(kind for kind, count in counts.items() if count)
    found["tensor_cores"] = sum(counts.values())
    return found


def _metadata(assembly, name):
    return int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[-1])


def resources(cubin):
    """(registers, bytes of stack) a thread of the kernel in a binary for NVIDIA."""
    numbers = dict(re.findall(r"\b(REG|STACK):(\d+)", _told_by("cuobjdump", "--dump-resource-usage", cubin=cubin)))
    return int(numbers["REG"]), int(numbers["STACK"])


def _told_by(tool, *options, cubin):
    """What one of the tools that come with Triton prints."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tools / tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def main():
    """Answer requests until there are none."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a compiler prints is not an answer
    cache = os.environ["VILT_FAST_AOT_CACHE"]
    for line in sys.stdin:
        request = json.loads(line)
        if "list" in request:
            import triton

            answer = {"cases": cases(request["list"]), "triton": triton.__version__}
        else:
            answer = row(*request["compile"], cache)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

"""`vilt-fast info`: what is installed, which backends can run here and why the others cannot, the CPU, the GPUs."""

import json
import platform
import shutil
import textwrap
from importlib import metadata
from pathlib import Path

PACKAGES = ("vilt_fast", "torch", "transformers", "numpy", "triton")


def add(commands):
    """The subcommand."""
    parser = commands.add_parser("info", help="versions, backends, CPU features and GPUs of this machine")
    parser.add_argument("--json", action="store_true", help="as JSON, for programs and bug reports")
    parser.set_defaults(run=_run)


def _run(arguments, rest):
    print(json.dumps(facts(), indent=2) if arguments.json else text(shutil.get_terminal_size((100, 24)).columns))
    return 0


def versions():
    """Rows (name, version or "not installed"), and the folder that vilt_fast was imported from."""
    rows = [("Python", platform.python_version())]
    for name in PACKAGES:
        try:
            rows.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    return [*rows, ("imported from", str(Path(__file__).resolve().parents[1]))]


def cpu():
    """Rows (what, value) about the processor: its features and the instruction set the native part uses."""
    import torch

    rows = [("machine", platform.machine()), ("threads", str(torch.get_num_threads()))]
    try:
        from .. import _C
    except ImportError as error:
        reason = "not built" if "_C" in str(error) else str(error)
        return [*rows, ("native part", f"{reason}: pure Python install; pip install . with a C++ compiler builds it")]
    features = _C.cpu_features()
    for present, what in ((True, "has"), (False, "lacks")):
        rows.append((what, ", ".join(name for name, value in features.items() if value is present) or "nothing"))
    rows.append(("instruction set in use", features["isa"]))
    return [*rows, ("native part", f"built for {', '.join(features['isas'])}")]


def gpus():
    """Rows (what, value) of the GPUs that NVML sees, or one row that says why it sees none."""
    try:
        import pynvml
    except ImportError:
        return [("NVML", "nvidia-ml-py is not installed; on a machine with an NVIDIA GPU: pip install nvidia-ml-py")]
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [("NVML", f"no NVIDIA driver answers ({error})")]
    try:
        rows = [("driver", _text(pynvml.nvmlSystemGetDriverVersion()))]
        for i in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(i)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            free, total = memory.free / 2**30, memory.total / 2**30
            name = _text(pynvml.nvmlDeviceGetName(handle))
            rows.append((f"GPU {i}", f"{name}, {total:.1f} GiB, {free:.1f} GiB free"))
        return rows if len(rows) > 1 else [*rows, ("GPU", "none")]
    except pynvml.NVMLError as error:
        return [("NVML", str(error))]
    finally:
        pynvml.nvmlShutdown()


def _text(value):
    """Older NVML bindings answer in bytes."""
    return value.decode() if isinstance(value, bytes) else value


def backends():
    """Rows (backend, ops it computes, "yes" or the reason why not here), those that run first."""
    from ..ops import registry

    ops = {}
    for op, backend, reason in sorted(registry.availability()):
        listed = ops.setdefault((bool(reason), backend, reason or "yes"), [])
        if not op.endswith("_bwd"):  # a gradient goes with its op
            listed.append(op)
    return [(backend, ", ".join(listed), reason) for (_, backend, reason), listed in sorted(ops.items()) if listed]


def orders():
    """Rows (op, the backends that are asked in turn on a GPU, and by what)."""
    from .. import order

    here = "any", order.capability()
    return [(f"{op} op" if op == "any" else op if size == "any" else f"{op}, {size} rows",
             f"{', '.join(entry.backends)}: {entry.by}")
            for (device, op, size), entry in order.table().items() if device in here]  # fmt: skip


def facts():
    """All of it as `{"versions": {name: version}, "cpu": {...}, "gpu": {...}, "backends": [{...}], "order": {...}}`; a
    package that is not installed has the version None, a backend that runs here the reason ""."""
    return {
        "versions": {name: None if version == "not installed" else version for name, version in versions()},
        "cpu": dict(cpu()),
        "gpu": dict(gpus()),
        "backends": [
            {"backend": backend, "ops": ops.split(", "), "runs": reason == "yes", "reason": reason.removeprefix("yes")}
            for backend, ops, reason in backends()
        ],
        "order": dict(orders()),
    }


def text(width=100):
    """All of it for a person, in lines of at most `width` characters."""
    titles = ("Versions", versions), ("CPU", cpu), ("GPU", gpus), ("Backends in turn on a GPU", orders)
    parts = [(title, rows()) for title, rows in titles]
    listed = {}
    for backend, ops, reason in backends():
        listed.setdefault("Backends that run here" if reason == "yes" else "Backends that do not", []).append(
            (backend, ops if reason == "yes" else f"{ops}: {reason}")
        )
    lines = []
    for title, rows in [*parts, *listed.items()]:
        first = max(len(name) for name, _ in rows) + 4
        lines += [title]
        for name, value in rows:
            start = f"  {name}".ljust(first)
            lines += textwrap.wrap(value, max(width, first + 20), initial_indent=start, subsequent_indent=" " * first)
        lines += [""]
    return "\n".join(lines[:-1])

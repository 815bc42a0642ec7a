"""`vilt-fast info`: what is installed, which backends can run here and why the others cannot, the CPU, the GPUs."""

import platform
from importlib import metadata

from .report import rich_table

PACKAGES = ("vilt_fast", "torch", "transformers", "numpy", "triton")


def add(commands):
    """The subcommand."""
    parser = commands.add_parser("info", help="versions, backends, CPU features and GPUs of this machine")
    parser.set_defaults(run=_run)


def _run(arguments, rest):
    show()
    return 0


def versions():
    """Rows (name, version or "not installed")."""
    rows = [("Python", platform.python_version())]
    for name in PACKAGES:
        try:
            rows.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    return rows


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


def show(console=None):
    """Print all of it."""
    from rich.console import Console

    console = console or Console()
    for title, rows in (("Versions", versions()), ("CPU", cpu()), ("GPU", gpus())):
        console.print(_plain(title, ("", ""), rows))
    console.print(_plain("Backends", ("backend", "ops", "runs here"), backends()))


def _plain(title, header, rows):
    """A table whose last columns wrap: lists and sentences."""
    table = rich_table(title, header, rows, text_columns=len(header))
    for column in table.columns[1:]:
        column.no_wrap = False
    return table

"""The driver, and what makes vilt_fast take CPU tensors for those of an H100."""

import dataclasses
import functools
import warnings

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.compiled.aot_compile import resources
from vilt_fast.engine import native
from vilt_fast.kernels import _aot, _device
from vilt_fast.ops import registry

H100 = next(target for target in _aot.TARGETS if target.arch == 90)
_GRID = (2**31 - 1, 65535, 65535)
_RANGES = {"i32": 31, "i64": 63}


@dataclasses.dataclass
class Compiled:
    """A kernel as the JIT has specialised and compiled it."""

    kernel: str
    constants: dict  #: {argument: value}
    num_warps: int
    num_stages: int
    shared: int  #: bytes
    cubin: bytes = b""

    @functools.cached_property
    def stack(self) -> int:
        """Bytes of stack a thread, which is where spilled registers go."""
        return resources(self.cubin)[1]

    def __str__(self):
        told = ", ".join(f"{k}={v}" for k, v in self.constants.items() if isinstance(v, int) and v != 1)
        return f"{self.kernel} ({told}, {self.num_warps} warps, {self.num_stages} stages)"


COMPILED: list[Compiled] = []  #: in the order in which they were first launched
LAUNCHED: list[str] = []  #: names of kernels


class _Launcher:
    """What Triton makes of each compiled kernel, to launch it with."""

    checking = True  #: whether arguments are looked at

    def __init__(self, source, metadata):
        names = source.fn.arg_names
        constants = {names[at[0]] if isinstance(at, tuple) else at: v for at, v in source.constants.items()}
        self.name, self.types = source.fn.__name__, source.signature
        self.made = Compiled(self.name, constants, metadata.num_warps, metadata.num_stages, metadata.shared)
        self.boxes = list(getattr(metadata, "tensordesc_meta", None) or ())
        COMPILED.append(self.made)

    def __call__(self, x, y, z, stream, function, packed, metadata, on_enter, on_exit, *arguments):
        LAUNCHED.append(self.name)
        if self.checking:
            self.check((x, y, z), arguments)

    def check(self, grid, arguments):
        """ValueError for what CUDA would refuse."""
        if not all(0 < n <= most for n, most in zip(grid, _GRID, strict=True)):
            raise ValueError(f"{self.name}: a grid of {grid}")
        boxes = iter(self.boxes)
        for (name, kind), value in zip(self.types.items(), arguments, strict=True):
            who = f"{self.name}: {name} ({kind}) is"
            if kind == "constexpr":
                continue
            if kind.startswith("tensordesc"):
                _check_box(f"{self.name}: {name}", value, next(boxes))
            elif kind.startswith("*"):
                if not isinstance(value, torch.Tensor):
                    raise ValueError(f"{who} {value!r}, no tensor")
            elif kind in _RANGES and not -(2 ** _RANGES[kind]) <= value < 2 ** _RANGES[kind]:
                raise ValueError(f"{who} {value}")


def _check_box(who, descriptor, told):
    """What cuTensorMapEncodeTiled wants: CUDA driver API, tensor map object management."""
    box, size = told["block_size"], descriptor.base.element_size()
    if any(not 0 < n <= 256 for n in box) or box[-1] * size % 16:
        raise ValueError(f"{who}: boxes of {box} elements of {size} bytes")
    if descriptor.base.data_ptr() % 16 or any(stride * size % 16 for stride in descriptor.strides[:-1]):
        raise ValueError(f"{who}: rows that do not begin at multiples of 16 bytes")


class _Utils:
    @staticmethod
    def load_binary(name, kernel, shared, device):
        COMPILED[-1].cubin = kernel
        return object(), object(), 0, 0, 1024  # module, function, registers, spills, most threads

    @staticmethod
    def unload_module(module):
        pass

    @staticmethod
    def get_device_properties(device):
        return {
            "max_shared_mem": H100.shared, "multiprocessor_count": H100.multiprocessors, "warpSize": 32,
            "max_num_regs": 1 << 16,
        }  # fmt: skip


class _Driver:
    utils, launcher_cls = _Utils, _Launcher

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", H100.arch, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


def install() -> None:
    """Play the GPU from now on, in this process. Library products are not computed either: memory is left as it is."""
    if _device.interpreted():
        raise RuntimeError("kernels are interpreted in this process: start one without TRITON_INTERPRET.")
    warnings.filterwarnings("ignore", message="(?s).*overrid")
    driver.set_active(_Driver())
    problem = _device.problem
    _device._gpu_problem = lambda device: ""
    _device.problem = lambda device=None, **dtypes: problem("cuda", **dtypes)
    _device.arch = lambda tensor: H100.arch
    _device.multiprocessors = lambda tensor: H100.multiprocessors
    _device.has_e4m3 = lambda device=None: True
    registry._GPUS.add("cpu")
    native.unavailable = lambda rows: "as on a GPU"
    for name, made in {
        "mm": lambda a, b: a.new_empty(a.shape[0], b.shape[1]),
        "addmm": lambda bias, a, b, beta=1, alpha=1: a.new_empty(a.shape[0], b.shape[1]),
        "addmm_": lambda to, a, b, beta=1, alpha=1: to,
        "bmm": lambda a, b: a.new_empty(*a.shape[:2], b.shape[2]),
    }.items():
        _library.impl(name, made, "CPU")


_library = torch.library.Library("aten", "IMPL")


def problems(at_home: list[Compiled]) -> list[str]:
    """What is wrong with kernels that ViLT's own shapes have compiled: the rest has been refused on the way."""
    return [f"{made}: spills, {made.stack} bytes of stack a thread" for made in at_home if made.stack]

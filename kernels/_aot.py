"""What `aot_cases()` of the kernel files share: the GPUs they compile for without having one, and how a case is made.

A case is a dict that benchmarks/aot_report.py compiles: name, kernel, signature (argument -> type), constexprs
(argument -> value), num_warps, num_stages, arches, matmul (products must use matrix instructions), home (ViLT's sizes:
nothing may spill). Configurations come from the functions that launchers ask, so that what is compiled is what ships.
"""

from typing import NamedTuple

from . import _device


class Target(NamedTuple):
    """A GPU, and what configurations depend on."""

    arch: int  # as `_device.arch` has it: 0 for AMD
    multiprocessors: int
    shared: int  # bytes of shared memory that one block can have

    @property
    def name(self):
        return f"sm_{self.arch}" if self.arch else "gfx942"

    @property
    def precision(self):
        return _device.precision(self.arch)


#: Shared memory: CUDA programming guide, table of compute capabilities (227 of 228 KB on sm_90 and sm_100, 163 of 164
#: on sm_80, 99 of 100 on sm_89); CDNA 3 ISA, 64 KB of local data share.
TARGETS = (
    Target(80, 108, 163 << 10),
    Target(89, 128, 99 << 10),
    Target(90, 132, 227 << 10),
    Target(100, 148, 227 << 10),
    Target(0, 304, 64 << 10),
)
FP8_TARGETS = tuple(target for target in TARGETS if _device.multiplies_e4m3(target.arch))

#: What an argument of this name is in all kernels; what is not here is a pointer to the elements of the case.
_NAMES = {
    "*u8": "text_pad image_pad",
    "*i32": "cu_q cu_k used_k start_k kept count",
    "*i64": "seed labels ids position_ids order source rows sample pos_index modality_index text_rows cls_rows "
    "patch_rows used",
    "*fp32": "mean rstd mean_out rstd_out sums partial lse stats delta losses picked maxima scale shift x_scale "
    "weight_scale pos_weight cost plan value error distance scaling gradient text_weight image_weight",
    "i32": "M N K D R V B T L n n_text gh gw rows_each table_rows padding_idx heads total_q q_blocks k_blocks "
    "drop_below tiles splits start width iterations inner",
    "i64": "ignore_index",
    "fp32": "eps p dropout_p grow step_high step_low tolerance",
}
_TYPES = {name: kind for kind, names in _NAMES.items() for name in names.split()}


def alike(feature):
    """(feature, targets that have it in common), in order; feature: a function of a target."""
    groups = {}
    for target in TARGETS:
        groups.setdefault(feature(target), []).append(target)
    return groups.items()


def case(kernel, name, element, config, *, targets=TARGETS, matmul=False, home=True, **types):
    """One case.

    Args:
        kernel: a jitted function.
        element: what the layer computes in, "bf16", "fp16", "fp32".
        config: constexprs and launch options, as a launcher passes them; what the kernel does not take is left out.
        types: of arguments that are something else than their name says; None where the argument is None.
    """
    config = {"num_warps": 4, "num_stages": 1} | config | {arg: None for arg, kind in types.items() if kind is None}

    def kind(arg):
        return types.get(arg) or _TYPES.get(arg) or ("i32" if arg.startswith("stride_") else f"*{element}")

    return dict(
        name=name,
        kernel=kernel,
        signature={arg: kind(arg) for arg in kernel.arg_names if arg not in config},
        constexprs={arg: value for arg, value in config.items() if arg in kernel.arg_names},
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        arches=tuple(target.arch or target.name for target in targets),
        matmul=matmul,
        home=home,
    )

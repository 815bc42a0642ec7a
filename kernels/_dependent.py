"""Programmatic dependent launch (NVIDIA, sm_90 on): a kernel is set up while the one before it still runs.

A kernel launched with ``launch_pdl`` may begin as soon as every program of the one before it has said so or has ended.
`begin` therefore comes first in a kernel, and every program of it goes through there:

  * `gdc_wait` (griddepcontrol.wait) returns when the kernel before has completed and all that it wrote is visible.
    Nothing is read or written before, weights neither: a cast or an optimizer may be what writes them. As all programs
    wait, "the kernel before has completed" says the same of the one before that, and so on: nothing is overtaken, and
    memory that an allocator hands out again is still that of one kernel at a time.
  * `gdc_launch_dependents` (griddepcontrol.launch_dependents) comes after it, so that at most two kernels are under
    way. It lets the next one begin only if that was launched so as well, and that one takes its places on the
    multiprocessors only where all programs of this one have theirs.

An ordinary kernel (a library's product, attention, a copy) that follows waits for the whole of this one, as it always
did. One that comes before says nothing, so it has ended when this one begins, and only the launch is hidden. What is
waited for through an event, in another stream, is waited for in full before the launch. A CUDA graph records the edge
as it is.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import _aot


@triton.jit
def begin(PDL: tl.constexpr):
    """Before anything else of a kernel that is launched with `options`."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


def options(config, arch):
    """The configuration, and how its kernel is launched: as a dependent where it says PDL=True and the GPU can."""
    if config.get("PDL") and arch >= 90:
        return config | {"launch_pdl": True}
    return config | {"PDL": False}


def ways(targets=_aot.TARGETS):
    """(GPUs, {"PDL": whether}) of ahead-of-time cases."""
    return [(targets, {"PDL": False}), ([target for target in targets if target.arch >= 90], {"PDL": True})]

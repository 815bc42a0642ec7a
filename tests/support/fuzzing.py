"""What the fuzz of the native ops shares: sizes beside block boundaries of csrc/cpu, threads, levels, hard values."""

import contextlib

import torch
from hypothesis import strategies as st

from vilt_fast import _C
from vilt_fast.testing import assert_within_budget, sliced, strided

#: More threads than there are cores, too.
THREADS = st.sampled_from([1, 2, 3, 16])
#: Instruction-set levels of this machine; the fastest is the one that people run.
LEVELS = st.sampled_from([_C.cpu_features()["isas"][-1], *_C.cpu_features()["isas"]])
MACHINES = st.tuples(LEVELS, THREADS)
SEEDS = st.integers(0, 2**31)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
LAYOUTS = st.sampled_from([torch.Tensor.contiguous, sliced, strided])


def sizes(most, *blocks):
    """1 .. most, mostly at or one beside a multiple of a block."""
    edges = {n + d for block in blocks for n in range(block, most + 2, block) for d in (-1, 0, 1)}
    return st.one_of(st.sampled_from(sorted(edges & set(range(1, most + 1)))), st.integers(1, most))


def edges(most, *blocks):
    """As `sizes`, of the large ones alone: between half of `most` and `most`."""
    return sizes(most, *blocks).filter(lambda n: 2 * n >= most)


@contextlib.contextmanager
def on(machine):
    """The native library at a level, with so many threads."""
    level, threads = machine
    before = torch.get_num_threads()
    _C.set_isa(level)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _C.set_isa(None)


def assert_right(got, plain, exact, what=""):
    """Within the error budget, of which the unluckiest of thousands of cases needs more than one case does."""
    assert_within_budget(got, plain, exact, factor=8, what=what)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(g, *shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, generator=g) * scale).to(dtype)


def denormal(tensor, wanted):
    """Every third value is one that the hardware may take for zero."""
    if wanted:
        tensor.view(-1)[::3] *= 1e-39
    return tensor

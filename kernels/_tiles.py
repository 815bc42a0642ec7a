"""What kernel files share besides the machine: dropout and halves of a tile, and tensors as kernels can read them.

Both kinds of dropout draw Philox words from (seed, place), whatever the tiles, so that a backward, or a forward that is
computed again, drops the same elements. The seed is read on the device.
"""

import triton
import triton.language as tl

# --- device side ------------------------------------------------------------------------------------------------------


@triton.jit
def halves(x):
    """The left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def dropout(x, seed, rows, first, p):
    """x / (1 - p), or 0 with probability p; x is [R, C] with `rows` [R], or [C] with one row, from column `first` on.

    A draw is four words: neighbouring columns share one of (seed, column / 4, row). first and C are multiples of 4.
    """
    quads = first // 4 + tl.arange(0, x.shape[-1] // 4)
    rows = tl.cast(rows, tl.int32)
    if len(x.shape) == 2:
        quads, rows = quads[None, :], rows[:, None]
    none = rows * 0 + quads * 0
    a, b, c, d = tl.philox(tl.load(seed), quads + none, rows + none, none, none)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), x.shape)
    return tl.where(tl.uint_to_uniform_float(words) >= p, x / (1.0 - p), 0.0)


@triton.jit
def kept(seed, drop_below, rows, keys, head):
    """Which probabilities of attention survive; rows (of the packed queries) and keys broadcast to the tile's shape.

    A draw of (seed, key, row, head) for every element, of which 24 bits count. Four neighbours cannot share one here:
    tiles are [rows, keys] in some kernels and [keys, rows] in another, as matrix products lay them out over threads.
    """
    zero = (rows + keys) * 0
    bits, _, _, _ = tl.philox(tl.load(seed), keys + zero, rows + zero, zero + head, zero)
    return (bits >> 8).to(tl.int32) >= drop_below


# --- host side --------------------------------------------------------------------------------------------------------


def cdiv(n, size):
    """How many tiles of a size hold n. Triton's own, which kernels may call too, takes 2 us here."""
    return -(-n // size)


def power_of_two(n):
    """The next one; as above."""
    return 1 << max(n - 1, 0).bit_length()


def dense(*tensors):
    """The tensors, contiguous; None where there is none."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def rows(*tensors):
    """Each as [rows, columns], columns dense; None where there is none."""
    flat = [t if t is None or t.dim() == 2 else t.reshape(-1, t.shape[-1]) for t in tensors]
    return [t if t is None or t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous() for t in flat]

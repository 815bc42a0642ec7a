"""Random numbers that belong to a sample, not to whoever computes it: one generator a (seed, epoch, index, purpose).

So a run is the same whatever the number of workers, the batches or the order in which anything is drawn.
"""

import numpy as np

AUGMENT, NEGATIVE, MASK, ORDER, SCENE = range(5)  #: purposes: each has numbers of its own


def generator(seed: int, epoch: int, index: int, purpose: int) -> np.random.Generator:
    """The generator of one sample for one purpose; all four are integers of 0 or more."""
    return np.random.default_rng((seed, epoch, index, purpose))

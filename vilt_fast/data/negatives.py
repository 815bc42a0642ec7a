"""What does not belong together: false images for image-text matching, false texts for retrieval.

The original draws a false image from all of them, the right one included; here it never is the right one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..errors import InputError


def other(number: int, count: int, generator: np.random.Generator) -> int:
    """One of `count` numbers that is not `number`, each as likely.

    Raises:
        InputError: there is no other.
    """
    if count < 2:
        raise InputError(f"a false image needs another image to draw: there are {count}.")
    drawn = int(generator.integers(count - 1))
    return drawn + (drawn >= number)


def other_texts(image: int, image_of: np.ndarray, wanted: int, generator: np.random.Generator) -> np.ndarray:
    """int64 [wanted]: different texts, none of them of this image.

    Args:
        image_of: [texts], the image of each text.

    Raises:
        InputError: there are fewer.
    """
    drawn = []
    for text in _shuffled(len(image_of), generator):
        if len(drawn) == wanted:
            break
        if image_of[text] != image:
            drawn.append(text)
    if len(drawn) < wanted:
        raise InputError(f"{wanted} false texts were asked for, and only {len(drawn)} texts are of another image.")
    return np.array(drawn, np.int64)


def _shuffled(count: int, generator: np.random.Generator) -> Iterator[int]:
    """0 .. count - 1 in random order, each drawn when it is asked for (Fisher and Yates, with what was moved alone)."""
    moved: dict[int, int] = {}
    for last in range(count - 1, -1, -1):
        at = int(generator.integers(last + 1))
        yield moved.get(at, at)
        moved[at] = moved.get(last, last)

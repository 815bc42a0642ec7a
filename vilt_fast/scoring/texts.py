"""Texts as token ids: strings through a tokenizer, once each, or ids as they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..errors import InputError


def read(texts, positions: int, vocabulary: int, tokenizer, truncate: bool) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """(ids int64 [t] of each text, what each is called).

    `tokenizer` is asked for, `tokenizer()`, where a text is a string.

    Raises:
        TypeError: something is neither. InputError: there is none, or one is too long or holds no such ids.
    """
    if isinstance(texts, str) or not isinstance(texts, Sequence | np.ndarray | torch.Tensor):
        raise TypeError(f"score: texts must be a list of strings or of token ids, got {type(texts).__name__}.")
    if len(texts) == 0:
        raise InputError("score: there are no texts.")
    strings = [text for text in texts if isinstance(text, str)]
    encoded = iter(())
    if strings:
        made = tokenizer()(strings, truncation=truncate, max_length=positions if truncate else None)
        encoded = iter(made["input_ids"])
    ids, names = [], []
    for place, text in enumerate(texts):
        own = _as_ids(next(encoded) if isinstance(text, str) else text, place)
        if truncate:
            own = own[:positions]
        if not 1 <= len(own) <= positions:
            raise InputError(
                f"score: text {place} ({_short(text)}) has {len(own)} tokens; the model takes 1 to {positions}. "
                "Shorten it, or pass truncate=True."
            )
        if own.min() < 0 or own.max() >= vocabulary:
            raise InputError(
                f"score: text {place} has ids from {own.min()} to {own.max()}; those of the model are 0 to "
                f"{vocabulary - 1}. Is the tokenizer that of the model?"
            )
        ids.append(own)
        names.append(text if isinstance(text, str) else " ".join(map(str, own.tolist())))
    return ids, tuple(names)


def _as_ids(text, place) -> np.ndarray:
    try:
        ids = np.asarray(text.cpu() if isinstance(text, torch.Tensor) else text)
    except ValueError:
        ids = np.zeros((0, 0))
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise TypeError(f"score: text {place} must be a string or whole numbers [t], got {type(text).__name__}.")
    return ids.astype(np.int64)


def _short(text):
    return repr(text if len(text) <= 40 else text[:37] + "...") if isinstance(text, str) else "ids"

"""`ScoreColumns`: pairs in the columns of a table, for `map_batches` of Ray Data and `map` of datasets."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import numpy as np
from torch import nn

from ..models import find_pairs
from .score import score


class ScoreColumns:
    """A callable that adds the score of each row's text and image to a batch of columns.

        dataset.map_batches(ScoreColumns, fn_constructor_args=[load], batch_size=256, ...)   # Ray Data
        dataset.map(ScoreColumns(load), batched=True, batch_size=256)                        # datasets

    The model is made where the first batch is computed, by each process for itself, so that the object can be sent
    to others: only `load` goes along.
    """

    def __init__(
        self, load: Callable[[], nn.Module] | nn.Module, *, text: str = "text", image: str = "image", **options
    ):
        """
        Args:
            load: a function without arguments that gives the model, accelerated as one likes; or the model.
            text, image: the names of the columns with strings (or ids), and with images as `score` takes them; a
                dict of `bytes` or `path` is an image too, as datasets has it undecoded.
            options: of :func:`vilt_fast.score`.
        """
        self._load, self._text, self._image = load, text, image
        self._options = {"progress": False} | options
        self._model = load if isinstance(load, nn.Module) else None

    def __call__(self, batch: Mapping) -> dict:
        """The batch with a column `score`, float32 [n]; of question answering `answer` and `probability` of the
        likeliest one. Rows that share an image or a text prepare it once."""
        if self._model is None:
            self._model = self._load()
        texts, images = Numbered(), Numbered()
        pairs = [
            (texts.add(_plain(text)), images.add(_plain(image)))
            for text, image in zip(batch[self._text], batch[self._image], strict=True)
        ]
        if not pairs:
            if find_pairs(self._model).answers:
                return {**batch, "answer": np.zeros(0, np.str_), "probability": np.zeros(0, np.float32)}
            return {**batch, "score": np.zeros(0, np.float32)}
        found = score(self._model, texts.all, images.all, pairs=pairs, **self._options)
        if found.answers is None:
            return {**batch, "score": np.asarray(found.scores)}
        best = [found.answer(pair) for pair in range(len(pairs))]
        return {
            **batch,
            "answer": np.array([b[0][0] if b else "" for b in best]),
            "probability": np.ascontiguousarray(found.scores[:, 0]),
        }

    def __getstate__(self):
        return self.__dict__ | {"_model": self._load if isinstance(self._load, nn.Module) else None}


def _plain(thing):
    """What a library wraps around a path, bytes or ids."""
    if isinstance(thing, Mapping) and ("bytes" in thing or "path" in thing):
        return thing["bytes"] if thing.get("bytes") is not None else thing["path"]
    return str(thing) if isinstance(thing, np.str_) else thing


class Numbered:
    """Things in order, those that are the same once."""

    def __init__(self):
        self.all, self._numbers = [], {}

    def add(self, thing) -> int:
        key = thing if isinstance(thing, str | bytes | os.PathLike) else id(thing)
        if key not in self._numbers:
            self._numbers[key] = len(self.all)
            self.all.append(thing)
        return self._numbers[key]

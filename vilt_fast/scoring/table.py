"""Scores as a file: `.npy`, or a table of each text with its best images, `.csv` or `.parquet`."""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

SUFFIXES = (".npy", ".csv", ".parquet")
_GROUP = 1 << 16  # rows of a table that are in memory at a time


def why_not(path) -> Exception | None:
    """What `write` would raise for `path`, as far as can be told ahead: see there."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        return ValueError(f"{path}: tables are {', '.join(SUFFIXES)}, not {path.suffix or 'without suffix'}.")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        return OSError(
            f"{path} cannot be written: {path.parent} is no folder that can be written to, or {path} is one."
        )
    if path.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            why = "Parquet is written with pyarrow, which is not installed: pip install pyarrow, or take .csv."
            return ImportError(f"{path}: {why}", name="pyarrow")
    return None


def rows(matrix) -> Iterator[tuple]:
    """(text, image, rank, score) of the best images of each text, or (text, image, rank, answer, probability).

    Texts and images are (number, name), ranks count from 1. A pair without a score is left out.
    """
    if matrix.answers is None:
        for text, (images, scores) in enumerate(zip(*matrix.top(), strict=True)):
            for rank, (image, score) in enumerate(zip(images.tolist(), scores.tolist(), strict=True), 1):
                if image >= 0 and score == score:
                    yield text, matrix.texts[text], image, matrix.images[image], rank, score
        return
    grid = matrix.pairs is None
    pairs = np.ndindex(*matrix.scores.shape[:2]) if grid else enumerate(matrix.pairs.tolist())
    for pair in pairs:
        at, (text, image) = (pair, pair) if grid else ((pair[0],), pair[1])
        for rank, (answer, share) in enumerate(matrix.answer(*at), 1):
            yield text, matrix.texts[text], image, matrix.images[image], rank, answer, share


def columns(matrix) -> tuple[str, ...]:
    """The names of what `rows` gives."""
    last = ("score",) if matrix.answers is None else ("answer", "probability")
    return ("text_number", "text", "image_number", "image", "rank", *last)


def write(matrix, path) -> None:
    """Write the scores of a `ScoreMatrix`; an existing file is replaced once the new one is whole.

    Args:
        path: `.npy` for all scores (of answers an array with fields `answer` and `score`); `.csv` or `.parquet` for
            a row a text and image, best first, at most `top_k` a text. Parquet needs pyarrow.

    Raises:
        ValueError: another suffix. ImportError: pyarrow is missing. OSError: it cannot be written.
    """
    path = Path(path)
    if problem := why_not(path):
        raise problem
    temporary = path.with_name(f".{path.name}.part")
    try:
        if path.suffix == ".npy":
            with open(temporary, "wb") as file:
                np.save(file, _array(matrix))
        elif path.suffix == ".csv":
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                table = csv.writer(file)
                table.writerow(columns(matrix))
                table.writerows(rows(matrix))
        else:
            _parquet(matrix, temporary)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _array(matrix):
    if matrix.answers is None:
        return matrix.scores
    dtype = [("answer", matrix.answers.dtype), ("score", matrix.scores.dtype)]
    both = np.empty(matrix.scores.shape, dtype)
    both["answer"], both["score"] = matrix.answers, matrix.scores
    return both


def _parquet(matrix, path):
    import itertools

    import pyarrow
    from pyarrow import parquet

    last = [pyarrow.float64()] if matrix.answers is None else [pyarrow.string(), pyarrow.float64()]
    kinds = [pyarrow.int64(), pyarrow.string(), pyarrow.int64(), pyarrow.string(), pyarrow.int64(), *last]
    schema = pyarrow.schema(list(zip(columns(matrix), kinds, strict=True)))
    left = rows(matrix)
    with parquet.ParquetWriter(path, schema) as file:
        while group := list(itertools.islice(left, _GROUP)):
            arrays = [
                pyarrow.array(column, field.type)
                for column, field in zip(zip(*group, strict=True), schema, strict=True)
            ]
            file.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))

"""What scoring gives back: `ScoreMatrix`, its best images a text, and `recall`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import InputError


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ScoreMatrix:
    """The scores of N texts with M images, or of P pairs of them. A pair that could not be scored is NaN."""

    #: float32 (float64 of a float64 model) [N, M], or [P] of a list of pairs: the better the higher. Of question
    #: answering [..., K]: the probability (a sigmoid) of each of the K likeliest answers, best first
    scores: np.ndarray
    texts: tuple[str, ...]  #: as they were given; ids as "101 2023 102"
    images: tuple[str, ...]  #: paths as they were given; "image 3" of what has no name
    pairs: np.ndarray | None = None  #: int64 [P, 2] (text, image) of each pair; None for the grid
    answers: np.ndarray | None = None  #: int32 [..., K] the number of each answer in the model; -1 where there is none
    names: Mapping[int, str] = dataclasses.field(default_factory=dict)  #: what the model calls its answers
    errors: Mapping[int, str] = dataclasses.field(default_factory=dict)  #: {image: why it could not be read}
    top_k: int | None = None  #: so many images a text are kept by `top`, `rows` and `save`
    sources: Sequence = ()  #: the images as they were given, for `sheet`

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.scores.shape))
        bad = f", {len(self.errors)} images unreadable" if self.errors else ""
        return f"ScoreMatrix({shape}: {len(self.texts)} texts, {len(self.images)} images{bad})"

    def __array__(self, dtype=None, copy=None):
        if copy is False and dtype not in (None, self.scores.dtype):
            raise ValueError(f"ScoreMatrix: {self.scores.dtype} as {dtype} takes a copy.")
        return np.array(self.scores, dtype=dtype, copy=True if copy is None else copy)

    def top(self, k: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(images int64 [N, k], their scores [N, k]) of each text, best first; NaN comes last, equals by number.

        `k` is `top_k`, or all, by default. Where a text has less than k scored pairs, the rest is -1 and NaN.

        Raises:
            ValueError: k is below 1, or the pairs were given an answer and not a score each.
        """
        if self.answers is not None:
            raise ValueError("ScoreMatrix.top: question answering gives answers, which do not rank images.")
        k = self.top_k if k is None else k
        k = len(self.images) if k is None else k
        if k < 1:
            raise ValueError(f"ScoreMatrix.top: k must be at least 1, got {k}.")
        k = min(k, len(self.images))
        images = np.full((len(self.texts), k), -1)
        scores = np.full((len(self.texts), k), np.nan, self.scores.dtype)
        for text, (candidates, values) in enumerate(self._of_texts()):
            order = np.argsort(-values, kind="stable")[:k]
            images[text, : len(order)], scores[text, : len(order)] = candidates[order], values[order]
        return images, scores

    def _of_texts(self):
        """(images, their scores) of each text."""
        if self.pairs is None:
            yield from ((np.arange(len(self.images)), row) for row in self.scores)
            return
        order = np.argsort(self.pairs[:, 0], kind="stable")
        ends = np.searchsorted(self.pairs[order, 0], np.arange(len(self.texts) + 1))
        for first, last in zip(ends, ends[1:], strict=False):
            at = order[first:last]
            yield self.pairs[at, 1], self.scores[at]

    def answer(self, *pair: int) -> list[tuple[str, float]]:
        """(answer, probability) of a pair, likeliest first: `answer(text, image)` of a grid, `answer(n)` of a list.

        Raises:
            ValueError: the model does not answer questions.
        """
        if self.answers is None:
            raise ValueError("ScoreMatrix.answer: this model scores pairs; a ViltForQuestionAnswering answers.")
        found = zip(self.answers[pair].tolist(), self.scores[pair].tolist(), strict=True)
        return [(self.names.get(number, str(number)), share) for number, share in found if number >= 0]

    def recall(self, truth) -> Recall:
        """`recall` of a grid."""
        if self.scores.ndim != 2 or self.answers is not None:
            raise ValueError("ScoreMatrix.recall: it takes the scores of a full grid; these are of pairs or answers.")
        return recall(self.scores, truth)

    def save(self, path) -> None:
        """Write a table: see :func:`vilt_fast.scoring.table.write`."""
        from .table import write

        write(self, path)

    def sheet(self, path, **options) -> None:
        """Write a picture: see :func:`vilt_fast.scoring.sheet.draw`."""
        from .sheet import draw

        draw(self, path, **options)


@dataclasses.dataclass(frozen=True)
class Recall:
    """Shares from 0 to 1, as the original's `compute_irtr_recall` has them."""

    ir_r1: float  #: texts whose image is the best of all images
    ir_r5: float  #: ... among the best five
    ir_r10: float
    tr_r1: float  #: images of which a text is the best of all texts
    tr_r5: float
    tr_r10: float


def recall(scores, truth) -> Recall:
    """Recall at 1, 5 and 10 of image retrieval (IR) and text retrieval (TR).

    Args:
        scores: [N, M] of N texts and M images, a `ScoreMatrix`, array or tensor; NaN is worse than any score.
        truth: int [N], the image of each text; or bool [N, M], where there are several. An image without a text, and a
            text without an image, are never found.

    Returns:
        A :class:`Recall`. Of equal scores the one that comes first is the better one.

    Raises:
        InputError: the shapes do not belong together, or an image is out of range.

    Source: ViLT (Kim et al. 2021), `compute_irtr_recall` of its `objectives.py`.
    """
    scores, truth = np.asarray(scores), np.asarray(truth)
    if scores.ndim != 2 or not scores.size:
        raise InputError(f"recall: scores must be [N texts, M images], got {list(scores.shape)}.")
    if truth.dtype != bool:
        if truth.shape != scores.shape[:1] or truth.dtype.kind not in "iu":
            raise InputError(
                f"recall: truth must be the number of the image of each of {len(scores)} texts, or bool "
                f"{list(scores.shape)}, got {truth.dtype} {list(truth.shape)}."
            )
        if not ((truth >= 0) & (truth < scores.shape[1])).all():
            raise InputError(
                f"recall: truth must name images 0 to {scores.shape[1] - 1}, got {truth.min()} to {truth.max()}."
            )
        truth = truth[:, None] == np.arange(scores.shape[1])
    elif truth.shape != scores.shape:
        raise InputError(f"recall: truth is {list(truth.shape)}, the scores {list(scores.shape)}.")
    shares = []
    for score, true in ((scores, truth), (scores.T, truth.T)):
        order = np.argsort(-score, axis=1, kind="stable")
        found = np.take_along_axis(true, order[:, :10], 1)
        shares += [float(found[:, :k].any(1).mean()) for k in (1, 5, 10)]
    return Recall(*shares)

"""`score`: texts with images, from what a user has to a `ScoreMatrix`."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..alignment.align import evaluating, saved_processor
from ..errors import InputError
from ..models import find_pairs
from ..models.pairs import Pairs
from . import pictures as pictures_of
from . import ranks
from . import texts as texts_of
from .fingerprint import fingerprint
from .journal import InMemory, OnDisk
from .matrix import ScoreMatrix
from .tiling import Tiling
from .workers import Workers

#: Rows of a batch. On a CPU two chunks of the native encoder; on a GPU not measured.
TOKEN_BUDGET = {"cpu": 1792, "cuda": 16384}


def score(
    model: nn.Module,
    texts: Sequence,
    images: Sequence,
    *,
    pairs: Sequence[tuple[int, int]] | None = None,
    token_budget: int | None = None,
    top_k: int | None = None,
    progress: bool = True,
    out=None,
    resume: bool = False,
    processor=None,
    tokenizer=None,
    truncate: bool = False,
) -> ScoreMatrix:
    """Score every text with every image, or a list of pairs; each is read, tokenised and embedded once.

    The packed forward runs on the parameters of `model`, which is neither accelerated nor changed, without gradients
    and in evaluation mode. A model accelerated in int8 is computed in int8. On a CPU with the native part a pair's
    score is the same to the last bit, in every precision, whatever else is scored, in whatever order and batches, on
    however many ranks, interrupted or not. On a GPU, without the native part, or where blocks are not plain, libraries
    compute the products, and a score depends on its batch by some roundings.

    A model that cannot be given texts and images embedded on their own (there are hooks on it or on its embedding, or
    the embedding is of another make) is called with one pair after the other, which is said once.

    Args:
        model: `ViltForImageAndTextRetrieval`, `ViltForQuestionAnswering`, a module with a `ViltModel` as `vilt` and a
            head `itm_score`, or the original `ViLTransformerSS` with one of its heads; accelerated or not, on any
            device.
        texts: N strings, or token ids [t] with [CLS] and [SEP] (lists, arrays, tensors).
        images: M paths, bytes of a file, PIL images, arrays or tensors [height, width, 3] as `align` takes them, or
            mappings with `pixel_values` and maybe `pixel_mask` of one image, as a processor makes them. A file is
            turned as the camera says, a PIL image taken as it is; of an animation the first frame counts. One that
            cannot be read is warned of and told in `errors`; its scores are NaN. One that is listed twice is read once.
        pairs: (text, image) numbers; None for the full grid.
        token_budget: packed rows of a batch (text tokens, [CLS] and patches), by default 1792 on a CPU. It bounds the
            memory, whatever N and M.
        top_k: so many images a text are kept by `ScoreMatrix.top` and `save`, by default all. Of question answering: so
            many answers a pair, by default 1.
        progress: show pairs a second and the time left, where tqdm is installed and somebody looks.
        out: a `.npy` file that results are streamed to, with a journal beside it.
        resume: go on with `out` where it was interrupted. Another model, other inputs, options or versions are refused.
        processor: what has `image_processor` and `tokenizer`, such as `transformers.ViltProcessor`, or an image
            processor alone, such as `vilt_fast.ImageProcessor` with decode="fast". By default the one saved with the
            model. transformers' own on Pillow is computed by `ImageProcessor`, bit for bit.
        tokenizer: in place of the processor's.
        truncate: cut texts that are longer than the model has positions, in place of refusing them.

    With `torch.distributed` initialised, each rank computes its part and all of them return all of it. Each rank has a
    file of its own beside `out`, which rank 0 makes of them.

    Raises:
        TypeError: `model` scores no pairs, or an argument is of the wrong kind.
        InputError: (a `ValueError`) nothing to score, a text that is too long, a number out of range, an `out` of
            another run.
        FileExistsError, OSError: `out` is there already, or cannot be written. What is done is safe.
    """
    task = _task(model)
    given = functools.cache(lambda: processor if processor is not None else saved_processor(model, "score"))
    ids, names = texts_of.read(
        texts, task.positions, task.vocabulary, lambda: tokenizer or _part(given(), "tokenizer"), truncate
    )
    of_images = functools.cache(lambda: pictures_of.quick(getattr(given(), "image_processor", given())))
    pictures = pictures_of.read(images, of_images)
    if not all(isinstance(picture.source, Mapping) for picture in pictures):
        of_images()  # what is missing is said before anything is computed
    listed = None if pairs is None else _pairs(pairs, len(ids), len(pictures))
    budget = _whole(token_budget, "token_budget", budget_of(task))
    k = _whole(top_k, "top_k", 1 if task.answers else len(pictures))
    if resume and out is None:
        raise InputError("score: resume=True needs out=, the file to go on with.")
    tiling = Tiling([len(i) for i in ids], len(pictures), listed, budget)
    rank, world = ranks.here()
    mine = lambda: ranks.tiles_of(tiling, rank, world)  # noqa: E731
    cells = (len(ids), len(pictures)) if listed is None else (len(listed),)
    cells, dtype = (*cells, k) if task.answers else cells, dtype_of(task)
    shape = cells if world == 1 else (sum(len(t.cells) for t in mine()), *cells[2 if listed is None else 1 :])
    place = (lambda tiles: ((t, t.cells) for t in tiles)) if world == 1 else ranks.in_a_row
    width = k if task.answers else 1
    kept = functools.partial(reduced, task, k)
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        if out is None:
            results = InMemory(shape, dtype, width)
        else:
            path = out if world == 1 else ranks.path_of(out, rank, world)
            if world > 1 and not resume and Path(out).exists():
                raise FileExistsError(f"score: {out} is there already: pass another out=, or remove it.")
            mark = fingerprint(task, ids, pictures, listed, of_images, (budget, k, rank, world))
            results = OnDisk(path, shape, dtype, width, lambda: ((t.number, c) for t, c in place(mine())), mark, resume)
        stack.enter_context(results)
        total = tiling.count if world == 1 else sum(len(t.cells) for t in mine())
        bar = stack.enter_context(_bar(progress and rank == 0, total, results.found))
        if results.found < total:
            before, where = frozenset(results.done), {}

            def left():
                for tile, cells in place(mine()):
                    if tile.number not in before:
                        where[tile.number] = cells
                        yield tile

            workers = stack.enter_context(Workers(task, ids, pictures, budget, total, kept))
            if workers.whole:
                _warn(f"the model is called with one pair after the other, for {workers.whole}")
            for done in workers.run(left()):
                results.put(done.tile.number, where.pop(done.tile.number), done.values, done.errors)
                bar.update(len(done.tile.cells))
        array = results.array()
        errors = {image: why for tile in results.done.values() for image, why in tile.items()}
        if world > 1:
            array, errors = ranks.together(array, errors, tiling, cells, dtype, width, out, task.device)
    if errors:
        said = "; ".join(f"{pictures[image].name}: {why}" for image, why in sorted(errors.items())[:5])
        said += "; ..." if len(errors) > 5 else ""
        if len(errors) == len(pictures):
            raise InputError(f"score: none of the images can be read: {said}")
        if rank == 0:
            _warn(f"{len(errors)} of {len(pictures)} images cannot be read, their scores are NaN: {said}")
    found = dict(scores=array, answers=None)
    if task.answers:
        found = dict(scores=array["score"], answers=array["answer"])
    return ScoreMatrix(
        **found, texts=names, images=tuple(p.name for p in pictures), pairs=listed, names=task.names,
        errors=dict(sorted(errors.items())), top_k=None if task.answers else top_k, sources=tuple(images),
    )  # fmt: skip


def _task(model) -> Pairs:
    if not isinstance(model, nn.Module):
        raise TypeError(f"score takes a torch.nn.Module, got {type(model).__name__}.")
    task = find_pairs(model)
    if task is None:
        raise TypeError(
            f"{type(model).__name__} scores no pairs: score takes transformers' ViltForImageAndTextRetrieval and "
            "ViltForQuestionAnswering, a ViltModel with a head itm_score, and the original ViLTransformerSS with one."
        )
    return task


def _part(processor, name):
    part = getattr(processor, name, None)
    if part is None:
        raise InputError(f"score: strings need a {name}, and {type(processor).__name__} has none: pass {name}=.")
    return part


def _pairs(pairs, texts, images) -> np.ndarray:
    listed = np.asarray(pairs)
    if listed.size == 0:
        raise InputError("score: the list of pairs is empty.")
    if listed.ndim != 2 or listed.shape[1] != 2 or listed.dtype.kind not in "iu":
        raise TypeError(f"score: pairs must be numbers (text, image), got {listed.dtype} {list(listed.shape)}.")
    if (listed < 0).any() or (listed >= (texts, images)).any():
        raise InputError(f"score: a pair is out of range: there are {texts} texts and {images} images.")
    return listed.astype(np.int64)


def _whole(value, name, default) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"score: {name} must be a whole number, got {type(value).__name__}.")
    if value < 1:
        raise InputError(f"score: {name} must be at least 1, got {value}.")
    return value


def budget_of(task: Pairs) -> int:
    """Rows of a batch, where nobody says how many."""
    return TOKEN_BUDGET.get(task.device.type, TOKEN_BUDGET["cuda"])


def dtype_of(task: Pairs) -> np.dtype:
    """Of results: floats, or (answer, score)."""
    score = np.dtype("f8" if task.dtype == torch.float64 else "f4")
    return np.dtype([("answer", "<i4"), ("score", score.str)]) if task.answers else score


def reduced(task: Pairs, k: int, logits: torch.Tensor) -> np.ndarray:
    """What is kept of logits [n, classes]: [n], or [n, k] of answers."""
    dtype = dtype_of(task)
    if not task.answers:
        return task.scores(logits).to(torch.float64).cpu().numpy().astype(dtype)
    shares, order = torch.sort(logits.double().sigmoid(), dim=1, descending=True, stable=True)
    made = np.zeros((len(logits), k), dtype)
    made["answer"], made["score"] = -1, np.nan
    most = min(k, logits.shape[1])
    made["answer"][:, :most], made["score"][:, :most] = order[:, :most].cpu(), shares[:, :most].cpu()
    return made


def _warn(text):
    warnings.warn(f"vilt_fast.score: {text}", stacklevel=3)


@contextlib.contextmanager
def _bar(wanted, total, done):
    """What counts pairs: tqdm, or nothing where it is not installed or nobody looks."""
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    if tqdm is None or not wanted:
        yield _Silent()
        return
    with tqdm(total=total, initial=done, unit="pair", disable=None, smoothing=0.1) as bar:
        yield bar


class _Silent:
    def update(self, count):
        pass

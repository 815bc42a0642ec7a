"""The model behind the service: requests in, answers out, by way of the queue."""

from __future__ import annotations

import concurrent.futures
import functools
import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from ..alignment.align import align, saved_processor
from ..errors import InputError
from ..models import find_pairs
from ..scoring import pictures as pictures_of
from ..scoring import texts as texts_of
from ..scoring.score import budget_of, reduced
from ..scoring.workers import MOST_WORKERS, Engine
from . import asked
from .batching import Batching
from .limits import Limits, Refusal, invalid


class Service:
    """A model that answers or ranks, its processor and its queue."""

    def __init__(
        self, model: nn.Module, *, limits: Limits, processor=None, workers: int | None = None,
        token_budget: int | None = None, seen: Callable[[int, int, float], None] = lambda *_: None,
    ):  # fmt: skip
        """
        Args:
            model: what `vilt_fast.score` takes, in evaluation mode, accelerated as one likes.
            processor: by default the one saved with the model.
            workers: threads that compute, which share torch's; by default one for each of these.
            token_budget: rows of a batch, by default that of `score`.
            seen: told of each batch: pairs, rows, seconds.

        Raises:
            TypeError: the model scores no pairs. InputError: it has no processor; there cannot be so many workers.
        """
        task = find_pairs(model)
        if task is None:
            raise TypeError(
                f"{type(model).__name__} answers no questions and ranks nothing: serve takes "
                "ViltForQuestionAnswering and ViltForImageAndTextRetrieval."
            )
        self.model, self.task, self.limits = model, task, limits
        self._processor = processor if processor is not None else saved_processor(model, "serve")
        self._images = pictures_of.quick(self._processor.image_processor)
        self._tokenizing = threading.Lock()  # a fast tokenizer keeps the options of a call
        kept = functools.partial(reduced, task, asked.MOST_ANSWERS)
        self._engine = Engine(task, workers or torch.get_num_threads(), kept)
        self.workers = self._engine.engines
        if workers is not None and workers != self.workers:
            self._engine.close()
            raise InputError(
                f"serve: there cannot be {workers} workers here, but {self.workers}: at most {MOST_WORKERS}, one for "
                f"each of {torch.get_num_threads()} threads, and one alone on a GPU or where the model takes whole "
                "pairs."
            )
        self.queue = Batching(self._engine, token_budget or budget_of(task), limits.queue, seen)

    def close(self) -> None:
        """Finish what was taken, end the threads."""
        self.queue.close()
        self._engine.close()

    # --- what is asked, as futures: `take` is done in a thread beside the one that talks to clients -----

    def take_vqa(self, given: asked.Vqa) -> concurrent.futures.Future:
        """Raises Refusal, Full."""
        question = asked.checked_text(given.inputs.question, "inputs.question", self.limits)
        image = asked.checked_image(given.inputs.image, "inputs.image", self.limits)
        (ids,) = self._ids([question], given.parameters.truncate)
        return self.queue.submit([(ids, 0)], self._pictures([image], ["inputs.image"]))

    def vqa(self, given: asked.Vqa, results: list) -> list[dict]:
        """The answers of it, likeliest first."""
        found = results[0][0][: given.parameters.top_k]
        _finite(found["score"][found["answer"] >= 0])
        names = self.task.names
        return [
            {"answer": names.get(number, str(number)), "score": share}
            for number, share in zip(found["answer"].tolist(), found["score"].tolist(), strict=True)
            if number >= 0
        ]

    def take_rerank(self, given: asked.Rerank) -> concurrent.futures.Future:
        """Raises Refusal, Full."""
        texts, images = asked.of_rerank(given, self.limits)
        ids = self._ids(texts, given.truncate)
        named = ["query"] if len(texts) > 1 or len(images) == 1 else [f"texts[{n}]" for n in range(len(images))]
        pairs = [(ids[t], i) for t in range(len(ids)) for i in range(len(images))]
        return self.queue.submit(pairs, self._pictures(images, named))

    def rerank(self, given: asked.Rerank, results: list) -> list[dict]:
        """The documents by their score, best first; equals by number."""
        scores = _finite(np.array([float(value[0]) for value in results]))
        shown = scores if given.raw_scores else torch.from_numpy(scores).sigmoid().numpy()
        made = []
        for number in np.argsort(-scores, kind="stable").tolist():
            made.append({"index": number, "score": float(shown[number])})
            if given.return_text:
                made[-1]["text"] = asked.content(given.texts[number])
        return made

    def take_align(self, given: asked.Align) -> concurrent.futures.Future:
        """Raises Refusal, Full."""
        text = asked.checked_text(given.inputs.text, "inputs.text", self.limits)
        image = asked.checked_image(given.inputs.image, "inputs.image", self.limits)
        (ids,) = self._ids([text], False)
        (picture,) = self._pictures([image], ["inputs.image"])
        return self.queue.call(functools.partial(self._aligned, ids, picture, given.parameters.whole_words))

    def _aligned(self, ids, picture, whole_words):
        try:
            pixels, mask = picture.pixels()
            inputs = {"input_ids": torch.from_numpy(ids)[None], "pixel_values": pixels.to(self.task.dtype)}
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            inputs["pixel_mask"] = torch.ones_like(pixels[:, 0], dtype=torch.long) if mask is None else mask
            (found,) = align(self.model, inputs, processor=self._processor, whole_words=whole_words)
        except (InputError, OSError) as error:
            raise invalid(str(error).removeprefix("align: ")) from error
        return found

    def align(self, given: asked.Align, results: list) -> dict:
        """The words, and the heat of each patch of the image, 0 to 1, row by row."""
        (found,) = results
        _finite(found.plan.numpy())
        return {
            "tokens": list(found.tokens), "grid": list(found.grid), "distance": found.distance,
            "heatmaps": [[round(v, 4) for v in heat.flatten().tolist()] for heat in found.heatmaps()],
        }  # fmt: skip

    def _ids(self, texts, truncate):
        try:
            with self._tokenizing:
                tokenizer = self._processor.tokenizer
                return texts_of.read(texts, self.task.positions, self.task.vocabulary, lambda: tokenizer, truncate)[0]
        except InputError as error:
            said = str(error).removeprefix("score: ").replace("truncate=True", '"truncate": true')
            raise invalid(said) from None

    def _pictures(self, images, names):
        made = pictures_of.read(images, lambda: self._images)
        for picture, name in zip(made, names, strict=True):
            picture.name = name
        return made


def _finite(values):
    if not np.isfinite(values).all():
        raise Refusal(500, "Backend", "the model computes NaN or infinity for this; float32 may help")
    return values

"""`CrossEncoder`: pairs scored with the calls that sentence-transformers has."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from ..errors import InputError
from ..models import find_pairs
from .columns import Numbered
from .score import score


class CrossEncoder:
    """`predict` and `rank` as `sentence_transformers.CrossEncoder` has them, of texts and images."""

    def __init__(
        self, model: nn.Module | str, *, processor=None, tokenizer=None, token_budget: int | None = None,
        truncate: bool = True, activation_fn: Callable | None = None,
    ):  # fmt: skip
        """
        Args:
            model: what `score` takes but for models that answer questions; or the folder or hub id of a
                `ViltForImageAndTextRetrieval`, which is accelerated.
            processor, tokenizer, token_budget, truncate: see :func:`vilt_fast.score`.
            activation_fn: of scores, on a tensor [n]. By default none: what ranks are scores of any size, not
                probabilities, which a sigmoid would only crowd near 0 and 1.

        Raises:
            TypeError: the model scores no pairs, or answers questions.
        """
        if isinstance(model, str | os.PathLike):
            from transformers import ViltForImageAndTextRetrieval

            from ..swap import accelerate

            model = accelerate(ViltForImageAndTextRetrieval.from_pretrained(model).eval())
        task = find_pairs(model) if isinstance(model, nn.Module) else None
        if task is None or task.answers:
            raise TypeError(
                f"CrossEncoder takes a model that scores pairs, such as ViltForImageAndTextRetrieval, and "
                f"{type(model).__name__} does not: vilt_fast.score gives the answers of one for questions."
            )
        self.model, self.activation_fn = model, activation_fn
        self._options = dict(
            processor=processor, tokenizer=tokenizer, token_budget=token_budget, truncate=truncate
        )  # fmt: skip

    def predict(
        self, sentences, *, show_progress_bar: bool = False, activation_fn: Callable | None = None,
        convert_to_numpy: bool = True, convert_to_tensor: bool = False,
    ):  # fmt: skip
        """The score of each pair, in order.

        Args:
            sentences: a pair or a list of them: (text, image) in either order, where an image is a `{"image": ...}`, or
                anything but a string, or the second of two strings; or a dict with both, `{"text": ..., "image": ...}`.
            activation_fn: in place of that of the encoder.

        Returns:
            An array [n], a tensor with `convert_to_tensor`, or a list of tensors without `convert_to_numpy`; a single
            number for a single pair. NaN for an image that cannot be read, which is warned of.
        """
        single = isinstance(sentences, Mapping) or _is_pair(sentences)
        given = [_split(pair) for pair in ([sentences] if single else sentences)]
        if not given:
            return torch.zeros(0) if convert_to_tensor else np.zeros(0, np.float32) if convert_to_numpy else []
        texts, images = Numbered(), Numbered()
        pairs = [(texts.add(text), images.add(image)) for text, image in given]
        made = score(
            self.model, texts.all, images.all, pairs=pairs, progress=show_progress_bar, **self._options
        ).scores  # fmt: skip
        function = activation_fn or self.activation_fn
        values = torch.from_numpy(np.ascontiguousarray(made))
        values = values if function is None else function(values)
        if convert_to_tensor:
            return values[0] if single else values
        if convert_to_numpy:
            return values.numpy()[0] if single else values.numpy()
        return values[0] if single else list(values)

    def rank(
        self, query, documents: Sequence, top_k: int | None = None, *, return_documents: bool = False,
        show_progress_bar: bool = False, activation_fn: Callable | None = None,
    ) -> list[dict]:  # fmt: skip
        """Documents by their score with the query, best first: `{"corpus_id": number, "score": float}`.

        Args:
            query: a text, for images; or an image (`{"image": ...}`, or anything but a string), for texts.
            documents: images (paths, `{"image": ...}`, ...) or texts (strings, `{"text": ...}`).
            top_k: so many of them. return_documents: each with what was given, as "text" or "image".

        Raises:
            InputError: both are texts, or both images.
        """
        of_text = _kind(query) != "image"
        bare = [_bare(document) for document in documents]
        odd = next((d for d in documents if _kind(d, text="image" if of_text else "text") == _kind(query)), None)
        if odd is not None:
            kind = _kind(query)
            raise InputError(
                f"CrossEncoder.rank: the query is {kind} and so is a document; ViLT scores texts with images."
            )
        pairs = [{"text": _bare(query), "image": d} if of_text else {"text": d, "image": _bare(query)} for d in bare]
        scores = self.predict(pairs, show_progress_bar=show_progress_bar, activation_fn=activation_fn)
        order = np.argsort(-np.asarray(scores), kind="stable")[:top_k]
        name = "image" if of_text else "text"
        return [
            {"corpus_id": int(n), "score": float(scores[n])} | ({name: bare[n]} if return_documents else {})
            for n in order
        ]


def _kind(thing, text="text") -> str:
    """ "text" or "image"; a plain string is `text`."""
    if isinstance(thing, Mapping):
        return "text" if "text" in thing else "image"
    return text if isinstance(thing, str) else "image"


def _bare(thing):
    if isinstance(thing, Mapping):
        return thing["text"] if "text" in thing else thing.get("image", thing)
    return thing


def _is_pair(given) -> bool:
    if not isinstance(given, list | tuple) or len(given) != 2:
        return False
    inner = [
        isinstance(part, list | tuple) or isinstance(part, Mapping) and "text" in part and "image" in part
        for part in given
    ]
    return not any(inner) or isinstance(given, tuple)


def _split(pair) -> tuple:
    """(text, image) of a pair."""
    if isinstance(pair, Mapping):
        if "text" not in pair or "image" not in pair:
            raise InputError(
                f"CrossEncoder: a pair as a dict has text and image, this one {', '.join(map(str, pair)) or 'nothing'}."
            )
        return pair["text"], pair["image"]
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise InputError(f"CrossEncoder: a pair is (text, image) or a dict with both, got {type(pair).__name__}.")
    first, second = pair
    if _kind(first) == "text":
        if _kind(second, text="image") == "text":
            raise InputError("CrossEncoder: a pair of two texts; ViLT scores a text with an image.")
        return _bare(first), _bare(second)
    if _kind(second) == "text":
        return _bare(second), _bare(first)
    raise InputError("CrossEncoder: a pair of two images; ViLT scores a text with an image.")

"""What the results of a run depend on, so that none is gone on with by another: its fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from .. import __version__
from ..models.base import swap_of
from ..ops import registry
from .workers import autocast


def fingerprint(task, ids, pictures, pairs, processor, options) -> dict[str, str]:
    """{what: a digest} of a run. Of images that all of them are processed inputs no processor is asked for."""
    model, seen = task.model, _Seen()
    seen.add(f"{type(model).__module__}.{type(model).__qualname__} {task.head} {task.why_whole()}")
    for module in model.modules():
        if swapped := swap_of(module):
            seen.add(f"{type(swapped).__name__} {swapped.options.quantize}")
    seen.add(_config(model))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        seen.add(f"{name} {tensor.dtype} {list(tensor.shape)}")
        seen.add(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() if tensor.numel() else "")
    texts, images = _Seen(), _Seen()
    for text in ids:
        texts.add(text.tobytes() + b";")
    for picture in pictures:
        images.add(picture.digest())
    if not all(isinstance(picture.source, Mapping) for picture in pictures):
        made = processor()
        images.add(f"{type(made).__qualname__} {made.to_dict() if hasattr(made, 'to_dict') else made!r}")
    chosen = _Seen()
    chosen.add(f"{options} {autocast()}")
    if pairs is not None:
        chosen.add(pairs.tobytes())
    native = registry.why_unavailable("encoder", "cpp")
    versions = f"vilt_fast {__version__}, torch {torch.__version__}, {task.device.type}, native: {native or 'there'}"
    return {
        "model": seen.digest(), "texts": texts.digest(), "images": images.digest(), "options": chosen.digest(),
        "versions": versions,
    }  # fmt: skip


def _config(model) -> str:
    """The settings of a model and what is in it, of the original those of its `hparams`."""
    found = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    made = [config.to_json_string() for config in found.values() if hasattr(config, "to_json_string")]
    return f"{made} {sorted(getattr(getattr(model, 'hparams', None), 'config', {}).items())}"


class _Seen:
    def __init__(self):
        self._hash = hashlib.blake2b(digest_size=16)
        self.digest = self._hash.hexdigest

    def add(self, part):
        self._hash.update(part.encode() if isinstance(part, str) else part)

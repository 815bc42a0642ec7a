"""HuggingFace's ViLT on pairs of a text and an image that are embedded on their own."""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.vilt import modeling_vilt as hf

from ...engine.genuine import own_methods, why_not_own
from ...engine.listeners import has_hooks, why_hooked
from ..base import wrapper_of
from .inputs import Inputs, Sizes
from .known import known_tables, tables, why_not_known
from .pairs import ViltPairs
from .rows import embed, planned
from .trunk import TrunkForward

#: heads that score a pair: the name in the model, and the class that has it (None: any that has a `ViltModel`)
_HEADS = {
    "rank_output": hf.ViltForImageAndTextRetrieval,
    "classifier": hf.ViltForQuestionAnswering,
    "itm_score": None,
}


def find(model: nn.Module) -> ViltPairs | None:
    """`model` as a task on pairs; None where it is none that is known here."""
    trunk = getattr(model, "vilt", None)
    if not isinstance(trunk, hf.ViltModel):
        return None
    for name, kind in _HEADS.items():
        if isinstance(getattr(model, name, None), nn.Module) and (kind is None or isinstance(model, kind)):
            return TaskPairs(model, name)
    return None


class TaskPairs(ViltPairs):
    """`ViltForImageAndTextRetrieval`, `ViltForQuestionAnswering`, or a `ViltModel` with a head `itm_score`."""

    def __init__(self, model: nn.Module, head: str):
        self.trunk = model.vilt
        super().__init__(model, head, self.trunk, TrunkForward, self.trunk.embeddings.text_embeddings)
        self.answers = head == "classifier"
        self.names = dict(model.config.id2label) if self.answers else {}

    def image(self, pixels, mask):
        found = known_tables(self.trunk.embeddings)
        sizes = Sizes.of(self.trunk.embeddings, found)
        inputs = Inputs(input_ids=self._no_text(), pixel_values=pixels, pixel_mask=mask, tables=found, sizes=sizes)
        inputs._check_image()
        options = self._image_options()
        plan = planned(self.trunk, [inputs], None, options)
        rows, _ = embed(self.trunk, [inputs], plan, options, self._weights())
        return rows

    def whole(self, ids, pixels, mask):
        given = dict(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], pixel_values=pixels)
        given["pixel_mask"] = torch.ones_like(pixels[:, 0], dtype=torch.long) if mask is None else mask
        if _HEADS[self.head] is not None:
            return self.model(**given, return_dict=True).logits
        return getattr(self.model, self.head)(self.trunk(**given, return_dict=True).pooler_output)

    def _why_own(self) -> str:
        model, trunk = self.model, self.trunk
        for module in (model, trunk):
            if has_hooks(module):
                return f"of {type(module).__name__}: {why_hooked(module, inside=False)}"
            if wrapper_of(module, "forward") is not None:
                return f"something is wrapped around the forward of {type(module).__name__}"
        for module in (trunk, *([model] if _HEADS[self.head] is not None else [])):
            if not own_methods(type(module)):
                return why_not_own(type(module))
        return why_not_known(trunk.embeddings)

    def _tables(self):
        return tables(self.trunk.embeddings)

    def _pooled(self, rows, places, *, apart):
        return self._swapped.run_rows(rows, places, self._weights(), reads="pooled", apart=apart).pooled

"""Which rows of the trunk's result an objective reads, where samples of one batch are read in different ways."""

from __future__ import annotations

import dataclasses

import torch

from ...engine.packing import Selection
from .plan import SequencePlan


@dataclasses.dataclass(frozen=True, slots=True)
class Reads:
    """Text tokens of the first samples of a batch, and the other samples whole or just what a pooler reads of them."""

    texts: int  #: how many samples, from the first on, have text tokens read
    labelled: torch.Tensor | None = None  #: bool [texts, T], which of these; None: all that have a row
    whole: bool = False  #: whether all rows of the other samples are read

    def places(self, plan: SequencePlan) -> torch.Tensor:
        """[m] where the text tokens that are read lie in the flattened [texts * T] text, in packed order.

        Those of padding have no row, and are not among them.
        """
        shown = plan.text_places[: plan.texts_of(self.texts)]
        if self.labelled is None:
            return shown
        return shown[self.labelled.flatten().index_select(0, shown)]

    def selection(self, plan: SequencePlan, places: torch.Tensor) -> Selection:
        """The rows that are read: those of text at `places`, in packed order, then those of the other samples."""
        of_place = plan.text_places.new_zeros(plan.batch * plan.text_length)
        of_place = of_place.index_copy(0, plan.text_places, plan.texts.rows)
        rows = of_place.index_select(0, places)
        samples = torch.arange(self.texts + 1, device=plan.device) * plan.text_length
        starts, longest = torch.searchsorted(places, samples).to(torch.int32), plan.text_length
        if self.texts == plan.batch:
            return Selection(rows, starts, longest)
        start, count = sum(plan.lengths[: self.texts]), len(rows)
        if self.whole:
            others = torch.arange(start, plan.total_rows, device=plan.device)
            ends, longest = plan.cu_seqlens[self.texts + 1 :] - start, max(longest, *plan.lengths)
        else:
            others = plan.pool_rows[self.texts :]
            ends = torch.arange(1, len(others) + 1, device=plan.device)
        return Selection(torch.cat([rows, others]), torch.cat([starts, (ends + count).to(torch.int32)]), longest)

    def pool_rows(self, plan: SequencePlan) -> torch.Tensor:
        """Where the row that a pooler reads is in the others, if these are read whole: one a sample."""
        return plan.pool_rows[self.texts :] - sum(plan.lengths[: self.texts])

    def unpack(self, plan: SequencePlan, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(padded [S, width, D] of the other samples, read whole; bool [S, width], where a token is real)."""
        counts = plan.lengths if plan.padding == "reference" else plan.key_lengths
        skipped, width = sum(counts[: self.texts]), plan.width
        places = plan.padded_places[skipped:] - self.texts * width
        rows = others.index_select(0, plan.padded_rows[skipped:] - sum(plan.lengths[: self.texts]))
        samples = plan.batch - self.texts
        padded = rows.new_zeros(samples * width, rows.shape[1]).index_copy(0, places, rows)
        return padded.view(samples, width, -1), plan.key_mask()[self.texts :]

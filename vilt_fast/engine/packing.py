"""Where the rows of a packed batch lie: `Packing`, all that the engine knows about padding.

A packed batch is one `[N, D]` buffer in which the rows of a sample are contiguous. The padded tensor it stands for is
`[B, width, D]`. A sample may end in *query-only* rows: rows that are asked for and that nobody looks at, which in the
padded tensor are masked positions. That is either position 0 alone, which a pooler reads and which is not shown, or all
that are masked, which then are shown like the others.
"""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True, slots=True)
class Spans:
    """What attention needs to know of a packing (see `functional.attention`)."""

    cu_seqlens: torch.Tensor  #: int32 [B + 1]
    seqused_k: torch.Tensor | None  #: int32 [B]; None where every row is a key
    max_seqlen: int


@dataclasses.dataclass(frozen=True, slots=True)
class Selection:
    """Some of the packed rows, sample by sample: those that somebody reads."""

    rows: torch.Tensor  #: int64 [W]
    cu_seqlens: torch.Tensor  #: int32 [B + 1] where those of each sample begin
    max_seqlen: int  #: most rows of a sample


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Packing:
    """Index tensors (int64 unless said) that take a padded batch of B samples to N packed rows and back."""

    width: int  #: rows of a sample in the padded tensor
    lengths: tuple[int, ...]  #: rows of each sample, those that are keys first
    key_lengths: tuple[int, ...]  #: leading rows of each sample that are keys
    cu_seqlens: torch.Tensor  #: int32 [B + 1] row offsets
    seqused_k: torch.Tensor  #: int32 [B], `key_lengths`
    pool_rows: torch.Tensor  #: [B] the row at padded position 0, which a pooler reads
    padded_rows: torch.Tensor  #: [m] packed rows that have a place in the padded output
    padded_places: torch.Tensor  #: [m] that place, in the flattened [B * width]
    dense: bool  #: no padding at all: packed rows are the padded tensor

    @property
    def batch(self) -> int:
        """Number of samples B."""
        return len(self.lengths)

    @property
    def total_rows(self) -> int:
        """Number of packed rows N."""
        return sum(self.lengths)

    @property
    def max_seqlen(self) -> int:
        """Rows of the longest sample."""
        return max(self.lengths)

    @property
    def device(self) -> torch.device:
        """Where the index tensors live."""
        return self.cu_seqlens.device

    @property
    def shows_every_row(self) -> bool:
        """Whether each row has a place in the padded output: then `padded_rows` counts them from 0 on."""
        return len(self.padded_rows) == self.total_rows

    @property
    def spans(self) -> Spans:
        """What attention needs to know."""
        whole = self.lengths == self.key_lengths
        return Spans(self.cu_seqlens, None if whole else self.seqused_k, self.max_seqlen)

    @property
    def pooled(self) -> Selection:
        """The rows that a pooler reads."""
        starts = torch.arange(self.batch + 1, dtype=torch.int32, device=self.device)
        return Selection(self.pool_rows, starts, 1)

    def to(self, device) -> Packing:
        """The same with its index tensors on `device`."""
        device = torch.device(device)
        if device == self.device:
            return self
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in dataclasses.fields(self)
            if isinstance(getattr(self, f.name), torch.Tensor)
        }
        return dataclasses.replace(self, **moved)

    def pack(self, padded: torch.Tensor, made_by: object = None) -> torch.Tensor:
        """Rows `[N, ...]` from a padded `[B, width, ...]`; a query-only row is read from position 0.

        Raises:
            TypeError: the module that it is `made_by` has changed the number of samples or tokens.
        """
        if padded.shape[:2] != (self.batch, self.width):
            raise TypeError(
                f"{type(made_by).__name__} returned {list(padded.shape)} for {self.batch} samples of {self.width} "
                "tokens: accelerate cannot follow a module that adds or drops tokens there. Use vilt_fast.restore."
            )
        flat = padded.flatten(0, 1)
        if self.dense:
            return flat
        rows = flat.new_zeros(self.total_rows, *flat.shape[1:])
        rows = rows.index_copy_(0, self.padded_rows, flat.index_select(0, self.padded_places))
        extra = self._samples_with_query_row()
        return rows if extra is None else rows.index_copy(0, self.pool_rows[extra], padded[extra, 0])

    def unpack(self, rows: torch.Tensor, *, query_rows: bool = False) -> torch.Tensor:
        """Padded `[B, width, ...]` from rows `[N, ...]`; positions without a row are zero.

        With `query_rows`, position 0 holds the query-only row that is not shown, where there is one, as modules that
        are called on the padded tensor expect; `pack` is then the exact inverse.
        """
        if self.dense:
            return rows.reshape(self.batch, self.width, *rows.shape[1:])
        flat = rows.new_zeros(self.batch * self.width, *rows.shape[1:])
        real = rows if self.shows_every_row else rows.index_select(0, self.padded_rows)
        flat = flat.index_copy_(0, self.padded_places, real)
        extra = self._samples_with_query_row() if query_rows else None
        if extra is not None:
            flat = flat.index_copy(0, extra * self.width, rows.index_select(0, self.pool_rows[extra]))
        return flat.unflatten(0, (self.batch, self.width))

    def through_padded(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(padded `[B, width, ...]` of rows `[N, ...]`, the rows read back from it).

        Who goes on with these rows has a gradient with respect to the padded tensor, as a caller who is given that one
        expects of it.
        """
        padded = self.unpack(rows)
        if self.dense:
            return padded, padded.flatten(0, 1)
        again = padded.flatten(0, 1).index_select(0, self.padded_places)
        return padded, rows.index_copy(0, self.padded_rows, again)

    def shown_attentions(self, padded: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Probabilities [B, H, width, width] as a caller sees them: all of them, or a list of parts."""
        return padded

    def _samples_with_query_row(self):
        """The samples that have one which is not shown."""
        if self.shows_every_row:
            return None
        extra = [b for b, (n, k) in enumerate(zip(self.lengths, self.key_lengths, strict=True)) if n > k]
        return torch.tensor(extra, device=self.device) if extra else None

    def key_mask(self) -> torch.Tensor:
        """bool [B, width]: True where a position of the padded tensor is real."""
        sample = self.padded_places // self.width
        real = self.padded_rows - self.cu_seqlens[sample] < self.seqused_k[sample]
        mask = torch.zeros(self.batch * self.width, dtype=torch.bool, device=self.device)
        return mask.index_copy(0, self.padded_places, real).view(self.batch, -1)

    def shown_mask(self) -> torch.Tensor:
        """bool [B, width]: True where a position of the padded tensor has a row, and is not just zero."""
        mask = torch.zeros(self.batch * self.width, dtype=torch.bool, device=self.device)
        return mask.index_fill(0, self.padded_places, True).view(self.batch, -1)

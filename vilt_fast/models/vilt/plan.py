"""Where every token of a batch lies: `SequencePlan`, a `Packing` of texts and images.

A packed batch is one `[N, D]` buffer. The rows of a sample are contiguous:

    [real text tokens ..., image [CLS], patches ..., (query-only rows)]

The image has no [CLS] of its own when it is given as `image_embeds`. Query-only rows are computed as queries and are no
keys to anybody (`key_lengths` is less than `lengths` by them). Where text position 0 is masked there is one for it:
ViLT pools from position 0 whatever the mask says. Under padding="reference" there is one for every padded position,
first those of the text, then those of the image, and all of them have a place in the output.

A plan is made on the host from the two masks (one device-to-host copy) and can be kept and passed again for inputs with
the same masks. It depends on no parameter of the model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from ...engine.packing import Packing, Selection
from ...errors import InputError
from . import patches, placed


def _nothing() -> torch.Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SequencePlan(Packing):
    """A `Packing`, and where texts and images go in it.

    B samples, T padded text width, I padded image width (with [CLS]), N packed rows, n text rows, p patch rows.
    """

    text_length: int  #: T
    image_length: int  #: I
    text_counts: tuple[int, ...]  #: text rows of each sample that have a place in the padded output, m in all
    grids: tuple[tuple[int, int], ...]  #: (h, w) patches of each image; empty for `image_embeds`
    patch_grid: tuple[int, int]  #: (gh, gw) patches of the padded pixel tensor; (1, P) for `image_embeds`
    text_source: torch.Tensor  #: [n] position in the flattened [B * T] text
    text_rows: torch.Tensor  #: [n]
    shown_text: torch.Tensor  #: [m] which of these n have a place in the padded output
    text_starts: torch.Tensor  #: int32 [B + 1] where those of each sample begin among the m
    patch_source: torch.Tensor  #: [p] b * gh * gw + y * gw + x (position in the flattened [B * P] `image_embeds`)
    patch_rows: torch.Tensor  #: [p]
    patch_sample: torch.Tensor  #: [p]
    pos_index: torch.Tensor  #: [p, 4] rows of the whole position table (row 0 is [CLS]); empty for `image_embeds`
    pos_weight: torch.Tensor  #: float32 or float64 [p, 4] bilinear weights
    cls_rows: torch.Tensor  #: [B], or [0] for `image_embeds`
    # Where samples share images; empty where each has its own.
    image_of: torch.Tensor = dataclasses.field(default_factory=_nothing)  #: [B] which image each has
    distinct: torch.Tensor = dataclasses.field(default_factory=_nothing)  #: [d] image * gh * gw + cell, each once
    distinct_of: torch.Tensor = dataclasses.field(default_factory=_nothing)  #: [p] which of these a patch row is
    distinct_at: torch.Tensor = dataclasses.field(default_factory=_nothing)  #: [d] a patch row that is this one
    widths: tuple[int, ...]  #: T + I of each batch that was concatenated into this plan (one unless NLVR2)
    padding: str  #: "zero", or "reference" where every padded position has a row
    in_order: bool = False  #: whether `patch_source` counts 0, 1, ... B * gh * gw - 1

    @property
    def layout(self) -> tuple:
        """(B, T, patch grid, whether images have a [CLS]): what inputs must look like to be packed by this plan."""
        return self.batch, self.text_length, self.patch_grid, len(self.cls_rows) > 0

    @property
    def texts(self) -> Selection:
        """The text rows that have a place in the padded output."""
        return Selection(self.text_rows.index_select(0, self.shown_text), self.text_starts, self.text_length)

    @property
    def text_places(self) -> torch.Tensor:
        """[m] position of each row of `texts` in the flattened [B * T] text."""
        return self.text_source.index_select(0, self.shown_text)

    def texts_of(self, samples: int) -> int:
        """How many of `texts` are those of so many samples, from the first on."""
        return sum(self.text_counts[:samples])

    def __getstate__(self):
        # On a GPU they are views of one storage, of several dtypes, which torch does not save.
        return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in self.__dict__.items()}

    def patch_positions(self, sample: int) -> torch.Tensor:
        """(y, x) of each patch row of one sample, in packed order (padding last): int64 [patches, 2]."""
        height, width = self.patch_grid
        source = self.patch_source[self.patch_sample == sample] % (height * width)
        return torch.stack([source // width, source % width], dim=-1)

    def split(self, padded: torch.Tensor) -> list[torch.Tensor]:
        """A padded tensor [B, T + I, ...] as one tensor for each concatenated batch, at its own width."""
        parts = padded.chunk(len(self.widths))
        return [part[:, :width] for part, width in zip(parts, self.widths, strict=True)]

    def joined(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The exact inverse of `split`."""
        return torch.cat([F.pad(part, (0, 0, 0, self.width - part.shape[1])) for part in parts])

    def through_padded(self, rows: torch.Tensor) -> tuple[torch.Tensor | list[torch.Tensor], torch.Tensor]:
        """As of any packing; several batches are shown as a list, each at its own width."""
        if len(self.widths) == 1:
            return super().through_padded(rows)
        parts = self.split(self.unpack(rows))
        again = self.joined(parts).flatten(0, 1).index_select(0, self.padded_places)
        return parts, rows.index_copy(0, self.padded_rows, again)

    def shown_attentions(self, padded: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        if len(self.widths) == 1:
            return padded
        parts = padded.chunk(len(self.widths))
        return [part[:, :, :width, :width] for part, width in zip(parts, self.widths, strict=True)]

    def raster(self, rows: torch.Tensor) -> tuple[SequencePlan, torch.Tensor]:
        """This plan and its rows [N, D] with the patches of each image put in raster order, and so those beside it."""
        cells = self.patch_grid[0] * self.patch_grid[1]
        image, cell = self.patch_source // cells, self.patch_source % cells
        ahead = self.patch_rows - self.cu_seqlens[self.patch_sample]
        order = torch.argsort((2 * image + (ahead >= self.seqused_k[self.patch_sample])) * cells + cell)
        moved = ("patch_source", "pos_index", "pos_weight")
        plan = dataclasses.replace(self, **{name: getattr(self, name)[order] for name in moved})
        return plan, rows.index_copy(0, self.patch_rows, rows[self.patch_rows[order]])

    @staticmethod
    @torch.compiler.disable  # host work: traced, its draws would be reordered or dropped
    def from_masks(
        attention_mask: torch.Tensor | None,
        pixel_mask: torch.Tensor | None,
        *,
        text_shape: Sequence[int],
        pixel_shape: Sequence[int],
        patch_size: Sequence[int],
        position_grid: int,
        max_image_length: int | None = -1,
        patch_order: str = "raster",
        generator: torch.Generator | None = None,
        padding: str = "zero",
        cells: tuple[Sequence[np.ndarray], Sequence[np.ndarray]] | None = None,
        position_dtype: torch.dtype = torch.float32,
        image_of: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> SequencePlan:
        """Plan for text and pixels.

        Args:
            attention_mask: [B, T] any dtype, non-zero where real; None for no padding. Holes are allowed.
            pixel_mask: [B, h, w] at any resolution, 1 on the image (a rectangle from the top left corner) and 0
                elsewhere; it is sampled once per patch, as the reference does (nearest). None for no padding.
            text_shape: (B, T).
            pixel_shape: (B, C, H, W) of the pixel tensor, or (images, C, H, W) with `image_of`.
            patch_size: (patch height, patch width).
            position_grid: side G of the square position table.
            max_image_length: a positive number keeps at most so many patches of an image, drawn without replacement;
                None or a negative number keeps all.
            patch_order: "raster", or "reference" for the draws of the reference under the same torch seed.
            generator: for the draws under "raster".
            padding: "zero", or "reference" to give rows to padded positions too. Of an image these are patches beside
                it, as many as it has less than the longest: under patch_order "reference" those that the reference
                draws, under "raster" spread evenly over all that are beside it.
            cells: y * gw + x of the kept patches of each image, in order, where they are already drawn, and of those
                beside it.
            position_dtype: of the bilinear weights, float64 for a float64 model and float32 otherwise.
            image_of: which image each of the B samples has, where several share one; `patch_source` counts samples
                all the same.
            device: of the index tensors; that of the masks by default.

        Raises:
            InputError: wrong shapes, a mask that is no anchored rectangle of 0 and 1, an image without patches, or
                `max_image_length` 0.
        """
        text = _real_text(attention_mask, text_shape)
        batch, _, height, width = pixel_shape
        grid = (height // patch_size[0], width // patch_size[1])
        if min(grid) < 1:
            raise InputError(
                f"pixel_values of {height}x{width} hold no whole patch of {patch_size[0]}x{patch_size[1]}: "
                "resize the image."
            )
        grids = patches.patch_grids(pixel_mask, batch, grid)
        if image_of is not None:
            grids = tuple(grids[image] for image in image_of)
        if cells is None:
            fill = padding == "reference"
            cells = patches.choose_patches(grids, grid, max_image_length, patch_order, generator, fill)
        if device is None:
            masks = [m for m in (attention_mask, pixel_mask) if m is not None]
            device = masks[0].device if masks else "cpu"
        device = torch.device(device)
        # A copy that one stream has ordered may not have arrived when another looks.
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        return _with_pixels(
            text.tobytes(), text.shape, *map(_frozen, cells), grids, grid, position_grid,
            position_dtype == torch.float64, padding, None if image_of is None else tuple(image_of), device, stream,
        )  # fmt: skip

    @staticmethod
    @torch.compiler.disable
    def from_keep_mask(
        attention_mask: torch.Tensor | None,
        keep: torch.Tensor,
        *,
        text_shape: Sequence[int],
        padding: str = "zero",
        device: torch.device | str | None = None,
    ) -> SequencePlan:
        """Plan for text and ready image embeddings; `keep` [B, P] is non-zero where a token is real (holes allowed).

        `padding` is that of `from_masks`.

        Raises:
            InputError: wrong shapes, or a sample without a single real token.
        """
        text = _real_text(attention_mask, text_shape)
        if keep.ndim != 2 or keep.shape[0] != text_shape[0]:
            raise InputError(f"the keep-mask of image_embeds must be [{text_shape[0]}, P], got {list(keep.shape)}.")
        real = (keep != 0).cpu().numpy()
        if empty := np.flatnonzero(~text.any(1) & ~real.any(1)).tolist():
            raise InputError(f"samples {empty} have neither a real text token nor a real image token.")
        device = keep.device if device is None else device
        cells = _positions(real), _positions(~real & (padding == "reference"))
        return _assemble(text, cells, (1, keep.shape[1]), keep.shape[1], (), None, False, padding, device=device)

    @staticmethod
    @torch.compiler.disable
    def concatenate(plans: Sequence[SequencePlan], source_stride: int = 1) -> SequencePlan:
        """One plan for several packed batches laid end to end (NLVR2: the same text with each image).

        All plans share the text, so `text_source` is not shifted. Image i of sample b is looked up at
        `b * source_stride + i` of the flattened images (`source_stride` = images a sample).
        The padded layout is as wide as the widest plan; `widths` remembers each one's own.
        """
        cells = plans[0].patch_grid[0] * plans[0].patch_grid[1]
        rows = np.cumsum([0] + [p.total_rows for p in plans]).tolist()
        samples = np.cumsum([0] + [p.batch for p in plans]).tolist()
        texts = np.cumsum([0] + [len(p.text_rows) for p in plans]).tolist()
        shown = np.cumsum([0] + [len(p.shown_text) for p in plans]).tolist()

        def joined(name, offsets=None):
            parts = [getattr(p, name) for p in plans]
            return torch.cat([t + offsets[i] for i, t in enumerate(parts)] if offsets else parts)

        widths = tuple(p.width for p in plans)
        sources, places = [], []
        for i, plan in enumerate(plans):
            sample, place = plan.padded_places // widths[i], plan.padded_places % widths[i]
            places.append((sample + samples[i]) * max(widths) + place)
            sample, cell = plan.patch_source // cells, plan.patch_source % cells
            sources.append((sample * source_stride + i) * cells + cell)
        cu_seqlens = [p.cu_seqlens[1:] + rows[i] for i, p in enumerate(plans)]
        text_starts = [p.text_starts[1:] + shown[i] for i, p in enumerate(plans)]
        return SequencePlan(
            width=max(widths),
            text_length=plans[0].text_length,
            image_length=max(p.image_length for p in plans),
            lengths=sum((p.lengths for p in plans), ()),
            key_lengths=sum((p.key_lengths for p in plans), ()),
            text_counts=sum((p.text_counts for p in plans), ()),
            grids=sum((p.grids for p in plans), ()),
            patch_grid=plans[0].patch_grid,
            cu_seqlens=torch.cat([plans[0].cu_seqlens[:1], *cu_seqlens]),
            seqused_k=joined("seqused_k"),
            text_source=joined("text_source"),
            text_rows=joined("text_rows", rows),
            shown_text=joined("shown_text", texts),
            text_starts=torch.cat([plans[0].text_starts[:1], *text_starts]),
            patch_source=torch.cat(sources),
            patch_rows=joined("patch_rows", rows),
            patch_sample=joined("patch_sample", samples),
            pos_index=joined("pos_index"),
            pos_weight=joined("pos_weight"),
            cls_rows=joined("cls_rows", rows),
            pool_rows=joined("pool_rows", rows),
            padded_rows=joined("padded_rows", rows),
            padded_places=torch.cat(places),
            dense=all(p.dense for p in plans) and len(set(widths)) == 1,
            widths=widths,
            padding=plans[0].padding,
        )


def _real_text(attention_mask, text_shape) -> np.ndarray:
    """bool [B, T]: the real text positions."""
    batch, length = text_shape
    if batch < 1:
        raise InputError("the batch is empty: ViLT needs at least one sample.")
    if attention_mask is None:
        return np.ones((batch, length), bool)
    if tuple(attention_mask.shape) != (batch, length):
        raise InputError(f"attention_mask must be [{batch}, {length}] like the text, got {list(attention_mask.shape)}.")
    return (attention_mask != 0).cpu().numpy()


def _positions(mask: np.ndarray) -> list[np.ndarray]:
    """Where each row of a mask is True."""
    return [np.flatnonzero(row) for row in mask]


def _frozen(arrays) -> tuple[bytes, ...]:
    return tuple(np.ascontiguousarray(a, np.int64).tobytes() for a in arrays)


@functools.lru_cache(maxsize=32)  # a server sees the same sizes again and again, and making a plan takes a while
def _with_pixels(
    text, text_shape, cells, beside, grids, grid, position_grid, exact, padding, image_of, device, stream
) -> SequencePlan:
    """The plan of text (the bytes of a mask) and patches (those of the cells of each image and beside it, int64)."""
    text = np.frombuffer(text, bool).reshape(text_shape)
    cells, beside = ([np.frombuffer(c, np.int64) for c in of] for of in (cells, beside))
    index, weight = [], []
    for (h, w), own, others in zip(grids, cells, beside, strict=True):
        at, share = patches.bilinear(h, w, position_grid, grid[1], exact)
        index.append(at[own])
        weight.append(share[own])
        if len(others):  # beside an image a patch has no position
            index.append(np.zeros((len(others), 4), np.int64))
            weight.append(np.zeros((len(others), 4), share.dtype))
    positions = np.concatenate(index), np.concatenate(weight)
    longest = max(map(len, cells))
    laid = (text, (cells, beside), grid, longest, grids, positions, True, padding, image_of)
    return _assemble(*laid, device=device)


def _assemble(*laid, device) -> SequencePlan:
    """A plan of what `placed.laid_out` makes of `laid`."""
    fields, arrays = placed.laid_out(*laid)
    return SequencePlan(**fields, **placed.on_device(arrays, torch.device(device)))

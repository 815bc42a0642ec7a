"""Where the rows of a `SequencePlan` lie, made on the host with NumPy, and its way onto a device."""

from __future__ import annotations

import numpy as np
import torch

from ...errors import InputError

PADDING = ("zero", "reference")  #: what a per-token output may hold at padded positions


def laid_out(text, cells, grid, image_tokens, grids, positions, has_cls, padding, image_of=None) -> tuple[dict, dict]:
    """The samples end to end: (the fields of a `SequencePlan` that are no tensors, those that are, as arrays).

    `text` is bool [B, T], `cells` are the real ones of each image and the padded ones.
    """
    if padding not in PADDING:
        raise InputError(f"padding must be 'zero' or 'reference', got {padding!r}.")
    text_length = text.shape[1]
    head = 1 if has_cls else 0
    image_length = image_tokens + head
    width = text_length + image_length
    area = grid[0] * grid[1]
    shown = padding == "reference"
    text_source, text_rows, patch_source, patch_rows, patch_sample = [], [], [], [], []
    shown_text, text_counts = [], []
    cls_rows, pool_rows, padded_rows, places = [], [], [], []
    lengths, key_lengths = [], []
    start = listed = 0
    for b, (p, p_padded) in enumerate(zip(*cells, strict=True)):
        t = np.flatnonzero(text[b])
        pooled = bool(text[b, 0]) if text_length else has_cls or (len(p) > 0 and p[0] == 0)
        if not (pooled or text_length or shown):
            raise InputError(
                f"sample {b} has no text and its first image token is masked: there is nothing to pool from."
            )
        t_padded = np.flatnonzero(~text[b]) if shown else np.zeros(int(not pooled), np.int64)
        keys = len(t) + head + len(p)
        rows = keys + len(t_padded) + len(p_padded)
        image = np.arange(head + len(p)) if has_cls else p
        text_source.append(b * text_length + t)
        text_rows.append(start + np.arange(len(t)))
        cls_rows.append(start + len(t))
        patch_source.append(b * area + p)
        patch_rows.append(start + len(t) + head + np.arange(len(p)))
        pool_rows.append(start if pooled else start + keys)
        places += [b * width + t, b * width + text_length + image]
        if len(t_padded):
            text_source.append(b * text_length + t_padded)
            text_rows.append(start + keys + np.arange(len(t_padded)))
        if len(p_padded):
            patch_source.append(b * area + p_padded)
            patch_rows.append(start + rows - len(p_padded) + np.arange(len(p_padded)))
        if shown:  # patches lie beside each other from [CLS] on, the padded ones last; ready embeddings where they were
            beside = head + len(p) + np.arange(len(p_padded)) if has_cls else p_padded
            places += [b * width + t_padded, b * width + text_length + beside]
        patch_sample.append(np.full(len(p) + len(p_padded), b))
        padded_rows.append(start + np.arange(rows if shown else keys))
        lengths.append(rows)
        key_lengths.append(keys)
        text_counts.append(len(t) + (len(t_padded) if shown else 0))
        shown_text.append(listed + np.arange(text_counts[-1]))
        listed += len(t) + len(t_padded)
        start += rows

    index, weight = positions if positions is not None else (np.zeros((0, 4), np.int64), np.zeros((0, 4), np.float32))
    host = {
        "cu_seqlens": np.cumsum([0, *lengths], dtype=np.int32),
        "seqused_k": np.array(key_lengths, np.int32),
        "text_source": np.concatenate(text_source),
        "text_rows": np.concatenate(text_rows),
        "shown_text": np.concatenate(shown_text),
        "text_starts": np.cumsum([0, *text_counts], dtype=np.int32),
        "patch_source": np.concatenate(patch_source),
        "patch_rows": np.concatenate(patch_rows),
        "patch_sample": np.concatenate(patch_sample),
        "pos_index": index,
        "pos_weight": weight,
        "cls_rows": np.array(cls_rows if has_cls else [], np.int64),
        "pool_rows": np.array(pool_rows, np.int64),
        "padded_rows": np.concatenate(padded_rows),
        "padded_places": np.concatenate(places),
    }
    if image_of is not None:
        host["image_of"] = np.array(image_of, np.int64)
        cell = host["image_of"][host["patch_sample"]] * area + host["patch_source"] % area
        host["distinct"], host["distinct_at"], host["distinct_of"] = np.unique(
            cell, return_index=True, return_inverse=True
        )
    fields = dict(
        width=width, text_length=text_length, image_length=image_length, lengths=tuple(lengths),
        key_lengths=tuple(key_lengths), text_counts=tuple(map(int, text_counts)), grids=tuple(grids),
        patch_grid=tuple(grid), widths=(width,), padding=padding,
        dense=start == len(text) * width and lengths == key_lengths and _in_order(places),
        in_order=sum(map(len, patch_source)) == len(text) * area and _in_order(patch_source),
    )  # fmt: skip
    return fields, host


def on_device(arrays: dict[str, np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
    """The arrays as tensors on `device`, by one copy that nobody waits for; good for autograd in any case."""
    if device.type == "cpu":
        with torch.inference_mode(False):
            return {name: torch.from_numpy(np.array(array, order="C")) for name, array in arrays.items()}
    starts, size = [], 0
    for array in arrays.values():
        starts.append(size)
        size += -(-array.nbytes // 16) * 16
    with torch.inference_mode(False):
        whole = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        host = whole.numpy()
        for array, start in zip(arrays.values(), starts, strict=True):
            host[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        whole = whole.to(device, non_blocking=True)
        return {
            name: whole[start : start + array.nbytes].view(_DTYPES[array.dtype.name]).view(array.shape)
            for (name, array), start in zip(arrays.items(), starts, strict=True)
        }


_DTYPES = {name: getattr(torch, name) for name in ("int32", "int64", "float32", "float64")}


def _in_order(places) -> bool:
    flat = np.concatenate(places)
    return bool((flat == np.arange(len(flat))).all())

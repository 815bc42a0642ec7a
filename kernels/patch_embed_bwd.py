"""Gradients of patch_embed.py, whose shapes and helpers these are: g [N, D] is the gradient of the packed rows.

  `_patch_embed_bwd_dropout_kernel`  gradient of the image rows through the dropout (skipped without dropout).
  `_patch_embed_bwd_weight_kernel`   dW[D, K] = sum_i g_i^T patch_i, patches read from the pixels as there.
  `_patch_embed_bwd_table_kernel`    all tables at once, deterministic and without a sort: the scatter
      d table[t] = sum_i S[t, i] g_i is a product of tensor cores, S built in registers from pos_index and pos_weight.
      Its rows t: position (T), bias, cls_token; in a second launch modality, which is not behind the dropout.
  pixels and text rows: cuBLAS and index_add, a gather; both are rarely or cheaply needed.
Workspaces [splits, ...] are summed by torch in a fixed order. No atomics on a gradient, no host synchronisation.
Zeros are multiplied too: a NaN in one row of g reaches all rows of a table, not only those that it hits.
"""

import torch
import triton
import triton.language as tl

from . import _device, _tiles
from .patch_embed import BATCHES, ROWS, aot_case, aot_targets, geometry, load_patches, patch_starts, small
from .patch_embed import supports as supports

# --- device side ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n", "B"])
def _patch_embed_bwd_dropout_kernel(
    grad, masked, patch_rows, cls_rows, seed, n, B, p, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    j = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_N
    cols = first + tl.arange(0, BLOCK_N)
    row = tl.load(patch_rows + j, mask=j < n, other=0) + tl.load(cls_rows + j - n, mask=(j >= n) & (j < n + B), other=0)
    mask = (j < n + B)[:, None] & (cols < D)[None, :]
    at = row[:, None] * D + cols[None, :]
    g = _tiles.dropout(tl.load(grad + at, mask=mask, other=0).to(tl.float32), seed, row, first, p)
    tl.store(masked + at, g.to(masked.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n", "gh", "gw"])
def _patch_embed_bwd_weight_kernel(
    grad, rows, pixels, scale, shift, source, out, n, gh, gw, stride_b, stride_c, stride_h, stride_w,
    D: tl.constexpr, K: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, NORMALIZE: tl.constexpr, SPLITS: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[split, D, K], tile [BLOCK_N, BLOCK_K], summing over the patches BLOCK_M at a time."""
    # Blocks of D vary fastest: programs that run together read the same columns of the pixels.
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    span = tl.cdiv(tl.cdiv(n, SPLITS), BLOCK_M) * BLOCK_M
    first = tl.program_id(2) * span
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(first, tl.minimum(first + span, n), BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        near = tl.minimum(i, n - 1)
        starts = patch_starts(source, near, gh, gw, stride_b, stride_h, stride_w, PH, PW)
        a = load_patches(
            pixels, starts, k, scale, shift, stride_c, stride_h, stride_w, K, PH, PW, NORMALIZE, K % BLOCK_K == 0,
            DTYPE,
        )  # fmt: skip
        at = tl.load(rows + near)[:, None] * D + cols[None, :]
        g = tl.load(grad + at, mask=(i < n)[:, None] & (cols < D)[None, :], other=0).to(DTYPE)
        acc = tl.dot(tl.trans(g), a, acc, input_precision=PRECISION)
    tile = out + tl.program_id(2).to(tl.int64) * D * K
    mask = (cols < D)[:, None] & (k < K)[None, :]
    tl.store(tile + cols[:, None] * K + k[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n", "B"])
def _patch_embed_bwd_table_kernel(
    grad, patch_rows, cls_rows, sample, pos_index, pos_weight, modality_index, sums, n, B, T, table_rows,
    D: tl.constexpr, MODALITY: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """sums[split, table_rows, D] = sum_j S[t, j] grad[row of j] over the n patches and B [CLS] of a split.

    Rows t: 0..T-1 position, T bias, T + 1 cls_token; with MODALITY the rows of that table.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    span = tl.cdiv(tl.cdiv(n + B, tl.num_programs(2)), BLOCK_M) * BLOCK_M
    first = tl.program_id(2) * span
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for start in range(first, tl.minimum(first + span, n + B), BLOCK_M):
        j = start + tl.arange(0, BLOCK_M)
        patch, cls = j < n, (j >= n) & (j < n + B)
        if MODALITY:
            b = tl.load(sample + j, mask=patch, other=0) + tl.where(cls, j - n, 0)
            kind = tl.load(modality_index + b, mask=patch | cls, other=-1)
            s = tl.where(t[:, None] == kind[None, :], 1.0, 0.0)
        else:
            s = tl.where((t == T)[:, None] & patch[None, :], 1.0, 0.0)
            s += tl.where(((t == 0) | (t == T + 1))[:, None] & cls[None, :], 1.0, 0.0)
            for corner in tl.static_range(4):
                at = tl.load(pos_index + j * 4 + corner, mask=patch, other=-1)
                share = tl.load(pos_weight + j * 4 + corner, mask=patch, other=0).to(tl.float32)
                s += tl.where(t[:, None] == at[None, :], share[None, :], 0.0)
        row = tl.load(patch_rows + j, mask=patch, other=0) + tl.load(cls_rows + j - n, mask=cls, other=0)
        mask = (patch | cls)[:, None] & (cols < D)[None, :]
        g = tl.load(grad + row[:, None] * D + cols[None, :], mask=mask, other=0).to(tl.float32)
        acc = tl.dot(s, g, acc, input_precision=PRECISION)
    tile = sums + tl.program_id(2).to(tl.int64) * table_rows * D
    mask = (t < table_rows)[:, None] & (cols < D)[None, :]
    tl.store(tile + t[:, None] * D + cols[None, :], acc, mask=mask)


# --- host side --------------------------------------------------------------------------------------------------------


def weight_config(n, dtype, little):
    """Tiles of the weight gradient, which is [D, K] whatever n is: splits only where n is long."""
    splits = 4 if n > 4096 else 1
    if dtype == torch.float32:
        return dict(BLOCK_M=32, BLOCK_N=64, BLOCK_K=64, SPLITS=splits, num_warps=4, num_stages=2)
    if little:
        return dict(BLOCK_M=32, BLOCK_N=64, BLOCK_K=128, SPLITS=splits, num_warps=4, num_stages=2)
    return dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=128, SPLITS=splits, num_warps=8, num_stages=3)


def _element(dtype):
    return getattr(tl, str(dtype).removeprefix("torch."))


TABLE = dict(BLOCK_T=64, BLOCK_M=32, BLOCK_N=64, num_warps=8, num_stages=2)


def patch_embed_bwd(
    *, needs, grad_rows, pixels, weight, bias, cls_token, position, modality, text, text_rows, patch_source, patch_rows,
    patch_sample, pos_index, pos_weight, cls_rows, modality_index, dropout_p, pixel_scale, pixel_shift, seed,
):  # fmt: skip
    grad = grad_rows
    n, images, width, arch = len(patch_rows), len(cls_rows), weight.shape[0], _device.arch(grad)
    grad, patch_source, patch_rows, patch_sample, pos_index, pos_weight, cls_rows, modality_index = _tiles.dense(
        grad, patch_source, patch_rows, patch_sample, pos_index, pos_weight, cls_rows, modality_index
    )
    need_pixels, need_weight, need_bias, need_cls, need_position, need_modality, need_text = needs
    tables = [t.dtype for t in (weight, cls_token, position, modality) if t is not None]
    behind = grad  # the gradient behind the dropout
    if dropout_p > 0 and n + images:
        wide = torch.float32 if torch.float32 in tables else grad.dtype
        behind = torch.empty_like(grad, dtype=wide)
        grid = (_tiles.cdiv(n + images, ROWS["BLOCK_M"]), _tiles.cdiv(width, ROWS["BLOCK_N"]))
        with _device.on(grad):
            _patch_embed_bwd_dropout_kernel[grid](
                grad, behind, patch_rows, cls_rows, seed, n, images, dropout_p, D=width, **ROWS
            )

    d_pixels = d_weight = d_bias = d_cls = d_position = d_modality = d_text = None
    if need_text:
        d_text = grad.index_select(0, text_rows).to(text.dtype)
    if need_pixels:
        d_pixels = _pixel_gradient(behind.index_select(0, patch_rows).to(weight.dtype), pixels, weight, patch_source)
    if need_weight:
        config = weight_config(n, weight.dtype, small(arch))
        strides, patch = geometry(pixels, weight)
        splits = config["SPLITS"]
        make = torch.empty if n else torch.zeros
        d_weight = make(splits, *weight.shape, dtype=torch.float32 if splits > 1 else weight.dtype, device=grad.device)
        if n and width:
            grid = (_tiles.cdiv(width, config["BLOCK_N"]), _tiles.cdiv(patch["K"], config["BLOCK_K"]), splits)
            with _device.on(grad):
                _patch_embed_bwd_weight_kernel[grid](
                    behind, patch_rows, pixels, pixel_scale, pixel_shift, patch_source, d_weight, n, *strides,
                    D=width, **patch, NORMALIZE=pixel_scale is not None, PRECISION=_device.precision(arch),
                    DTYPE=_element(weight.dtype), **config,
                )  # fmt: skip
        d_weight = (d_weight.sum(0) if splits > 1 else d_weight[0]).to(weight.dtype)

    def table_sums(rows_grad, table_rows, in_modality):
        splits = min(max(_tiles.cdiv(n + images, 1024), 1), 16)
        out = torch.empty(splits, table_rows, width, dtype=torch.float32, device=grad.device)
        grid = (_tiles.cdiv(table_rows, TABLE["BLOCK_T"]), _tiles.cdiv(width, TABLE["BLOCK_N"]), splits)
        with _device.on(grad):
            _patch_embed_bwd_table_kernel[grid](
                rows_grad, patch_rows, cls_rows, patch_sample, pos_index, pos_weight, modality_index, out, n, images,
                len(position), table_rows, D=width, MODALITY=in_modality,
                PRECISION=_device.precision(arch, *tables), **TABLE,
            )  # fmt: skip
        return out.sum(0)

    if need_modality:
        d_modality = table_sums(grad, len(modality), True).to(modality.dtype)
    if need_bias or need_cls or need_position:
        sums = table_sums(behind, len(position) + 2, False)  # copies: outputs of an op must not share memory
        d_position = sums[:-2].to(position.dtype, copy=True)
        d_bias = None if bias is None else sums[-2].to(bias.dtype, copy=True)
        d_cls = sums[-1].to(cls_token.dtype, copy=True)
    return (d_pixels, d_weight, d_bias, d_cls, d_position, d_modality, d_text), ()


def _pixel_gradient(g, pixels, weight, source):
    """[B, C, height, width] from the gradients g [n, D] of the projected patches."""
    batch, channels, height, width = pixels.shape
    (gh, gw, *_), patch = geometry(pixels, weight)
    cells = g.new_zeros(batch * gh * gw, patch["K"]).index_add_(0, source, g @ weight.flatten(1))
    cells = cells.reshape(batch, gh, gw, channels, patch["PH"], patch["PW"]).permute(0, 3, 1, 4, 2, 5)
    out = torch.zeros_like(pixels, memory_format=torch.contiguous_format)
    out[:, :, : gh * patch["PH"], : gw * patch["PW"]] = cells.reshape(
        batch, channels, gh * patch["PH"], gw * patch["PW"]
    )
    return out


# --- what is compiled ahead of time in our checks ---------------------------------------------------------------------


def aot_cases():
    """Every shipped configuration on ViLT's shapes, as in patch_embed.py."""
    for dtype, short, little, precision, targets in aot_targets():
        product = dict(targets=targets, matmul=True)
        for n in BATCHES[1:]:
            config = weight_config(n, dtype, little)
            types = dict(scale=None, shift=None, out="*fp32" if config["SPLITS"] > 1 else f"*{short}")
            config |= dict(NORMALIZE=False, PRECISION=precision, DTYPE=_element(dtype))
            yield aot_case(_patch_embed_bwd_weight_kernel, f"bwd_weight n={n}", short, config, **product, **types)
        for modality in (False, True):
            config = TABLE | dict(MODALITY=modality, PRECISION=_device.precision(targets[0].arch, dtype))
            name = f"bwd_table {'modality' if modality else 'position'}"
            yield aot_case(_patch_embed_bwd_table_kernel, name, short, config, **product)
        yield aot_case(_patch_embed_bwd_dropout_kernel, "bwd_dropout", short, ROWS, targets=targets)

"""Image half of ViLT's embedding, written with the text rows into one packed buffer [N, D].

    patch row = dropout(W . patch + bias + sum_c w_c * position[i_c]) + modality[m]      c over the 4 bilinear corners
    CLS row   = dropout(cls_token + position[0])                      + modality[m]
    text row  = copied

Shapes as in `functional.patch_embed`: pixels [B, C, height, width] of any strides, weight [D, K] with K = C*ph*pw,
n listed patches, T = 1 + G table rows.

Forward. `_patch_embed_fwd_kernel` is the product [n, K] x [K, D]. There is no im2col: a tile of patches is an address
per row (the patch's top left pixel) plus an address per column (channel, y, x), read straight from the pixels,
normalised (uint8) and cast on the way in. With one split it finishes its rows itself. At batch 1 there are too few
tiles for a GPU, so K is split; the partial sums go to a workspace [splits, n, D] and `_patch_embed_rows_kernel`, which
writes the [CLS] and text rows anyway, adds them up in a fixed order and finishes the patch rows too.

Backward: patch_embed_bwd.py. Nothing is kept for it but the inputs and the dropout seed.

Products run in tensor cores in the dtype of `weight` (float32: three tf32 products, "tf32x3", on NVIDIA; "ieee"
elsewhere) and accumulate in float32, everything else is float32.
"""

import torch
import triton
import triton.language as tl

from . import _aot, _device, _tiles

# --- device side ------------------------------------------------------------------------------------------------------


@triton.jit
def patch_starts(source, i, gh, gw, stride_b, stride_h, stride_w, PH: tl.constexpr, PW: tl.constexpr):
    """Offset of the top left pixel of patches i."""
    flat = tl.load(source + i)
    cell = flat % (gh * gw)
    return (flat // (gh * gw)) * stride_b + (cell // gw) * PH * stride_h + (cell % gw) * PW * stride_w


@triton.jit
def load_patches(
    pixels, starts, k, scale, shift, stride_c, stride_h, stride_w, K: tl.constexpr, PH: tl.constexpr,
    PW: tl.constexpr, NORMALIZE: tl.constexpr, EVEN: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Columns k of the patches that begin at `starts`, [len(starts), len(k)] in `dtype`."""
    c = k // (PH * PW)
    offsets = c.to(tl.int64) * stride_c + (k // PW % PH).to(tl.int64) * stride_h + (k % PW) * stride_w
    where = pixels + starts[:, None] + offsets[None, :]
    if EVEN:
        values = tl.load(where)
    else:
        values = tl.load(where, mask=k[None, :] < K, other=0)
    if NORMALIZE:
        inside = k < K
        values = values.to(tl.float32) * tl.load(scale + c, mask=inside, other=0).to(tl.float32)[None, :]
        values += tl.load(shift + c, mask=inside, other=0).to(tl.float32)[None, :]
    return values.to(dtype)


@triton.jit
def _finish_patches(
    x, i, first, bias, position, modality, rows, sample, pos_index, pos_weight, modality_index, seed, out, n, D, p,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Adds all that a patch row is besides its projection x (float32, from column `first` on), and writes it."""
    cols = first + tl.arange(0, x.shape[1])
    live, real = i < n, cols < D
    mask = live[:, None] & real[None, :]
    if HAS_BIAS:
        x += tl.load(bias + cols, mask=real, other=0).to(tl.float32)[None, :]
    for corner in range(4):
        at = tl.load(pos_index + i * 4 + corner, mask=live, other=0)
        share = tl.load(pos_weight + i * 4 + corner, mask=live, other=0).to(tl.float32)
        x += share[:, None] * tl.load(position + at[:, None] * D + cols[None, :], mask=mask, other=0).to(tl.float32)
    to = tl.load(rows + i, mask=live, other=0)
    if DROPOUT:
        x = _tiles.dropout(x, seed, to, first, p)
    if modality is not None:
        kind = tl.load(modality_index + tl.load(sample + i, mask=live, other=0), mask=live, other=0)
        x += tl.load(modality + kind[:, None] * D + cols[None, :], mask=mask, other=0).to(tl.float32)
    tl.store(out + to[:, None] * D + cols[None, :], x.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n", "gh", "gw"])
def _patch_embed_fwd_kernel(
    pixels, weight, scale, shift, source, bias, position, modality, rows, sample, pos_index, pos_weight,
    modality_index, seed, out, partial, n, gh, gw, stride_b, stride_c, stride_h, stride_w, p,
    D: tl.constexpr, K: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, HAS_BIAS: tl.constexpr,
    NORMALIZE: tl.constexpr, DROPOUT: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Column blocks vary fastest: programs that run together read the same patches, and all weights fit in the L2 cache.
    i = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    SPAN: tl.constexpr = (K + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K
    EVEN: tl.constexpr = K % (SPLITS * BLOCK_K) == 0
    first = tl.program_id(2) * SPAN
    # Rows past the end repeat the last one and are not written: no masks inside the loop.
    starts = patch_starts(source, tl.minimum(i, n - 1), gh, gw, stride_b, stride_h, stride_w, PH, PW)
    w_rows = weight + tl.minimum(cols, D - 1).to(tl.int64) * K
    x = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, SPAN, BLOCK_K):
        k = first + step + tl.arange(0, BLOCK_K)
        a = load_patches(
            pixels, starts, k, scale, shift, stride_c, stride_h, stride_w, K, PH, PW, NORMALIZE, EVEN,
            weight.dtype.element_ty,
        )  # fmt: skip
        if EVEN:
            w = tl.load(w_rows[None, :] + k[:, None])
        else:
            w = tl.load(w_rows[None, :] + k[:, None], mask=k[:, None] < K, other=0)
        x = tl.dot(a, w, x, input_precision=PRECISION)
    if SPLITS == 1:
        # In four column slices: the gathers of a whole tile at once would not fit in registers.
        left, right = _tiles.halves(x)
        slices = _tiles.halves(left) + _tiles.halves(right)
        for s in tl.static_range(4):
            _finish_patches(
                slices[s], i, tl.program_id(0) * BLOCK_N + s * (BLOCK_N // 4), bias, position, modality, rows, sample,
                pos_index, pos_weight, modality_index, seed, out, n, D, p, HAS_BIAS, DROPOUT,
            )  # fmt: skip
    else:
        # A wide address for the tile, narrow ones within it: 64 bits for every element would not fit in registers.
        tile = (tl.program_id(2).to(tl.int64) * n + tl.program_id(1) * BLOCK_M) * D + tl.program_id(0) * BLOCK_N
        within = tl.arange(0, BLOCK_M)[:, None] * D + tl.arange(0, BLOCK_N)[None, :]
        tl.store(partial + tile + within, x, mask=(i < n)[:, None] & (cols < D)[None, :])


@triton.jit(do_not_specialize=["n_text", "B", "n"])
def _patch_embed_rows_kernel(
    text, text_rows, cls_token, cls_rows, bias, position, modality, rows, sample, pos_index, pos_weight,
    modality_index, seed, out, partial, n_text, B, n, p, D: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Row blocks: first text, then [CLS], then (only launched with SPLITS > 1) patches from their partial sums."""
    block, text_blocks, cls_blocks = tl.program_id(0), tl.cdiv(n_text, BLOCK_M), tl.cdiv(B, BLOCK_M)
    lanes, first = tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_N
    cols = first + tl.arange(0, BLOCK_N)
    real = cols < D
    if block < text_blocks:
        if text is not None:
            i = block * BLOCK_M + lanes
            mask = (i < n_text)[:, None] & real[None, :]
            to = tl.load(text_rows + i, mask=i < n_text, other=0)
            x = tl.load(text + i.to(tl.int64)[:, None] * D + cols[None, :], mask=mask, other=0).to(tl.float32)
            tl.store(out + to[:, None] * D + cols[None, :], x.to(out.dtype.element_ty), mask=mask)
    elif block < text_blocks + cls_blocks:
        i = (block - text_blocks) * BLOCK_M + lanes
        mask = (i < B)[:, None] & real[None, :]
        x = tl.load(cls_token + cols, mask=real, other=0).to(tl.float32)
        x = (x + tl.load(position + cols, mask=real, other=0).to(tl.float32))[None, :]
        to = tl.load(cls_rows + i, mask=i < B, other=0)
        x = x + tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if DROPOUT:
            x = _tiles.dropout(x, seed, to, first, p)
        if modality is not None:
            kind = tl.load(modality_index + i, mask=i < B, other=0)
            x = x + tl.load(modality + kind[:, None] * D + cols[None, :], mask=mask, other=0).to(tl.float32)
        tl.store(out + to[:, None] * D + cols[None, :], x.to(out.dtype.element_ty), mask=mask)
    elif SPLITS > 1:  # with one split there are no partial sums, and nothing of this may be compiled
        i = (block - text_blocks - cls_blocks) * BLOCK_M + lanes
        mask = (i < n)[:, None] & real[None, :]
        x = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for split in tl.static_range(SPLITS):
            at = (i.to(tl.int64) + split * n)[:, None] * D + cols[None, :]
            x += tl.load(partial + at, mask=mask, other=0)
        _finish_patches(
            x, i, first, bias, position, modality, rows, sample, pos_index, pos_weight, modality_index, seed, out, n, D,
            p, HAS_BIAS, DROPOUT,
        )  # fmt: skip


# --- host side --------------------------------------------------------------------------------------------------------


def supports(
    *, device=None, dtype=None, pixel_dtype=None, out_dtype=None, dtypes=(), square=True, requires_grad=False,
    dropout=False,
):  # fmt: skip
    """ "" when the Triton kernels can run this call, else why not."""
    tables = {f"a table ({place})": table for place, table in enumerate(sorted(dtypes, key=str))}
    pixels = None if pixel_dtype == torch.uint8 else pixel_dtype
    return _device.problem(device, weight=dtype, pixels=pixels, out=out_dtype, **tables)


def small(arch):
    """Little shared memory a block: 99 KiB on sm_86, sm_89 and sm_120, 64 KiB on AMD, 163 KiB and more elsewhere."""
    return arch in (0, 86, 89, 120, 121)


def fwd_config(n, dtype, arch):
    """Tiles of the forward product for n patches: what was measured in 16 bits, where something was."""
    found = _config(n, dtype, small(arch))
    tried = _device.configuration("patch_embed", arch, n) if dtype.itemsize == 2 else {}
    return found if tried.get("SPLITS", found["SPLITS"]) != found["SPLITS"] else found | tried


def _config(n, dtype, little):
    """Tiles of the forward product for n patches.

    Aims at one to three waves of programs on 132 multiprocessors for D 768, K 3072. `little`: little shared memory.
    """
    if dtype == torch.float32:  # tf32x3 holds each operand twice in registers
        splits, stages = 8 if n <= 512 else 2 if n <= 4096 else 1, 2 if little else 3
        return dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, SPLITS=splits, num_warps=4, num_stages=stages)
    stages = 2 if little else 4
    if n <= 512:
        return dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=128, SPLITS=4, num_warps=4, num_stages=stages)
    if n <= 4096:
        return dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, SPLITS=2, num_warps=4, num_stages=stages)
    return dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32 if little else 64, SPLITS=1, num_warps=8, num_stages=3)


ROWS = dict(BLOCK_M=4, BLOCK_N=256, num_warps=4)


def geometry(pixels, weight):
    _, channels, ph, pw = weight.shape
    return (pixels.shape[2] // ph, pixels.shape[3] // pw, *pixels.stride()), dict(K=channels * ph * pw, PH=ph, PW=pw)


def patch_embed_fwd(
    *, pixels, weight, bias, cls_token, position, modality, text, text_rows, patch_source, patch_rows, patch_sample,
    pos_index, pos_weight, cls_rows, modality_index, total_rows, dropout_p, out_dtype, pixel_scale, pixel_shift, seed,
    keep,
):  # fmt: skip
    n, n_text, images = len(patch_rows), 0 if text is None else len(text_rows), len(cls_rows)
    width = weight.shape[0]
    make = torch.empty if n + n_text + images == total_rows else torch.zeros
    out = make(total_rows, width, dtype=out_dtype, device=weight.device)
    weight, text, cls_token, text_rows, patch_source, cls_rows, *epilogue = _tiles.dense(
        weight, text, cls_token, text_rows, patch_source, cls_rows, bias, position, modality, patch_rows, patch_sample,
        pos_index, pos_weight, modality_index,
    )  # fmt: skip
    epilogue += (seed, out)
    flags = dict(HAS_BIAS=bias is not None, DROPOUT=dropout_p > 0)
    arch = _device.arch(weight)
    config = fwd_config(n, weight.dtype, arch)
    splits, partial = config["SPLITS"], None
    if splits > 1:
        partial = torch.empty(splits, n, width, dtype=torch.float32, device=weight.device)
    if n and width:
        strides, patch = geometry(pixels, weight)
        grid = (_tiles.cdiv(width, config["BLOCK_N"]), _tiles.cdiv(n, config["BLOCK_M"]), splits)
        with _device.on(weight):
            _patch_embed_fwd_kernel[grid](
                pixels, weight, pixel_scale, pixel_shift, patch_source, *epilogue, partial, n, *strides,
                dropout_p, D=width, **patch, **flags, NORMALIZE=pixel_scale is not None,
                PRECISION=_device.precision(arch), **config,
            )  # fmt: skip
    blocks = sum(_tiles.cdiv(rows, ROWS["BLOCK_M"]) for rows in (n_text, images, n if splits > 1 else 0))
    if blocks and width:
        with _device.on(weight):
            _patch_embed_rows_kernel[blocks, _tiles.cdiv(width, ROWS["BLOCK_N"])](
                text, text_rows, cls_token, cls_rows, *epilogue, partial, n_text, images, n,
                dropout_p, D=width, **flags, SPLITS=splits, **ROWS,
            )  # fmt: skip
    return (out,), ()


# --- what is compiled ahead of time in our checks ---------------------------------------------------------------------

SHAPE = dict(D=768, K=3072, PH=32, PW=32, stride_w=1)
BATCHES = (144, 1152, 9216)  # patches at batch 1, 8 and 64 of 384 x 384 pixels


def aot_cases():
    """Every shipped configuration on ViLT's shapes, dense pixels; with dropout for float32 and at the largest batch."""
    for dtype, short, little, precision, targets in aot_targets():
        product = dict(targets=targets, matmul=True)
        for n in BATCHES:
            config, live = _config(n, dtype, little), short == "fp32" or n == BATCHES[-1]
            flags = dict(HAS_BIAS=True, NORMALIZE=False, DROPOUT=live, SPLITS=config["SPLITS"], PRECISION=precision)
            absent = dict(scale=None, shift=None) | ({} if live else dict(seed=None))
            absent |= dict(partial=None) if config["SPLITS"] == 1 else {}
            yield aot_case(_patch_embed_fwd_kernel, f"fwd n={n}", short, flags | config, **product, **absent)
            yield aot_case(_patch_embed_rows_kernel, f"rows n={n}", short, flags | ROWS, targets=targets, **absent)
        alone = dict.fromkeys(("text", "text_rows", "modality", "modality_index"), None)
        for n in (BATCHES[0], BATCHES[-1]):
            config = flags | _config(n, dtype, little)
            absent = dict(scale=None, shift=None) | alone | (dict(partial=None) if config["SPLITS"] == 1 else {})
            name = f"n={n} images alone"
            yield aot_case(_patch_embed_fwd_kernel, f"fwd {name}", short, config, **product, **absent)
            rows = config | ROWS
            yield aot_case(_patch_embed_rows_kernel, f"rows {name}", short, rows, targets=targets, **absent)
        config = flags | _config(BATCHES[0], dtype, little)
        if short == "bf16":
            types = dict(pixels="*fp32", scale=None, shift=None)
            yield aot_case(_patch_embed_fwd_kernel, "fwd fp32 pixels", short, config, **product, **types)
        config["NORMALIZE"] = True
        yield aot_case(_patch_embed_fwd_kernel, "fwd uint8 pixels", short, config, **product, pixels="*u8")


def aot_targets():
    """(dtype, its name, little shared memory?, precision of float32 products, targets) of one configuration."""
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for (little, precision), targets in _aot.alike(lambda target: (small(target.arch), target.precision)):
            yield dtype, short, little, precision, targets


def aot_case(kernel, name, short, config, **more):
    return _aot.case(kernel, f"patch_embed {name} {short}", short, config | SHAPE, **more)

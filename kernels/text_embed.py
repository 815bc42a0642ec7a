"""Text rows: y = dropout(LayerNorm(word[id] + token_type[s] + position[q])) + modality[0], one pass over [n, D].

Shapes as in `functional.text_embed`. All arithmetic is float32, whatever the tables hold.

Forward. One program a row: three rows are gathered into registers, normalised there, and written once. That is the
least traffic there can be: every input row read once, every output row written once.

Backward. Nothing is kept but the inputs and the dropout seed; a row is gathered and normalised again, which costs less
than to write and read the normalised row. With u = dropout'(dy), xhat the normalised row, w the LayerNorm's weight:
    d bias = sum u;   d weight = sum u xhat;   d modality[0] = sum dy
    dx = rstd (w u - mean(w u) - xhat mean(w u xhat))
  `_text_embed_bwd_kernel`        writes dx [n, D] float32 and the three sums, per program over many rows; torch adds
      the programs' sums in a fixed order.
  `_text_embed_bwd_word_kernel`   d word: ids are sorted (torch, stable); the first row of each run of equal ids adds
      the run's dx up in order. Deterministic. With deterministic=False the kernel above adds dx to d word atomically
      instead (in float32): no sort and one launch less, but sums in any order.
  `_text_embed_bwd_table_kernel`  d position and d token_type, small tables that many rows hit: a product of tensor
      cores with 0/1 factors built in registers. Deterministic. (A NaN in dx reaches every row of these two tables.)
No host synchronisation anywhere.
"""

import torch
import triton
import triton.language as tl

from . import _aot, _device, _tiles

# --- device side ------------------------------------------------------------------------------------------------------


@triton.jit
def _normalized_row(i, words, ids, position, position_ids, token_type, token_type_ids, cols, real, D, eps):
    """(xhat, rstd) of row i. `words` is the word table, or the given embeddings where there are no ids."""
    at = i if ids is None else tl.load(ids + i)
    x = tl.load(words + tl.cast(at, tl.int64) * D + cols, mask=real, other=0).to(tl.float32)
    if token_type_ids is None:
        segment = token_type
    else:
        segment = token_type + tl.load(token_type_ids + i).to(tl.int64) * D
    x += tl.load(segment + cols, mask=real, other=0).to(tl.float32)
    x += tl.load(position + tl.load(position_ids + i).to(tl.int64) * D + cols, mask=real, other=0).to(tl.float32)
    x = tl.where(real, x - tl.sum(x, 0) / D, 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    return x * rstd, rstd


@triton.jit
def _text_embed_fwd_kernel(
    words, ids, position, position_ids, token_type, token_type_ids, ln_weight, ln_bias, modality, seed, out, eps, p,
    DROPOUT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i, cols = tl.program_id(0), tl.arange(0, BLOCK_D)
    real = cols < D
    xhat, _ = _normalized_row(
        i, words, ids, position, position_ids, token_type, token_type_ids, cols, real, D, eps
    )  # fmt: skip
    w = tl.load(ln_weight + cols, mask=real, other=0).to(tl.float32)
    y = xhat * w + tl.load(ln_bias + cols, mask=real, other=0).to(tl.float32)
    if DROPOUT:
        y = _tiles.dropout(y, seed, i, 0, p)
    if modality is not None:
        y += tl.load(modality + cols, mask=real, other=0).to(tl.float32)
    tl.store(out + tl.cast(i, tl.int64) * D + cols, y.to(out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["n"])
def _text_embed_bwd_kernel(
    grad, words, ids, position, position_ids, token_type, token_type_ids, ln_weight, seed, dx, sums, d_word, n, eps,
    p, padding_idx, DROPOUT: tl.constexpr, ATOMIC: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """sums[program] = d weight, d bias, d modality[0] of the rows program, program + programs, ..."""
    cols = tl.arange(0, BLOCK_D)
    real = cols < D
    w = tl.load(ln_weight + cols, mask=real, other=0).to(tl.float32)
    d_weight = tl.zeros((BLOCK_D,), tl.float32)
    d_bias = tl.zeros((BLOCK_D,), tl.float32)
    d_modality = tl.zeros((BLOCK_D,), tl.float32)
    for i in range(tl.program_id(0), n, tl.num_programs(0)):
        xhat, rstd = _normalized_row(
            i, words, ids, position, position_ids, token_type, token_type_ids, cols, real, D, eps
        )  # fmt: skip
        u = tl.load(grad + tl.cast(i, tl.int64) * D + cols, mask=real, other=0).to(tl.float32)
        d_modality += u
        if DROPOUT:
            u = _tiles.dropout(u, seed, i, 0, p)
        d_weight += u * xhat
        d_bias += u
        u *= w
        u = rstd * (u - tl.sum(u, 0) / D - xhat * (tl.sum(u * xhat, 0) / D))
        tl.store(dx + tl.cast(i, tl.int64) * D + cols, u, mask=real)
        if ATOMIC:
            at = tl.load(ids + i).to(tl.int64)
            if at != padding_idx:
                tl.atomic_add(d_word + at * D + cols, u, mask=real, sem="relaxed")
    to = sums + tl.program_id(0) * 3 * D + cols
    tl.store(to, d_weight, mask=real)
    tl.store(to + D, d_bias, mask=real)
    tl.store(to + 2 * D, d_modality, mask=real)


@triton.jit(do_not_specialize=["n"])
def _text_embed_bwd_word_kernel(
    dx, ids, order, d_word, n, padding_idx, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """ids: sorted; order[i]: the row of dx whose id is ids[i]."""
    i, cols = tl.program_id(0), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    own = tl.load(ids + i)
    before = tl.load(ids + i - 1, mask=i > 0, other=-1)
    if (own != before) & (own != padding_idx):
        total = tl.zeros((BLOCK_N,), tl.float32)
        j = i + tl.arange(0, BLOCK_M)
        inside = 1
        while inside > 0:
            same = tl.load(ids + j, mask=j < n, other=-1) == own
            row = tl.load(order + j, mask=same, other=0)
            mask = same[:, None] & (cols < D)[None, :]
            total += tl.sum(tl.load(dx + row[:, None] * D + cols[None, :], mask=mask, other=0), 0)
            inside = tl.min(same.to(tl.int32), 0)
            j += BLOCK_M
        tl.store(d_word + own.to(tl.int64) * D + cols, total.to(d_word.dtype.element_ty), mask=cols < D)


@triton.jit(do_not_specialize=["n"])
def _text_embed_bwd_table_kernel(
    dx, position_ids, token_type_ids, out, n, L, table_rows, D: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[split, table_rows, D]: sums of the dx rows that hit table row t, positions 0..L-1, then token types."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    span = tl.cdiv(tl.cdiv(n, tl.num_programs(2)), BLOCK_M) * BLOCK_M
    first = tl.program_id(2) * span
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for start in range(first, tl.minimum(first + span, n), BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        live = i < n
        place = tl.load(position_ids + i, mask=live, other=-1)
        if token_type_ids is None:
            kind = tl.zeros((BLOCK_M,), tl.int32)
        else:
            kind = tl.load(token_type_ids + i, mask=live, other=0)
        # t >= L keeps a bad position id from counting as a token type; rows past the end add zeros.
        hit = ((t < L)[:, None] & (t[:, None] == place[None, :])) | (t[:, None] == (kind + L)[None, :])
        mask = live[:, None] & (cols < D)[None, :]
        g = tl.load(dx + i.to(tl.int64)[:, None] * D + cols[None, :], mask=mask, other=0)
        acc = tl.dot(hit.to(tl.float32), g, acc, input_precision=PRECISION)
    tile = out + tl.program_id(2).to(tl.int64) * table_rows * D
    mask = (t < table_rows)[:, None] & (cols < D)[None, :]
    tl.store(tile + t[:, None] * D + cols[None, :], acc, mask=mask)


# --- host side --------------------------------------------------------------------------------------------------------


def supports(*, device=None, dtype=None, dtypes=(), width=768, requires_grad=False, dropout=False):
    """ "" when the Triton kernels can run this call, else why not."""
    if width > 16384:
        return f"rows have {width} columns, at most 16384 fit in the registers of a program."
    return _device.problem(device, **{f"input {i}": dtype for i, dtype in enumerate(sorted(dtypes, key=str))})


WORD = dict(BLOCK_M=16, BLOCK_N=256, num_warps=4)
TABLE = dict(BLOCK_T=64, BLOCK_M=32, BLOCK_N=64, num_warps=8, num_stages=2)


def row_config(width):
    """One row a program, 8 to 16 columns a thread."""
    block = max(4, _tiles.power_of_two(width))  # dropout draws for four at once
    return dict(BLOCK_D=block, num_warps=min(max(block // 256, 1), 32))


def _inputs(input_ids, inputs_embeds, position_ids, token_type_ids, word, position, token_type):
    words = word if inputs_embeds is None else inputs_embeds
    return _tiles.dense(words, input_ids, position, position_ids, token_type, token_type_ids)


def text_embed_fwd(
    *, input_ids, inputs_embeds, position_ids, token_type_ids, word, position, token_type, ln_weight, ln_bias, modality,
    out_dtype, eps, padding_idx, dropout_p, deterministic, seed, keep,
):  # fmt: skip
    n, width = len(position_ids), position.shape[1]
    out = torch.empty(n, width, dtype=out_dtype, device=position.device)
    if n and width:
        rows = _inputs(input_ids, inputs_embeds, position_ids, token_type_ids, word, position, token_type)
        with _device.on(out):
            _text_embed_fwd_kernel[(n,)](
                *rows, *_tiles.dense(ln_weight, ln_bias, modality), seed, out, eps, dropout_p,
                D=width, DROPOUT=dropout_p > 0, **row_config(width),
            )  # fmt: skip
    return (out,), ()


def text_embed_bwd(
    *, needs, grad_rows, input_ids, inputs_embeds, position_ids, token_type_ids, word, position, token_type, ln_weight,
    ln_bias, modality, eps, padding_idx, dropout_p, deterministic, seed,
):  # fmt: skip
    grad = grad_rows
    n, width = grad.shape
    need_embeds, need_word, need_position, need_types, *_ = needs
    need_word = need_word and inputs_embeds is None  # given embeddings take the place of the word table
    padding_idx = -1 if padding_idx is None else padding_idx
    programs = min(max(_tiles.cdiv(n, 8), 1), 256)
    rows = _inputs(input_ids, inputs_embeds, position_ids, token_type_ids, word, position, token_type)
    new = {"device": grad.device, "dtype": torch.float32}
    dx = torch.empty(n, width, **new)
    sums = torch.zeros(programs, 3, width, **new)
    atomic = need_word and not deterministic
    d_word = None
    if need_word:
        d_word = torch.zeros(word.shape, device=grad.device, dtype=torch.float32 if atomic else word.dtype)
    if n and width:
        with _device.on(grad):
            _text_embed_bwd_kernel[(programs,)](
                grad.contiguous(), *rows, ln_weight.contiguous(), seed, dx, sums, d_word, n, eps, dropout_p,
                padding_idx, D=width, DROPOUT=dropout_p > 0, ATOMIC=atomic, **row_config(width),
            )  # fmt: skip
            if need_word and not atomic:
                ids, order = torch.sort(input_ids, stable=True)
                _text_embed_bwd_word_kernel[(n, _tiles.cdiv(width, WORD["BLOCK_N"]))](
                    dx, ids, order, d_word, n, padding_idx, D=width, **WORD
                )
    d_weight, d_bias, d_row = sums.sum(0)
    d_modality = None if modality is None else torch.zeros_like(modality)
    if modality is not None:
        d_modality[0] = d_row
    d_position = d_types = None
    if need_position or need_types:
        d_position, d_types = _small_tables(dx, rows[3], rows[5], position, token_type)
    return (
        dx.to(inputs_embeds.dtype) if need_embeds else None, None if d_word is None else d_word.to(word.dtype),
        d_position, d_types, d_weight.to(ln_weight.dtype, copy=True), d_bias.to(ln_bias.dtype, copy=True), d_modality,
    ), ()  # fmt: skip


def _small_tables(dx, position_ids, token_type_ids, position, token_type):
    n, width = dx.shape
    table_rows = len(position) + len(token_type)
    splits = min(max(_tiles.cdiv(n, 512), 1), 16)
    out = torch.empty(splits, table_rows, width, dtype=torch.float32, device=dx.device)
    precision = _device.precision(_device.arch(dx), position.dtype, token_type.dtype)
    grid = (_tiles.cdiv(table_rows, TABLE["BLOCK_T"]), _tiles.cdiv(width, TABLE["BLOCK_N"]), splits)
    if width:
        with _device.on(dx):
            _text_embed_bwd_table_kernel[grid](
                dx, position_ids, token_type_ids, out, n, len(position), table_rows, D=width,
                PRECISION=precision, **TABLE,
            )  # fmt: skip
    sums = out.sum(0)
    places = len(position)  # copies: outputs of an op must not share memory
    return sums[:places].to(position.dtype, copy=True), sums[places:].to(token_type.dtype, copy=True)


# --- what is compiled ahead of time in our checks ---------------------------------------------------------------------


def aot_cases():
    """Every shipped configuration on ViLT's shapes (D 768; tiles do not depend on the batch)."""
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        live = short == "fp32"  # with dropout and atomics there, without here
        row = row_config(768) | dict(DROPOUT=live, ATOMIC=live)
        absent = dict(token_type_ids=None) | ({} if live else dict(seed=None, d_word=None))
        for _, targets in _aot.alike(lambda target: target.precision):
            table = TABLE | dict(PRECISION=_device.precision(targets[0].arch, dtype))
            wide = dict(targets=targets, dx="*fp32", out="*fp32")
            yield _case(_text_embed_fwd_kernel, "fwd", short, row, targets=targets, **absent)
            yield _case(_text_embed_fwd_kernel, "fwd no modality", short, row, targets=targets, modality=None, **absent)
            yield _case(_text_embed_bwd_kernel, "bwd", short, row, **wide, **absent)
            yield _case(_text_embed_bwd_word_kernel, "bwd_word", short, WORD, **wide)
            yield _case(
                _text_embed_bwd_table_kernel, "bwd_table", short, table, matmul=True, token_type_ids=None, **wide
            )


def _case(kernel, name, short, config, **more):
    return _aot.case(kernel, f"text_embed {name} {short}", short, config | dict(D=768), **more)

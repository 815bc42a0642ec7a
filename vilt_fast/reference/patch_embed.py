"""Image half of ViLT's embedding, written with the text rows into one packed buffer [total_rows, D].

    patch row = dropout(W . patch + bias + sum_c w_c * position[i_c]) + modality[m]      c over the 4 bilinear corners
    CLS row   = dropout(cls_token + position[0])                      + modality[m]
    text row  = copied from `text`

Shapes: pixels [B, C, height, width]; weight [D, C, ph, pw]; bias [D] or None; cls_token [D]; position [1 + G, D], row 0
for [CLS]; modality [M, D]; text [n_text, D]; text_rows [n_text]; for n listed patches patch_source [n] (flat
image*gh*gw + y*gw + x, with gh = height // ph, gw = width // pw), patch_rows [n], patch_sample [n] (which entry of
modality_index), pos_index [n, 4], pos_weight [n, 4] float32; cls_rows [B]; modality_index [B].
Without `modality` and `modality_index` nothing is added, without `text` and `text_rows` no text rows are written.
Rows that nobody lists are zero. Pixels outside the listed patches are never read, so even NaN there changes nothing.
uint8 pixels become pixel * pixel_scale[c] + pixel_shift[c].
The projection runs in the dtype of `weight`, the sums in at least float32.

Source: ViLT (Kim et al. 2021) sec. 3.1; the corners and weights are `interpolate(mode="bilinear", align_corners=True)`
of the position grid to the image's own patch grid.
"""

import torch
import torch.nn.functional as F


def supports(
    *, device=None, dtype=None, pixel_dtype=None, out_dtype=None, dtypes=(), square=True, requires_grad=False,
    dropout=False,
):  # fmt: skip
    """Takes the float weight; the blobs of `quantize_linear` are opaque."""
    return (
        "it takes a float weight; blobs of quantize_linear belong to the cpp backend." if dtype == torch.uint8 else ""
    )


def patch_embed(
    pixels, weight, bias, cls_token, position, modality, text,
    text_rows, patch_source, patch_rows, patch_sample, pos_index, pos_weight, cls_rows, modality_index, total_rows, *,
    dropout_p=0.0, out_dtype=None, pixel_scale=None, pixel_shift=None,
):  # fmt: skip
    ph, pw = weight.shape[-2:]
    batch, channels, height, width = pixels.shape
    gh, gw = height // ph, width // pw
    wide = torch.promote_types(weight.dtype, torch.float32)

    cells = pixels[:, :, : gh * ph, : gw * pw].reshape(batch, channels, gh, ph, gw, pw)
    sample, cell = patch_source // (gh * gw), patch_source % (gh * gw)
    chosen = cells[sample, :, cell // gw, :, cell % gw, :]  # [n, C, ph, pw]
    if pixel_scale is not None:
        chosen = chosen.to(wide) * pixel_scale.to(wide)[:, None, None] + pixel_shift.to(wide)[:, None, None]
    chosen = chosen.to(weight.dtype)
    rows, columns = chosen.flatten(1), weight.flatten(1).T  # no F.linear: who replaces that means linear layers
    projected = (rows @ columns if bias is None else torch.addmm(bias, rows, columns)).to(wide)
    # Not by indexing, whose gradient threads add up in any order on a CPU.
    corners = torch.embedding(position.to(wide), pos_index)  # [n, 4, D]
    patches = projected + (corners * pos_weight.to(wide).unsqueeze(-1)).sum(1)
    patches = F.dropout(patches, dropout_p)
    cls = (cls_token.to(wide) + position[0].to(wide)).expand(len(cls_rows), -1)
    cls = F.dropout(cls, dropout_p)
    if modality is not None:
        patches = patches + torch.embedding(modality.to(wide), modality_index[patch_sample])
        cls = cls + torch.embedding(modality.to(wide), modality_index)

    x = cls.new_zeros(total_rows, cls.shape[1])
    if text is not None:
        x = x.index_copy(0, text_rows, text.to(wide))
    for rows, values in ((patch_rows, patches), (cls_rows, cls)):
        x = x.index_copy(0, rows, values)
    return x.to(weight.dtype if out_dtype is None else out_dtype)

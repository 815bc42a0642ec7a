"""patch_embed on the CPU: csrc/cpu/patch_embed.cpp; its gradient in closed form, in PyTorch."""

import math

import torch

from . import _native, quantize_linear

_INDICES = (
    "text_rows", "patch_source", "patch_rows", "patch_sample", "pos_index", "cls_rows", "modality_index",
)  # fmt: skip


def supports(
    *, device=None, dtype=None, pixel_dtype=None, out_dtype=None, dtypes=(), square=True, requires_grad=False,
    dropout=False,
):  # fmt: skip
    if not square:
        return "patches are not square."
    if dtype == torch.uint8 and requires_grad:
        return "a blob of quantize_linear has no gradient; use torch.no_grad() or the weight itself."
    weight = None if dtype == torch.uint8 else dtype
    tables = {f"a table ({place})": table for place, table in enumerate(sorted(dtypes, key=str))}
    return _native.problem(device, dropout=dropout, weight=weight, pixels=pixel_dtype, out=out_dtype, **tables)


def patch_embed_fwd(
    *, pixels, weight, bias, cls_token, position, modality, text, text_rows, patch_source, patch_rows, patch_sample,
    pos_index, pos_weight, cls_rows, modality_index, total_rows, dropout_p, out_dtype, pixel_scale, pixel_shift, seed,
    keep,
):  # fmt: skip
    from vilt_fast import _C

    if len(pixels) != len(cls_rows):  # patches that are cut out: side by side in one image
        pixels = pixels.permute(1, 2, 0, 3).flatten(2)[None]
    width, (images, channels, height, columns) = len(cls_token), pixels.shape
    if weight.dtype == torch.uint8:
        compute, (weight, shape) = "int8", quantize_linear.opened(weight, "patch_embed: weight")
        size = math.isqrt(shape[1] // channels)
        if shape != (width, channels * size**2):
            raise ValueError(
                f"patch_embed: weight is a blob of a matrix {list(shape)}, expected [{width}, {channels} * size^2], as "
                "the pixels and cls_token are."
            )
    else:
        compute, size = _native.NAMES[weight.dtype], weight.shape[-1]
    gh, gw = height // size, columns // size
    dense = [
        None if t is None else t.contiguous()
        for t in (
            weight, bias, position, cls_token, modality, text_rows, patch_source, patch_rows, patch_sample, pos_index,
            cls_rows, modality_index,
        )
    ]  # fmt: skip
    weight, bias, position, cls_token, modality, *indices = dense
    text_rows, patch_source, patch_rows, patch_sample, pos_index, cls_rows, modality_index = indices
    limits = (
        total_rows, images * gh * gw, total_rows, len(cls_rows), len(position), total_rows,
        0 if modality is None else len(modality),
    )  # fmt: skip
    named = zip(_INDICES, indices, limits, strict=True)
    checked = [(name, t.data_ptr(), t.numel(), limit) for name, t, limit in named if t is not None]
    pos_weight = pos_weight.to(torch.float32).contiguous()
    listed = (0 if text is None else len(text_rows)) + len(patch_rows) + len(cls_rows)
    out = (torch.empty if listed == total_rows else torch.zeros)(total_rows, width, dtype=torch.float32)
    address, names = _native.address, _native.NAMES
    _C.patch_embed(
        pixels.data_ptr(), names[pixels.dtype], list(pixels.stride()), size, channels, weight.data_ptr(),
        names[weight.dtype], address(bias), "f32" if bias is None else names[bias.dtype], width,
        address(patch_source), gh, gw, address(patch_rows), address(pos_index), address(pos_weight),
        position.data_ptr(), names[position.dtype],
        cls_token.data_ptr(), names[cls_token.dtype], cls_rows.data_ptr(), address(modality),
        "f32" if modality is None else names[modality.dtype], address(modality_index), address(patch_sample),
        out.data_ptr(), len(patch_rows), len(cls_rows), compute, torch.get_num_threads(),
        checked,
    )  # fmt: skip
    if text is not None:
        out.index_copy_(0, text_rows, text.to(torch.float32))
    return (out.to(out_dtype),), ()


def patch_embed_bwd(
    *, needs, grad_rows, pixels, weight, bias, cls_token, position, modality, text, text_rows, patch_source, patch_rows,
    patch_sample, pos_index, pos_weight, cls_rows, modality_index, dropout_p, pixel_scale, pixel_shift, seed,
):  # fmt: skip
    need = dict(zip(("pixels", "weight", "bias", "cls_token", "position", "modality", "text"), needs, strict=True))
    size = weight.shape[-1]
    images, channels, height, columns = pixels.shape
    gh, gw = height // size, columns // size
    rows = grad_rows.to(torch.float32)  # sums are made in float32, products in the dtype of the weight
    of_patches, of_cls = rows.index_select(0, patch_rows), rows.index_select(0, cls_rows)
    projected = of_patches.to(weight.dtype)
    found = dict.fromkeys(need)
    if need["pixels"]:
        cells = torch.zeros(images * gh * gw, channels * size * size)
        cells.index_add_(0, patch_source, (projected @ weight.flatten(1)).float())
        cells = cells.view(images, gh, gw, channels, size, size).permute(0, 3, 1, 4, 2, 5)
        found["pixels"] = torch.zeros(pixels.shape, dtype=pixels.dtype)
        found["pixels"][..., : gh * size, : gw * size] = cells.reshape(images, channels, gh * size, gw * size)
    if need["weight"]:
        cells = pixels[..., : gh * size, : gw * size].reshape(images, channels, gh, size, gw, size)
        image, cell = patch_source // (gh * gw), patch_source % (gh * gw)
        patches = cells[image, :, cell // gw, :, cell % gw, :]
        found["weight"] = (projected.T @ patches.flatten(1).to(weight.dtype)).view(weight.shape)
    if need["bias"]:
        found["bias"] = of_patches.sum(0)
    if need["cls_token"]:
        found["cls_token"] = of_cls.sum(0)
    if need["position"]:
        corners = of_patches[:, None] * pos_weight.float()[..., None]
        found["position"] = torch.zeros(position.shape).index_add_(0, pos_index.flatten(), corners.flatten(0, 1))
        found["position"][0] += of_cls.sum(0)
    if need["modality"]:
        found["modality"] = torch.zeros(modality.shape).index_add_(0, modality_index[patch_sample], of_patches)
        found["modality"].index_add_(0, modality_index, of_cls)
    if need["text"]:
        found["text"] = rows.index_select(0, text_rows)
    given = dict(weight=weight, bias=bias, cls_token=cls_token, position=position, modality=modality, text=text)
    for name, tensor in given.items():
        if found[name] is not None:
            found[name] = found[name].to(tensor.dtype)
    return tuple(found.values()), ()

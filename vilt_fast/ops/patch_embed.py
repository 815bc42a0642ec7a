"""patch_embed: patches, image [CLS] and text rows of all samples, written into one packed buffer.

The dropout mask is a function of `seed`, which is an input of the op: so the op is pure, nothing else has to be kept
for the backward, and a recomputed forward drops the same elements.
"""

import dataclasses

import torch
from torch import Tensor
from torch import dtype as DType

from . import _check, registry
from ._define import Op

_NAME = "patch_embed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts(registry.Facts):
    pixel_dtype: DType
    out_dtype: DType
    dtypes: frozenset  #: of text, cls_token, position, modality
    square: bool  #: patches are as high as wide
    requires_grad: bool = False
    dropout: bool = False


def _fake(
    pixels: Tensor, weight: Tensor, bias: Tensor | None, cls_token: Tensor, position: Tensor, modality: Tensor | None,
    text: Tensor | None, text_rows: Tensor | None, patch_source: Tensor, patch_rows: Tensor, patch_sample: Tensor,
    pos_index: Tensor, pos_weight: Tensor, cls_rows: Tensor, modality_index: Tensor | None, total_rows: int,
    dropout_p: float, out_dtype: torch.dtype, pixel_scale: Tensor | None, pixel_shift: Tensor | None,
    seed: Tensor | None,
):  # fmt: skip
    return (cls_token.new_empty(total_rows, cls_token.shape[0], dtype=out_dtype),), ()


def _fake_backward(
    needs: list[bool], grad_rows: Tensor, pixels: Tensor, weight: Tensor, bias: Tensor | None, cls_token: Tensor,
    position: Tensor, modality: Tensor | None, text: Tensor | None, text_rows: Tensor | None, patch_source: Tensor,
    patch_rows: Tensor, patch_sample: Tensor, pos_index: Tensor, pos_weight: Tensor, cls_rows: Tensor,
    modality_index: Tensor | None, dropout_p: float, pixel_scale: Tensor | None, pixel_shift: Tensor | None,
    seed: Tensor | None,
):  # fmt: skip
    given = (pixels, weight, bias, cls_token, position, modality, text)
    return tuple(None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in given), ()


def _validate(
    pixels, weight, bias, cls_token, position, modality, text, text_rows, patch_source, patch_rows, patch_sample,
    pos_index, pos_weight, cls_rows, modality_index, total_rows, dropout_p, pixel_scale, pixel_shift,
):  # fmt: skip
    blob = isinstance(weight, Tensor) and weight.dtype == torch.uint8
    sizes = _check.shapes(
        _NAME,
        weight=(weight, "bytes" if blob else "D C ph pw"), pixels=(pixels, "images C height width"),
        cls_token=(cls_token, "D"), bias=(bias, "D"), position=(position, "G+1 D"), modality=(modality, "M D"),
        text=(text, "n_text D"), text_rows=(text_rows, "n_text"), patch_source=(patch_source, "n"),
        patch_rows=(patch_rows, "n"),
        patch_sample=(patch_sample, "n"), pos_index=(pos_index, "n 4"), pos_weight=(pos_weight, "n 4"),
        cls_rows=(cls_rows, "B"), modality_index=(modality_index, "B"), pixel_scale=(pixel_scale, "C"),
        pixel_shift=(pixel_shift, "C"),
    )  # fmt: skip
    if sizes["images"] != sizes["B"] and (blob or pixels.shape[2:] != weight.shape[2:]):
        raise ValueError(
            f"patch_embed: there are {sizes['images']} images and {sizes['B']} cls_rows, expected as many: "
            "only images of one patch may be more or fewer."
        )
    for names, one, other in (
        ("text and text_rows", text, text_rows), ("modality and modality_index", modality, modality_index)
    ):  # fmt: skip
        if (one is None) != (other is None):
            raise ValueError(f"patch_embed: {names} belong together; give both or neither.")
    n_text = 0 if text is None else sizes["n_text"]
    if n_text + sizes["n"] + sizes["B"] > total_rows:
        raise ValueError(
            f"patch_embed: total_rows is {total_rows}, but {n_text} text, {sizes['n']} patch and {sizes['B']} "
            "CLS rows are listed; each row is written once."
        )
    floats = dict(bias=bias, cls_token=cls_token, position=position, modality=modality, text=text)
    if not blob:  # which only its backend can open
        floats["weight"] = weight
        _check.same_dtype(_NAME, weight=weight, bias=bias)
    normalized = pixel_scale is not None and pixel_shift is not None
    if (pixels.dtype == torch.uint8) != normalized or (pixel_scale is None) != (pixel_shift is None):
        raise ValueError(
            f"patch_embed: pixels are {pixels.dtype}; pixel_scale and pixel_shift belong to uint8 pixels, both of "
            "them, and to no others."
        )
    _check.dtypes(_NAME, (*_check.FLOATS, torch.uint8), pixels=pixels)
    _check.dtypes(_NAME, _check.FLOATS, pixel_scale=pixel_scale, pixel_shift=pixel_shift, **floats)
    _check.dtypes(_NAME, _check.FLOATS, pos_weight=pos_weight)
    indices = dict(
        text_rows=text_rows, patch_source=patch_source, patch_rows=patch_rows, patch_sample=patch_sample,
        pos_index=pos_index, cls_rows=cls_rows, modality_index=modality_index,
    )  # fmt: skip
    _check.dtypes(_NAME, (torch.int64,), **indices)
    normalization = dict(pixel_scale=pixel_scale, pixel_shift=pixel_shift)
    _check.same_device(_NAME, pixels=pixels, **floats, **indices, pos_weight=pos_weight, **normalization)
    _check.probability(_NAME, dropout_p)


def _validate_backward(
    grad_rows, pixels, weight, bias, cls_token, position, modality, text, text_rows, patch_source, patch_rows,
    patch_sample, pos_index, pos_weight, cls_rows, modality_index, dropout_p, pixel_scale, pixel_shift,
):  # fmt: skip
    op = f"{_NAME}_bwd"
    _check.shapes(op, cls_token=(cls_token, "D"), grad_rows=(grad_rows, "rows D"))
    _validate(
        pixels, weight, bias, cls_token, position, modality, text, text_rows, patch_source, patch_rows, patch_sample,
        pos_index, pos_weight, cls_rows, modality_index, grad_rows.shape[0], dropout_p, pixel_scale, pixel_shift,
    )  # fmt: skip
    _check.dtypes(op, _check.FLOATS, grad_rows=grad_rows, weight=weight)
    _check.same_device(op, grad_rows=grad_rows, cls_token=cls_token)


def _facts(pixels, weight, cls_token, position, modality, text, dropout_p, out_dtype, requires_grad):
    return Facts(
        device=pixels.device.type, dtype=weight.dtype, pixel_dtype=pixels.dtype, out_dtype=out_dtype,
        dtypes=frozenset(t.dtype for t in (text, cls_token, position, modality) if t is not None),
        square=weight.dtype == torch.uint8 or weight.shape[2] == weight.shape[3], requires_grad=requires_grad,
        dropout=dropout_p > 0,
    )  # fmt: skip


def _known(
    pixels, weight, bias, cls_token, position, modality, text, dropout_p, out_dtype, requires_grad, **others
):  # fmt: skip
    """The facts of a call that fits together."""
    tables = dict(cls_token=cls_token, position=position, modality=modality, text=text)
    _validate(pixels=pixels, weight=weight, bias=bias, **tables, dropout_p=dropout_p, **others)
    out_dtype = (cls_token if weight.dtype == torch.uint8 else weight).dtype if out_dtype is None else out_dtype
    return _facts(pixels, weight, **tables, dropout_p=dropout_p, out_dtype=out_dtype, requires_grad=requires_grad)


_OP = Op(
    _NAME, _fake, _fake_backward,
    outputs=("rows",), validate=_validate, facts=_facts, validate_backward=_validate_backward,
    differentiable=("pixels", "weight", "bias", "cls_token", "position", "modality", "text"),
)  # fmt: skip


def patch_embed(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cls_token: Tensor,
    position: Tensor,
    modality: Tensor | None,
    text: Tensor | None,
    text_rows: Tensor | None,
    patch_source: Tensor,
    patch_rows: Tensor,
    patch_sample: Tensor,
    pos_index: Tensor,
    pos_weight: Tensor,
    cls_rows: Tensor,
    modality_index: Tensor | None,
    total_rows: int,
    *,
    dropout_p: float = 0.0,
    out_dtype: DType | None = None,
    pixel_scale: Tensor | None = None,
    pixel_shift: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The packed input of the transformer: text, image [CLS] and patch rows of all samples, end to end.

    A patch row is ``dropout(projection + bias + bilinear position) + modality row``, a [CLS] row is
    ``dropout(cls_token + position[0]) + modality row``, a text row is copied. Rows that nobody lists are zero.

    Args:
        pixels: [B, C, height, width] of any strides, any floating dtype (converted to that of ``weight``) or uint8;
            height and width need not be multiples of the patch. What lies outside the listed patches has no effect,
            even NaN. Or patches that are cut out already, [n, C, ph, pw] each an image of its own, of any number.
        weight: [D, C, ph, pw], the projection; its last two sizes are the patch size. Or a blob of
            :func:`quantize_linear`, made from ``weight.flatten(1)`` of square patches (cpp, without a gradient): then
            patches are rounded to 256 levels each. bias: [D] or None.
        cls_token: [D].
        position: [1 + G, D], row 0 for [CLS].
        modality: [M, D], the modality table (0 text, 1 image, 2 second image), and modality_index: [B] int64 rows of
            it; None, both of them, to add nothing.
        text: [n_text, D], from :func:`text_embed`, modality row included, and text_rows: [n_text] int64, where each
            goes; None, both of them, for images alone.
        patch_source: [n] int64, flat ``image * gh * gw + y * gw + x`` with ``gh = height // ph``, ``gw = width // pw``.
        patch_rows: [n] int64, where each patch goes.
        patch_sample: [n] int64, which entry of ``cls_rows`` and ``modality_index`` a patch belongs to.
        pos_index: [n, 4] int64 rows of ``position``; pos_weight: [n, 4] float32, their bilinear weights.
        cls_rows: [B] int64.
        total_rows: N, rows of the result.
        dropout_p: applied before the modality row is added.
        out_dtype: dtype of the result, that of ``weight`` by default. The projection runs in the dtype of ``weight``,
            the additions in at least float32.
        pixel_scale, pixel_shift: [C], for uint8 pixels and only for them: a pixel counts as
            ``pixel * pixel_scale[c] + pixel_shift[c]``, e.g. ``1 / (255 std)`` and ``-mean / std``.

    Returns:
        x [N, D]. Differentiable in floating pixels and in every floating table; gradients are
        deterministic.

    Source: ViLT (Kim et al. 2021) sec. 3.1; HuggingFace ``ViltEmbeddings.visual_embed``.
    """
    floats = dict(weight=weight, bias=bias, cls_token=cls_token, position=position, modality=modality, text=text)
    indices = dict(
        text_rows=text_rows, patch_source=patch_source, patch_rows=patch_rows, patch_sample=patch_sample,
        pos_index=pos_index, cls_rows=cls_rows, modality_index=modality_index,
    )  # fmt: skip
    normalization = dict(pixel_scale=pixel_scale, pixel_shift=pixel_shift)
    arguments = dict(
        pixels=pixels, **floats, **indices, pos_weight=pos_weight, total_rows=total_rows, dropout_p=dropout_p,
        **normalization,
    )  # fmt: skip
    needs_grad = _check.needs_grad(pixels, *floats.values())
    facts = _check.of_forms(_known, **arguments, out_dtype=out_dtype, requires_grad=needs_grad)
    name = _OP.resolve(backend, facts)
    if name in registry.PLAIN:
        return _OP.plain(name, **arguments, out_dtype=facts.out_dtype)
    return _OP(name, **arguments, out_dtype=facts.out_dtype, seed=_check.seed(pixels.device, dropout_p))[0]

"""The public ops. Every one takes ``backend=None`` (choose by device and support) or a backend's name (no fallback).

Errors, for all of them: ``ValueError`` for shapes and numbers, ``TypeError`` for dtypes, ``IndexError`` for ids or
labels out of range (looked at on the CPU only), ``RuntimeError`` when a backend asked for by name cannot run the call.
Nothing is modified in place.
"""

from torch import Generator, Tensor
from torch import dtype as DType

from .ops import add_layer_norm as _add_layer_norm
from .ops import attention as _attention
from .ops import encoder as _encoder
from .ops import ipot as _ipot
from .ops import linear as _linear
from .ops import linear_cross_entropy as _linear_cross_entropy
from .ops import linear_fp8 as _linear_fp8
from .ops import linear_gelu as _linear_gelu
from .ops import patch_embed as _patch_embed
from .ops import sinkhorn as _sinkhorn
from .ops import text_embed as _text_embed
from .ops import word_patch_distance as _word_patch_distance
from .reference.sinkhorn import SinkhornResult

__all__ = [
    "SinkhornResult", "add_layer_norm", "attention", "encoder", "ipot", "linear", "linear_cross_entropy", "linear_fp8",
    "linear_gelu", "patch_embed", "quantize_fp8", "quantize_linear", "sinkhorn", "text_embed", "word_patch_distance",
]  # fmt: skip


def patch_embed(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cls_token: Tensor,
    position: Tensor,
    modality: Tensor,
    text: Tensor,
    text_rows: Tensor,
    patch_source: Tensor,
    patch_rows: Tensor,
    patch_sample: Tensor,
    pos_index: Tensor,
    pos_weight: Tensor,
    cls_rows: Tensor,
    modality_index: Tensor,
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
            even NaN.
        weight: [D, C, ph, pw], the projection; its last two sizes are the patch size. bias: [D] or None.
        cls_token: [D].
        position: [1 + G, D], row 0 for [CLS].
        modality: [M, D], the modality table (0 text, 1 image, 2 second image).
        text: [n_text, D], from :func:`text_embed`, modality row included.
        text_rows: [n_text] int64, where each text row goes.
        patch_source: [n] int64, flat ``image * gh * gw + y * gw + x`` with ``gh = height // ph``, ``gw = width // pw``.
        patch_rows: [n] int64, where each patch goes.
        patch_sample: [n] int64, which entry of ``modality_index`` a patch belongs to.
        pos_index: [n, 4] int64 rows of ``position``; pos_weight: [n, 4] float32, their bilinear weights.
        cls_rows: [B] int64; modality_index: [B] int64 rows of ``modality``.
        total_rows: N, rows of the result.
        dropout_p: applied before the modality row is added.
        out_dtype: dtype of the result, that of ``weight`` by default. The projection runs in the dtype of ``weight``,
            the additions in at least float32.
        pixel_scale, pixel_shift: [C], for uint8 pixels and only for them: a pixel counts as
            ``pixel * pixel_scale[c] + pixel_shift[c]``, e.g. ``1 / (255 std)`` and ``-mean / std``.

    Returns:
        x [N, D]. Differentiable (reference, triton) in floating pixels and in every floating table; gradients are
        deterministic.

    Source: ViLT (Kim et al. 2021) sec. 3.1; HuggingFace ``ViltEmbeddings.visual_embed``.
    """
    return _patch_embed.patch_embed(
        pixels, weight, bias, cls_token, position, modality, text, text_rows, patch_source, patch_rows, patch_sample,
        pos_index, pos_weight, cls_rows, modality_index, total_rows, dropout_p, out_dtype, pixel_scale,
        pixel_shift, backend,
    )  # fmt: skip


def text_embed(
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    modality: Tensor,
    *,
    eps: float,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
    deterministic: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Text rows: ``dropout(LayerNorm(word + token type + position)) + modality[0]``.

    Args:
        input_ids: [n] int64 or int32, rows of ``word``; or None and
        inputs_embeds: [n, D], used in their place.
        position_ids: [n] integers; token_type_ids: [n] integers, or None for all 0.
        word: [V, D]; position: [L, D]; token_type: [S, D]; ln_weight, ln_bias: [D].
        modality: [M, D]; row 0 is added last.
        eps: of the LayerNorm (1e-12 in ViLT).
        padding_idx: row of ``word`` that gets no gradient, as in ``torch.nn.Embedding``.
        deterministic: False lets a backend (triton) add up the gradient of ``word`` in any order, with atomics.

    Returns:
        [n, D], in the widest dtype of the added tables. Raises IndexError for an id outside its table (CPU).

    Source: Devlin et al. 2019; HuggingFace ``TextEmbeddings``.
    """
    return _text_embed.text_embed(
        input_ids, inputs_embeds, position_ids, token_type_ids, word, position, token_type, ln_weight, ln_bias,
        modality, eps, padding_idx, dropout_p, deterministic, backend,
    )  # fmt: skip


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    seqused_k: Tensor | None = None,
    causal_start: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
    generator: Generator | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``dropout(softmax(scale * q k^T)) v`` within each sample of a packed batch.

    Args:
        q: [Nq, H, d]; k, v: [Nk, H, d], one floating dtype, any strides.
        cu_seqlens_q, cu_seqlens_k: [B + 1] int32, first row of each sample and the total; query and key lengths of a
            sample may differ. max_seqlen_q, max_seqlen_k: upper bounds of those lengths. On a GPU, where it cannot be
            looked at, the total may be less than the rows there are; the rest of the result is undefined then.
        seqused_k: [B] int32, only that many leading rows of each sample are keys (default: all).
        causal_start: [B] int32, prefix language modelling: key rows at index >= start are visible only to query rows
            with index >= theirs (indices within the sample).
        dropout_p: on the probabilities. scale: 1/sqrt(d) by default.
        return_lse: also return the log-sum-exp of the scaled scores.
        generator: for dropout.

    Returns:
        out [Nq, H, d], and with ``return_lse`` lse [H, Nq] float32 (float64 for float64 inputs). A sample without keys
        gives zeros and -inf.

    Source: Vaswani et al. 2017, eq. 1; argument names as in flash-attn.
    """
    return _attention.attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, causal_start, dropout_p, scale,
        return_lse, generator, backend,
    )  # fmt: skip


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``s = dropout(x) + residual`` and ``LayerNorm(s)``, both.

    Args:
        x, residual: [..., D], of one shape; the residual may be of a wider dtype (a float32 stream, bfloat16 layers).
        weight, bias: [D] or None. eps: added to the variance.
        dropout_p: probability that an element of ``x`` counts as 0.

    Returns:
        s [..., D] in the wider dtype of x and residual, and the normalised y [..., D] in the dtype of x. Differentiable
        (reference, triton) in all tensors; the sums over rows are deterministic.

    Source: Dosovitskiy et al. 2021, eq. 2-3.
    """
    return _add_layer_norm.add_layer_norm(x, residual, weight, bias, eps, dropout_p, backend)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """``x W^T + b + residual``, in one pass over the result.

    Args:
        x: [..., K]; weight: [N, K]; bias: [N] or None; one floating dtype (under autocast: any, cast as it would).
        residual: [..., N] or None, any floating dtype.

    Returns:
        [..., N] in the wider dtype of x and residual. Differentiable in all tensors.

    Source: ``torch.nn.functional.linear``.
    """
    return _linear.linear(x, weight, bias, residual, backend)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: str | None = None) -> Tensor:
    """``gelu(x W^T + b)`` with the exact (erf) GELU.

    Args:
        x: [..., K]; weight: [N, K]; bias: [N] or None; one floating dtype (under autocast: any, cast as it would).

    Returns:
        [..., N].

    Source: Hendrycks and Gimpel 2016, eq. 1.
    """
    return _linear_gelu.linear_gelu(x, weight, bias, backend)


def linear_fp8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    *,
    gelu: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``x W^T + b`` on 8-bit floats (e4m3), then the exact GELU if wanted; no gradient.

    Args:
        x: [..., K], rounded here to e4m3 with one scale a row, max|row| / 448.
        weight: [N, K] float8_e4m3fn and weight_scale: [N] float32, from :func:`quantize_fp8`. bias: [N] or None.

    Returns:
        [..., N] in the dtype of x, summed in float32. Triton needs an NVIDIA GPU from sm_89 on; elsewhere the reference
        gives the same numbers without the speed.

    Source: Micikevicius et al. 2022.
    """
    return _linear_fp8.linear_fp8(x, weight, weight_scale, bias, gelu, backend)


def quantize_fp8(x: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Rows [..., K] as e4m3: (q [..., K] float8_e4m3fn, scale [...] float32), x = q * scale; scale 1 for zero rows."""
    return _linear_fp8.quantize_fp8(x, backend)


def encoder(
    x: Tensor,
    parameters: list[Tensor],
    cu_seqlens: Tensor,
    seqused_k: Tensor,
    max_seqlen: int,
    *,
    num_heads: int,
    eps: list[float],
    compute: str = "float32",
    return_hidden: bool = False,
    backend: str | None = None,
) -> Tensor:
    """A stack of pre-norm transformer blocks over packed rows, meant for inference.

    Each block: ``x += O(attention(QKV(LN1 x)))``, ``x += FC2(gelu(FC1(LN2 x)))``.

    Args:
        x: [N, D] float32 (reference: also float64), not modified.
        parameters: 16 tensors a layer: ln1.w ln1.b q.w q.b k.w k.b v.w v.b o.w o.b ln2.w ln2.b fc1.w fc1.b fc2.w fc2.b;
            weights [out, in], a missing bias is an empty tensor. The six weights of every layer may be blobs of
            :func:`quantize_linear` (``compute="int8"``, cpp); the reference takes float weights and emulates int8.
        cu_seqlens: [B + 1] int32; seqused_k: [B] int32, the leading rows of each sample that are keys; both on the CPU
            for the cpp backend. max_seqlen: upper bound of the lengths.
        eps: 2 numbers a layer (LN1, LN2).
        compute: how the operands of matrix products are represented: "float32", "bfloat16" or "int8" (weights per
            output channel, activations per row). The residual stream, norms and softmax are float32 in all three.
        return_hidden: return the stream after every layer.

    Returns:
        [N, D], the residual stream after the last layer, before the final norm; [layers, N, D] with ``return_hidden``.

    Source: Dosovitskiy et al. 2021, eq. 2-3.
    """
    return _encoder.encoder(
        x, parameters, cu_seqlens, seqused_k, max_seqlen, num_heads, eps, compute, return_hidden, backend
    )


def quantize_linear(weight: Tensor, *, backend: str | None = None) -> Tensor:
    """The int8 form of a linear weight [N, K] (float32 or bfloat16) for :func:`encoder`: an opaque uint8 blob [bytes].

    Per output channel, symmetric, scale max|w|/127. The blob holds for the machine and version that made it: keep the
    weight, not the blob. Needs the native library (RuntimeError without it).
    """
    return _encoder.quantize_linear(weight, backend)


def ipot(
    cost: Tensor,
    text_pad: Tensor,
    image_pad: Tensor,
    *,
    beta: float = 0.5,
    iterations: int = 50,
    inner: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Transport plan of the inexact proximal point method, as ViLT and UNITER run it.

    Args:
        cost: [B, M, N]; finite on real entries (ValueError on the CPU), anything on padding.
        text_pad: [B, M] bool, image_pad: [B, N] bool, True where padded.
        beta: proximal step, > 0.
        iterations: outer steps, part of the definition (50 have not converged). inner: scaling steps in each.

    Returns:
        plan [B, M, N], same orientation as ``cost``, float32 (float64 for float64 costs), zero on padding; all zero for
        a sample without real tokens or patches. No gradient.

    Source: Xie et al. 2020, algorithm 1; the original ``vilt/modules/objectives.py``.
    """
    return _ipot.ipot(cost, text_pad, image_pad, beta, iterations, inner, backend)


def sinkhorn(
    cost: Tensor,
    text_pad: Tensor,
    image_pad: Tensor,
    *,
    epsilon: float = 0.1,
    iterations: int = 100,
    tolerance: float | None = None,
    text_marginal: Tensor | None = None,
    image_marginal: Tensor | None = None,
    gradient: str = "envelope",
    backend: str | None = None,
) -> SinkhornResult:
    """Entropic transport plan in the log domain: minimises ``<C, T> + epsilon KL(T || mu nu^t)``.

    Args:
        cost, text_pad, image_pad: as in :func:`ipot`.
        epsilon: in units of the cost, > 0. iterations: at most so many.
        tolerance: a sample stops changing once its marginal error is at most this.
        text_marginal: [B, M], image_marginal: [B, N], weights >= 0, normalised per sample over the real entries;
            uniform by default.
        gradient: "envelope" (d value / d cost = plan, plan constant) or "unrolled" (through the iterations, for plan
            and value).

    Returns:
        ``SinkhornResult(plan [B, M, N], value [B], iterations [B] int64, marginal_error [B])``; marginal_error is the
        L1 error of the text marginals, the image marginals are exact.

    Source: Cuturi 2013; Peyre and Cuturi 2019.
    """
    return _sinkhorn.sinkhorn(
        cost, text_pad, image_pad, epsilon, iterations, tolerance, text_marginal, image_marginal, gradient, backend
    )


def word_patch_distance(
    text: Tensor,
    image: Tensor,
    text_pad: Tensor,
    image_pad: Tensor,
    *,
    beta: float = 0.5,
    iterations: int = 50,
    inner: int = 1,
    return_plan: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Optimal transport distance between words and patches: cosine cost C, IPOT plan T, ``<C, T>``.

    Args:
        text: [B, M, D], image: [B, N, D] hidden states of one floating dtype; text_pad, image_pad: bool, True where
            padded. Padded rows are never read. beta, iterations, inner: see :func:`ipot`.
        return_plan: also return T [B, M, N].

    Returns:
        distance [B] in float32 (float64 for float64 inputs), 0 for a sample without real tokens or patches.
        Differentiable in text and image with T constant. NaN in a real row makes that sample's distance NaN, no other.

    Source: ViLT (Kim et al. 2021) sec. 3.2, the original ``optimal_transport_dist``.
    """
    return _word_patch_distance.word_patch_distance(
        text, image, text_pad, image_pad, beta, iterations, inner, return_plan, backend
    )


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """``cross_entropy(x W^T + b, labels)`` without keeping [R, V] logits, on the labelled rows only.

    Args:
        x: [R, D]; weight: [V, D]; bias: [V] or None; one floating dtype.
        labels: [R] int64 in 0..V-1 or ``ignore_index``.
        reduction: "mean" (over labelled rows; NaN when there is none, as torch), "sum" or "none" ([R], 0 if ignored).

    Returns:
        The loss in float32 (float64 for float64 inputs). Differentiable in x, weight and bias. On a GPU, where labels
        are not looked at, one out of range gives NaN.

    Source: ``torch.nn.functional.cross_entropy``.
    """
    return _linear_cross_entropy.linear_cross_entropy(x, weight, bias, labels, ignore_index, reduction, backend)

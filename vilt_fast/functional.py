"""The public ops. Every one takes ``backend=None`` (choose by device and support) or a backend's name (no fallback).

Errors, for all of them: ``ValueError`` for shapes and numbers, ``TypeError`` for dtypes, ``IndexError`` for ids or
labels out of range (looked at on the CPU only), ``RuntimeError`` when a backend asked for by name cannot run the call.
Nothing is modified in place. ``vilt_fast/ops/<op>.py`` holds each.
"""

from .ops.add_layer_norm import add_layer_norm
from .ops.add_layer_norm_fp8 import add_layer_norm_fp8
from .ops.attention import attention
from .ops.encoder import encoder
from .ops.ipot import ipot
from .ops.linear import linear
from .ops.linear_cross_entropy import linear_cross_entropy
from .ops.linear_fp8 import linear_fp8, quantize_fp8
from .ops.linear_gelu import linear_gelu
from .ops.linear_gelu_fp8 import linear_gelu_fp8
from .ops.linear_int8 import linear_int8
from .ops.linear_qkv import linear_qkv
from .ops.patch_embed import patch_embed
from .ops.quantize_linear import quantize_linear
from .ops.sinkhorn import SinkhornResult, sinkhorn
from .ops.text_embed import text_embed
from .ops.word_patch_distance import word_patch_distance
from .reference.encoder import LayerParameters

__all__ = [
    "LayerParameters", "SinkhornResult", "add_layer_norm", "add_layer_norm_fp8", "attention", "encoder", "ipot",
    "linear", "linear_cross_entropy", "linear_fp8", "linear_gelu", "linear_gelu_fp8", "linear_int8", "linear_qkv",
    "patch_embed", "quantize_fp8", "quantize_linear", "sinkhorn", "text_embed", "word_patch_distance",
]  # fmt: skip

"""Kernel rows: the widest linear layer with its GELU, one attention, one whole block, at the shapes of ViLT-B/32.

The first provider of each group is the base of the ratios: what HuggingFace's model does (F.linear and F.gelu; softmax
of a padded batch in matrix products; its own `ViltLayer`, padded).
"""

import contextlib
import copy
from functools import partial

import torch
import torch.nn.functional as F

from vilt_fast.commands import report

from . import cases as shapes
from . import measure, table

SUBJECTS = ("linear", "attention", "block")
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
WIDTH, FEATURES, HEADS, HEAD_DIM = 768, 3072, 12, 64


@torch.inference_mode()
def rows(subject, dtypes, repeats, step=lambda what: None):
    """Rows (without the columns of the machine) of a subject in the precisions given; only a block has int8 rows."""
    groups_of = {"linear": _linear_groups, "attention": _attention_groups, "block": _block_groups}[subject]
    found = []
    for dtype in (d for d in dtypes if d != "int8" or (subject == "block" and not report.unavailable(d))):
        groups = groups_of(dtype)
        for case, shape, calls, truth, flops, moved in groups:
            step(f"{subject} {dtype}: {case}")
            errors = {name: report.relative_error(call().double().flatten(), truth) for name, call in calls.items()}
            backends = {name: measure.backends(call) or "torch" for name, call in calls.items()}
            times = {name: report.quantiles(v) for name, v in report.interleave(calls, repeats, warmup=3).items()}
            base = next(iter(times.values()))[1]
            for name, quantiles in times.items():
                found.append(
                    {
                        "subject": subject,
                        "provider": name,
                        "backend": backends[name],
                        "case": case,
                        "shape": shape,
                        "dtype": dtype,
                        **table.times(quantiles, base),
                        "error": errors[name],
                        "flops": flops,
                        "bytes": moved,
                    }
                )
    return found


def _linear_groups(dtype):
    """Groups for fc1 and its GELU at one image's rows (185) and a batch's (1724)."""
    from vilt_fast import functional

    kind = getattr(torch, dtype)
    for tokens in (185, 1724):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(tokens, WIDTH, generator=generator).to(kind)
        weight = (torch.randn(FEATURES, WIDTH, generator=generator) / WIDTH**0.5).to(kind)
        bias = torch.randn(FEATURES, generator=generator).to(kind)
        calls = {"torch": partial(_linear_gelu, x, weight, bias)}
        with contextlib.suppress(RuntimeError, AttributeError):
            prepacked = measure.prepacked_linear(x, weight, bias)
            calls["onednn_prepacked"] = lambda call=prepacked: F.gelu(call())
        calls["ours"] = partial(functional.linear_gelu, x, weight, bias)
        truth = _linear_gelu(x.double(), weight.double(), bias.double()).flatten()
        moved = (x.numel() + weight.numel() + tokens * FEATURES) * BYTES[dtype]
        yield f"fc1_gelu_{tokens}", f"{tokens}x{WIDTH}x{FEATURES}", calls, truth, 2 * tokens * WIDTH * FEATURES, moved


def _linear_gelu(x, weight, bias):
    return F.gelu(F.linear(x, weight, bias))


def _attention_groups(dtype):
    """Groups for one attention layer over the sequences of the model's cases, packed [tokens, heads, head dim]."""
    from vilt_fast import functional, testing

    kind = getattr(torch, dtype)
    for case in (shapes.CASES["b1"], shapes.CASES["b8"]):
        lengths, most = case.lengths(), max(case.lengths())
        generator = torch.Generator().manual_seed(0)
        packed = [torch.randn(sum(lengths), HEADS, HEAD_DIM, generator=generator).to(kind) for _ in range(3)]
        offsets = testing.offsets(lengths)
        real = ~testing.padding_masks(lengths, case.padded_length())
        mask = torch.zeros(real.shape, dtype=kind).masked_fill(~real, -torch.inf)[:, None, None]
        padded = [_pad(x, real).transpose(1, 2).contiguous() for x in packed]
        calls = {
            "torch": partial(_eager_attention, *padded, mask, real),
            "sdpa_padded": partial(_sdpa, *padded, mask, real),
            "ours": partial(functional.attention, *packed, offsets, offsets, most, most),
        }
        truth = _eager_attention(*(x.double() for x in padded), mask.double(), real).flatten()
        flops = sum(4 * n * n * HEADS * HEAD_DIM for n in lengths)
        moved = 4 * sum(lengths) * HEADS * HEAD_DIM * BYTES[dtype]
        yield case.name, case.shape, calls, truth, flops, moved


def _pad(rows, real):
    """Packed rows [N, ...] in a zero batch [B, L, ...]; `real` is bool [B, L]."""
    padded = rows.new_zeros(*real.shape, *rows.shape[1:])
    padded[real] = rows
    return padded


def _eager_attention(q, k, v, mask, real):
    weights = (q @ k.transpose(-1, -2) / HEAD_DIM**0.5 + mask).softmax(-1)
    return (weights @ v).transpose(1, 2)[real]


def _sdpa(q, k, v, mask, real):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)[real]


def _block_groups(dtype):
    """Groups for one transformer block: HuggingFace's `ViltLayer` on the padded batch, ours on the packed rows."""
    from transformers import ViltConfig
    from transformers.models.vilt.modeling_vilt import ViltLayer

    from vilt_fast import functional, testing

    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    torch.manual_seed(0)
    config = ViltConfig(hidden_size=WIDTH, intermediate_size=FEATURES, num_attention_heads=HEADS)
    layer = ViltLayer(config).eval()
    own, exact = copy.deepcopy(layer).to(kind), copy.deepcopy(layer).double()
    inner = own.attention.attention
    modules = (own.layernorm_before, inner.query, inner.key, inner.value, own.attention.output.dense)
    modules += (own.layernorm_after, own.intermediate.dense, own.output.dense)
    parameters = [p.detach() for module in modules for p in (module.weight, module.bias)]
    if dtype == "int8":
        parameters = [functional.quantize_linear(p) if p.dim() == 2 else p for p in parameters]
    for case in (shapes.CASES["b1"], shapes.CASES["b8"]):
        lengths = case.lengths()
        real = ~testing.padding_masks(lengths, case.padded_length())
        x = torch.randn(sum(lengths), WIDTH, generator=torch.Generator().manual_seed(0))
        padded, mask = _pad(x, real), torch.zeros(real.shape).masked_fill(~real, -1e30)[:, None, None]
        used = torch.tensor(lengths, dtype=torch.int32)
        options = {"num_heads": HEADS, "eps": [config.layer_norm_eps] * 2, "compute": dtype}
        calls = {
            "hf_layer": partial(_hf_block, own, padded.to(kind), mask.to(kind), real),
            "ours": partial(functional.encoder, x, parameters, testing.offsets(lengths), used, max(lengths), **options),
        }
        truth = _hf_block(exact, padded.double(), mask.double(), real).flatten()
        flops = sum(lengths) * (8 * WIDTH**2 + 4 * WIDTH * FEATURES) + sum(4 * n * n * WIDTH for n in lengths)
        weights = (4 * WIDTH**2 + 2 * WIDTH * FEATURES) * BYTES[dtype]
        moved = weights + 2 * sum(lengths) * (8 * WIDTH + FEATURES) * 4
        yield case.name, case.shape, calls, truth, flops, moved


def _hf_block(layer, padded, mask, real):
    return layer(padded, mask)[0][real]

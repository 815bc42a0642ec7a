"""Batches for the objectives, models with the original's eps, and its losses written out sample by sample.

Nothing here goes through `vilt_fast`: hidden states are those of HuggingFace's own trunk, a sample at a time and cut to
what is real, so that nothing is padded anywhere.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from transformers import ViltConfig

import vilt_fast
from vilt_fast.testing import random_weights

PATCH, TEXT = 16, 9
GRIDS, FALSE_GRIDS = [(3, 5), (2, 4), (3, 1), (1, 1), (3, 3)], [(4, 3), (2, 2), (4, 1), (1, 2), (3, 3)]
LENGTHS = [9, 5, 7, 3, 9]
SIZES = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=64, patch_size=PATCH,
    vocab_size=50, max_position_embeddings=12, num_labels=5,
)  # fmt: skip


def build(kind, dtype=torch.float64, **config):
    """A tiny model in eval mode, with the original's eps in blocks and final norm."""
    model = random_weights(kind(ViltConfig(**SIZES | config)))
    for path, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) and ("layernorm_" in path or path.endswith("vilt.layernorm")):
            module.eps = 1e-6
    return model.to(dtype).eval()


def accelerated(model, **options):
    """A copy of a model, accelerated."""
    return vilt_fast.accelerate(copy.deepcopy(model), **options)


def pictures(grids, draw, dtype=torch.float64):
    """(pixel_values [B, 3, H, W] with NaN beside the images, pixel_mask)."""
    height, width = (max(side) * PATCH for side in zip(*grids, strict=True))
    mask = torch.zeros(len(grids), height, width, dtype=torch.long)
    for b, (h, w) in enumerate(grids):
        mask[b, : h * PATCH, : w * PATCH] = 1
    pixels = torch.randn(len(grids), 3, height, width, generator=draw, dtype=torch.float64).to(dtype)
    return pixels.masked_fill(mask[:, None] == 0, 0.0), mask


def batch(dtype=torch.float64, size=5, seed=0):
    """A batch as the collator makes it, ragged in text and images; sample 2 has no masked token."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 50, (size, TEXT), generator=draw)
    mask = (torch.arange(TEXT) < torch.tensor(LENGTHS[:size])[:, None]).long()
    labels = torch.full_like(ids, -100)
    for sample, place in ((0, 2), (0, 3), (1, 3), (3, 1), (4, 7)):
        if sample < size:
            labels[sample, place] = ids[sample, place]
    pixels, pixel_mask = pictures(GRIDS[:size], draw, dtype)
    false, false_mask = pictures(FALSE_GRIDS[:size], draw, dtype)
    return {
        "input_ids": ids, "attention_mask": mask, "token_type_ids": torch.randint(0, 2, ids.shape, generator=draw),
        "mlm_input_ids": ids.masked_fill(labels != -100, 3), "labels": labels, "pixel_values": pixels,
        "pixel_mask": pixel_mask, "false_pixel_values": false, "false_pixel_mask": false_mask,
    }  # fmt: skip


def hidden(trunk, ids, types, pixels, pixel_mask, modality=None):
    """(text [t, D], image [1 + patches, D], pooled [D]) of one sample without padding, by HuggingFace's own trunk."""
    height, width = int(pixel_mask[:, 0].sum()), int(pixel_mask[0].sum())
    out = trunk(
        input_ids=ids[None], token_type_ids=types[None], pixel_values=pixels[None, :, :height, :width],
        pixel_mask=torch.ones(1, height, width), image_token_type_idx=modality,
    )  # fmt: skip
    text, image = out.last_hidden_state[0].tensor_split([len(ids)])
    return text, image, None if out.pooler_output is None else out.pooler_output[0]


def of_sample(trunk, given, b, *, ids="input_ids", image="pixel"):
    """`hidden` of sample b of a batch, with these ids and this image."""
    real = given["attention_mask"][b].bool()
    return hidden(
        trunk, given[ids][b][real], given["token_type_ids"][b][real], given[f"{image}_values"][b],
        given[f"{image}_mask"][b],
    )  # fmt: skip


def mlm(model, given):
    """Mean over labelled tokens of -log softmax(head)[label]."""
    losses = []
    for b, labels in enumerate(given["labels"]):
        text, _, _ = of_sample(model.vilt, given, b, ids="mlm_input_ids")
        for place, label in enumerate(labels.tolist()):
            if label != -100:
                losses.append(-model.mlm_score(text[place]).log_softmax(-1)[label])
    return sum(losses) / len(losses)


def matched(model, given, labels):
    """The states of each sample, with its own image where its label is 1."""
    images = ["pixel" if label == 1 else "false_pixel" for label in labels.tolist()]
    return [of_sample(model.vilt, given, b, image=image) for b, image in enumerate(images)]


def itm(model, given, labels):
    """Mean over samples of -log softmax(head)[label]."""
    states = matched(model, given, labels)
    losses = [-model.itm_score(s[2]).log_softmax(-1)[label] for s, label in zip(states, labels.tolist(), strict=True)]
    return sum(losses) / len(losses)


def wpa(model, given, labels):
    """0.1 * (sum of distances of pairs - sum of those of the others) / samples, in float32; 50 rounds at beta 0.5."""
    total = 0.0
    for (text, image, _), label in zip(matched(model, given, labels), labels.tolist(), strict=True):
        words, patches = text[1:-1].float(), image[1:].float()
        cost = 1 - F.normalize(words, dim=-1, eps=1e-5) @ F.normalize(patches, dim=-1, eps=1e-5).T
        kernel = torch.exp(-cost.detach() / 0.5)
        plan, sigma = torch.ones_like(kernel), torch.ones(len(words)) / len(words)
        for _ in range(50):
            q = kernel * plan
            delta = 1 / (len(patches) * (q.T @ sigma))
            sigma = 1 / (len(words) * (q @ delta))
            plan = sigma[:, None] * q * delta
        total = total + (cost * plan).sum() * (1 if label == 1 else -1)
    return 0.1 * total / len(labels)


def gradients(model, loss):
    """{name: gradient, zeros where there is none}."""
    model.zero_grad()
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}

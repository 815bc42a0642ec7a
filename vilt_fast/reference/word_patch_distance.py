"""Word-patch alignment distance: cosine costs, IPOT plan, <C, T>.

    C_ij = 1 - t_i . v_j / (max(|t_i|, 1e-5) max(|v_j|, 1e-5));   T = ipot(C);   distance = sum_ij C_ij T_ij

T is a constant for the gradient, so d distance / d C = T. Padded entries of C are 0, padded rows are never read.
Shapes: text [B, M, D], image [B, N, D]; text_pad [B, M], image_pad [B, N] bool, True where padded. Returns the
distance [B] (and T [B, M, N] on request) in float32, or float64 for float64 inputs.
Source: ViLT (Kim et al. 2021) sec. 3.2 and the original `optimal_transport_dist`; UNITER (Chen et al. 2020).
"""

import torch
import torch.nn.functional as F

from .ipot import ipot


def cosine_cost(text, image, text_pad, image_pad):
    """C [B, M, N] with zeros on padding, differentiable; padded rows contribute nothing, whatever they hold."""
    wide = torch.promote_types(text.dtype, torch.float32)
    text = F.normalize(text.to(wide).masked_fill(text_pad.unsqueeze(2), 0), dim=-1, eps=1e-5)
    image = F.normalize(image.to(wide).masked_fill(image_pad.unsqueeze(2), 0), dim=-1, eps=1e-5)
    pad = text_pad.unsqueeze(2) | image_pad.unsqueeze(1)
    return (1 - text @ image.transpose(1, 2)).masked_fill(pad, 0)


def word_patch_distance(text, image, text_pad, image_pad, *, beta=0.5, iterations=50, inner=1, return_plan=False):
    cost = cosine_cost(text, image, text_pad, image_pad)
    plan = ipot(cost, text_pad, image_pad, beta=beta, iterations=iterations, inner=inner)
    distance = (cost * plan).sum((1, 2))
    return (distance, plan) if return_plan else distance

"""Word-patch alignment with the names, signatures and orientation of the original `vilt/modules/objectives.py`.

    from vilt_fast.objectives.wpa import cost_matrix_cosine, ipot, optimal_transport_dist, trace

in place of the original's import leaves code that uses them as it is. Differences: `k` > 1 works (the original stops
with an error), results are float32 for half-precision inputs, and what padding holds has no influence, even NaN.
Source: ViLT (Kim et al. 2021) sec. 3.2; UNITER (Chen et al. 2020).
"""

import torch
import torch.nn.functional as F

from .. import functional

WEIGHT = 0.1  # of the alignment distance in the loss


def cost_matrix_cosine(x, y, eps=1e-5):
    """1 - cosine of every pair: x [B, M, D], y [B, N, D] -> [B, M, N]. Norms are clamped at ``eps``; differentiable."""
    if x.dim() != 3 or y.dim() != 3 or x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2]:
        raise ValueError(
            f"cost_matrix_cosine: x has shape {list(x.shape)} and y {list(y.shape)}, expected [B, M, D] and [B, N, D]."
        )
    return 1 - F.normalize(x, dim=-1, eps=eps) @ F.normalize(y, dim=-1, eps=eps).transpose(1, 2)


def trace(x):
    """Trace of each matrix: x [B, N, N] -> [B]."""
    if x.dim() != 3 or x.shape[1] != x.shape[2]:
        raise ValueError(f"trace: x has shape {list(x.shape)}, expected [B, N, N].")
    return x.diagonal(dim1=1, dim2=2).sum(-1)


@torch.no_grad()
def ipot(C, x_len, x_pad, y_len, y_pad, joint_pad, beta, iteration, k, *, backend=None):
    """Transport plan of IPOT in the original's orientation: T [B, N, M], the transpose of the costs' shape.

    Args:
        C: costs [B, M, N].
        x_len, y_len: [B], real tokens and patches of each sample; joint_pad: [B, M, N]. They say what the masks say
            already: only x_len is used beyond that, which the original divides the plan by.
        x_pad: [B, M] bool, y_pad: [B, N] bool, True where padded.
        beta, iteration, k: see :func:`vilt_fast.functional.ipot`.
    """
    if joint_pad.shape != C.shape:
        raise ValueError(f"ipot: joint_pad has shape {list(joint_pad.shape)}, expected {list(C.shape)}.")
    plan = functional.ipot(C, x_pad, y_pad, beta=beta, iterations=iteration, inner=k, backend=backend)
    real = (~x_pad).sum(1)
    share = torch.where(real == 0, 1, real / x_len)  # 1 wherever x_len is what it should be
    return (plan * share[:, None, None].to(plan.dtype)).transpose(1, 2)


def optimal_transport_dist(txt_emb, img_emb, txt_pad, img_pad, beta=0.5, iteration=50, k=1, *, backend=None):
    """Distance [B] between words txt_emb [B, M, D] and patches img_emb [B, N, D]; masks are bool, True where padded.

    Differentiable in both embeddings, the transport plan is a constant. See
    :func:`vilt_fast.functional.word_patch_distance`.
    """
    with torch.autocast(txt_emb.device.type, enabled=False):
        return functional.word_patch_distance(
            txt_emb, img_emb, txt_pad, img_pad, beta=beta, iterations=iteration, inner=k, backend=backend
        )


def wpa_loss(text_feats, image_feats, text_masks, image_masks, itm_labels, *, distilled=False, backend=None):
    """The alignment part of image-text matching: ``0.1 * (sum over pairs - sum over non-pairs) / (number of both)``.

    Text [CLS], the last real text token ([SEP]) and image [CLS] take no part. Features are used in float32, whatever
    autocast says; beta is 0.5 and there are 50 iterations.

    Args:
        text_feats: [B, M, D], image_feats: [B, N, D], final hidden states, [CLS] first.
        text_masks: [B, M], image_masks: [B, N], non-zero where real (HuggingFace's sense); not modified.
        itm_labels: [B], 1 for a pair, 0 for a text and an image that do not belong together; others are not counted.
        distilled: the image has a distillation token after its [CLS] (DeiT trunks), left out too.

    Returns:
        A scalar; NaN without any pair or non-pair, like the original.

    Source: ``compute_itm_wpa`` of the original, ``itm_wpa_loss``.
    """
    text_real, image_real = text_masks.bool().clone(), image_masks.bool().clone()
    if text_real.shape[1]:
        # The original counts the real tokens and takes the one at that position: texts are padded at the end.
        last = (text_real.sum(1, keepdim=True) - 1) % text_real.shape[1]
        text_real.scatter_(1, last, False)
    text_real[:, 0:1] = False
    image_real[:, 0 : 2 if distilled else 1] = False
    distance = optimal_transport_dist(text_feats.float(), image_feats.float(), ~text_real, ~image_real, backend=backend)
    pair, other = itm_labels == 1, itm_labels == 0
    signs = pair.to(distance.dtype) - other.to(distance.dtype)
    # Selected, not multiplied by 0: a label that is neither keeps its distance, NaN included, out of the loss.
    signed = torch.where(signs == 0, 0, distance * signs)
    return WEIGHT * (signed.sum() / (pair | other).sum())

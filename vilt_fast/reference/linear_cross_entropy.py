"""Cross entropy of a linear head on the labelled rows only: loss_r = LSE_v(x_r W^T + b) - (x_r W^T + b)[label_r].

Shapes: x [R, D]; weight [V, D]; bias [V] or None; labels [R] int64, `ignore_index` where there is none;
or floating [R, V], probabilities, and then every row has a label: loss_r = -sum_v label_rv log softmax(x_r W^T + b)_v.
Rows without a label are never read. Where the rest have more than KEPT logits, they go through in chunks of at most
CHUNK, recomputed in the backward, so that [R, V] logits never exist at once. Reduction "mean" divides by the number of
labelled rows: NaN when there is none, as in torch; "sum" gives 0; "none" gives [R] with 0 on the ignored rows.
Losses are summed in at least float32 and returned so. Source: torch.nn.functional.cross_entropy.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 1 << 24  # logits alive at once
KEPT = 1 << 22  # logits that are not worth a second product with the weight: 137 rows of BERT's vocabulary


def _losses(x, weight, bias, labels):
    logits = F.linear(x, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if labels.is_floating_point():
        labels = labels.detach().to(logits.dtype)
    return F.cross_entropy(logits, labels, reduction="none")


def linear_cross_entropy(x, weight, bias, labels, *, ignore_index=-100, reduction="mean"):
    if labels.is_floating_point():
        kept = torch.arange(len(labels), device=labels.device)
    else:
        kept = (labels != ignore_index).nonzero().squeeze(1)
    rows = max(1, CHUNK // weight.shape[0])
    if len(kept) * weight.shape[0] <= KEPT:
        losses = _losses(x[kept], weight, bias, labels[kept])
    else:
        chunks = [
            checkpoint(_losses, x[part], weight, bias, labels[part], use_reentrant=False) for part in kept.split(rows)
        ]
        losses = torch.cat(chunks)
    if reduction == "none":
        return losses.new_zeros(len(labels)).index_copy(0, kept, losses)
    return losses.sum() if reduction == "sum" else losses.mean()

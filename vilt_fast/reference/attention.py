"""Attention over packed samples: for each sample and head, O = dropout(softmax(scale * Q K^T)) V.

Shapes: q [Nq, H, d]; k, v [Nk, H, d]; sample b owns query rows cu_seqlens_q[b]:cu_seqlens_q[b+1] and key rows
cu_seqlens_k[b]:cu_seqlens_k[b+1], of which only the leading seqused_k[b] are keys (None: all of them).
scale defaults to 1/sqrt(d). Returns out [Nq, H, d] and, on request, lse [H, Nq] = log sum_j exp(scale * q.k_j) in
float32 (float64 for float64 inputs).

causal_start [B] (prefix language modelling): within a sample, key row j >= start is visible only to query rows
i >= max(start, j): the rows before start see each other and nothing later, the rest see the prefix and their own past.

A sample without keys gives zeros and lse = -inf: the sum over an empty set is zero.
Source: Vaswani et al. 2017, eq. 1; `seqused_k` as in flash-attn.
"""

import torch


def visible(start, q_len, k_len, device):
    """Boolean [..., q_len, k_len], True where a query row may look; start: int or [...] tensor."""
    i = torch.arange(q_len, device=device).unsqueeze(1)
    j = torch.arange(k_len, device=device)
    start = torch.as_tensor(start, device=device)[..., None, None]
    return (j < start) | ((i >= start) & (j <= i))


def attention(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *,
    seqused_k=None, causal_start=None, dropout_p=0.0, scale=None, return_lse=False, generator=None,
):  # fmt: skip
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q_rows, k_rows = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs, lses = [], []
    for b in range(len(q_rows) - 1):
        k_end = k_rows[b + 1] if seqused_k is None else k_rows[b] + int(seqused_k[b])
        qs = q[q_rows[b] : q_rows[b + 1]].transpose(0, 1)
        ks = k[k_rows[b] : k_end].transpose(0, 1)
        vs = v[k_rows[b] : k_end].transpose(0, 1)
        scores = (qs @ ks.transpose(1, 2)) * scale
        if causal_start is not None:
            seen = visible(int(causal_start[b]), qs.shape[1], ks.shape[1], q.device)
            scores = scores.masked_fill(~seen, float("-inf"))
        probs = scores.softmax(-1)
        if dropout_p > 0:
            keep = torch.empty_like(probs).bernoulli_(1 - dropout_p, generator=generator)
            probs = probs * keep / (1 - dropout_p)
        outs.append((probs @ vs).transpose(0, 1))
        if return_lse:
            lses.append(scores.to(torch.promote_types(q.dtype, torch.float32)).logsumexp(-1))
    out = torch.cat(outs)
    return (out, torch.cat(lses, 1)) if return_lse else out

"""IPOT, the inexact proximal point method for optimal transport, exactly as ViLT and UNITER run it, in logarithms.

For one sample with M real text tokens, N real patches, costs C [M, N] and A = exp(-C/beta):

    T = 1;  sigma = 1/M                                      (sigma: one value a text token)
    `iterations` times:
        Q = A o T
        `inner` times:  delta_j = 1 / (N sum_i Q_ij sigma_i)         (image first)
                        sigma_i = 1 / (M sum_j Q_ij delta_j)         (then text; sigma carries over)
        T_ij = delta_j Q_ij sigma_i

The count is part of the definition: 50 iterations have not converged (the text marginals of T are exact, the image
marginals are not). T, delta and sigma are kept as logarithms, because A alone leaves float32 at beta = 0.02
(exp(-2/0.02) = 4e-44) and entries of T shrink geometrically.

Shapes: cost [B, M, N] float; text_pad [B, M], image_pad [B, N] bool, True where padded. Returns T [B, M, N], zero on
padding; a sample with no real token or no real patch gives zeros. No gradient (the original takes none).
Source: Xie et al. 2020 (arXiv:1802.04307), algorithm 1; Chen et al. 2020 (UNITER), appendix.
"""

import torch


@torch.no_grad()
def ipot(cost, text_pad, image_pad, *, beta=0.5, iterations=50, inner=1):
    cost = cost.detach().to(torch.promote_types(cost.dtype, torch.float32))  # forward-mode AD looks past no_grad
    if cost.numel() == 0:
        return torch.zeros_like(cost)
    text_pad = text_pad | image_pad.all(1, keepdim=True)  # nothing to move to: nothing moves
    image_pad = image_pad | text_pad.all(1, keepdim=True)
    pad = text_pad.unsqueeze(2) | image_pad.unsqueeze(1)
    log_m = (~text_pad).sum(1, keepdim=True).clamp(min=1).to(cost.dtype).log()
    log_n = (~image_pad).sum(1, keepdim=True).clamp(min=1).to(cost.dtype).log()

    log_a = cost.masked_fill(pad, 0) / -beta
    log_t = torch.zeros_like(cost).masked_fill(pad, float("-inf"))
    log_sigma = (-log_m).expand_as(text_pad)
    for _ in range(iterations):
        log_q = log_a + log_t
        for _ in range(inner):
            log_delta = -log_n - (log_q + log_sigma.unsqueeze(2)).logsumexp(1)
            log_delta = log_delta.masked_fill(image_pad, 0)
            log_sigma = -log_m - (log_q + log_delta.unsqueeze(1)).logsumexp(2)
            log_sigma = log_sigma.masked_fill(text_pad, 0)
        log_t = log_delta.unsqueeze(1) + log_q + log_sigma.unsqueeze(2)
    return log_t.exp()

"""Entropic optimal transport by Sinkhorn's algorithm in the log domain, masked and batched.

For one sample with costs C [M, N], marginals mu (text) and nu (image):

    minimise over T with T 1 = mu, T^t 1 = nu:   <C, T> + epsilon * KL(T || mu nu^t)

    u = v = 0;  `iterations` times:  u_i = epsilon (log mu_i - LSE_j (v_j - C_ij) / epsilon)       (text)
                                     v_j = epsilon (log nu_j - LSE_i (u_i - C_ij) / epsilon)       (image)
    T_ij = exp((u_i + v_j - C_ij) / epsilon)

so the image marginals of T are exact and `marginal_error` = sum_i |sum_j T_ij - mu_i| measures the text side.
With a tolerance, a sample whose error has reached it stays as it is from then on (masked, not skipped: looking would
synchronise with the host); `iterations` counts what each sample used.

Shapes: cost [B, M, N]; text_pad [B, M], image_pad [B, N] bool, True where padded; optional weights text_marginal
[B, M], image_marginal [B, N] >= 0, normalised here to sum 1 over the real entries (default: uniform); an entry of
weight 0 counts as padded. A sample with nothing real gives a zero plan, value 0 and error 0.

Gradient: with "envelope" the plan is a constant and d value / d C = T (Danskin's theorem, exact at convergence; the
marginals get none); with "unrolled" autograd goes through every iteration, into cost and marginals, for plan and value.
Source: Cuturi 2013; log-domain form and envelope gradient: Peyre and Cuturi 2019, remark 4.22 and proposition 4.6.
"""

from typing import NamedTuple

import torch


class SinkhornResult(NamedTuple):
    plan: torch.Tensor  # [B, M, N]
    value: torch.Tensor  # [B] <C, T> + epsilon * KL(T || mu nu^t)
    iterations: torch.Tensor  # [B] int64, used by each sample
    marginal_error: torch.Tensor  # [B] L1 error of the text marginals


def _log_weights(marginal, pad, dtype):
    """(log of the normalised weights with 0 on padding, padding including weight 0)."""
    weight = torch.ones_like(pad, dtype=dtype) if marginal is None else marginal.to(dtype)
    pad = pad | (weight == 0)
    weight = weight.masked_fill(pad, 0)
    total = weight.sum(1, keepdim=True)
    return (weight.masked_fill(pad, 1).log() - total.masked_fill(total == 0, 1).log()).masked_fill(pad, 0), pad


def sinkhorn(
    cost, text_pad, image_pad, *, epsilon=0.1, iterations=100, tolerance=None, text_marginal=None,
    image_marginal=None, gradient="envelope",
):  # fmt: skip
    cost = cost.to(torch.promote_types(cost.dtype, torch.float32))
    solved = cost
    if gradient == "envelope":  # forward-mode AD looks past the grad mode
        solved, text_marginal, image_marginal = (
            None if t is None else t.detach() for t in (cost, text_marginal, image_marginal)
        )
    with torch.set_grad_enabled(torch.is_grad_enabled() and gradient == "unrolled"):
        log_mu, text_pad = _log_weights(text_marginal, text_pad, cost.dtype)
        log_nu, image_pad = _log_weights(image_marginal, image_pad, cost.dtype)
        text_pad = text_pad | image_pad.all(1, keepdim=True)
        image_pad = image_pad | text_pad.all(1, keepdim=True)
        pad = text_pad.unsqueeze(2) | image_pad.unsqueeze(1)
        low = torch.finfo(torch.float32).min / 4  # finite, so that gradients of padded entries are 0 and not NaN
        scores = solved.masked_fill(pad, 0) / -epsilon

        def text_sums(log_v):  # log sum_j exp((v_j - C_ij) / epsilon)
            return (scores + log_v.unsqueeze(1)).masked_fill(pad, low).logsumexp(2)

        def image_sums(log_u):
            return (scores + log_u.unsqueeze(2)).masked_fill(pad, low).logsumexp(1)

        def text_error(log_u, log_v):
            real = (log_u + text_sums(log_v)).masked_fill(text_pad, low).exp() - log_mu.masked_fill(text_pad, low).exp()
            return real.abs().sum(1)

        log_u, log_v = torch.zeros_like(log_mu), torch.zeros_like(log_nu)  # u / epsilon, v / epsilon
        running = ~text_pad.all(1)
        used = torch.zeros_like(running, dtype=torch.int64)
        for _ in range(iterations if cost.numel() else 0):
            next_u = (log_mu - text_sums(log_v)).masked_fill(text_pad, 0)
            next_v = (log_nu - image_sums(next_u)).masked_fill(image_pad, 0)
            log_u = torch.where(running.unsqueeze(1), next_u, log_u)
            log_v = torch.where(running.unsqueeze(1), next_v, log_v)
            used = used + running
            if tolerance is not None:
                running = running & (text_error(log_u, log_v).detach() > tolerance)

        log_plan = (scores + log_u.unsqueeze(2) + log_v.unsqueeze(1)).masked_fill(pad, low)
        plan = log_plan.exp()
        log_ratio = (log_plan - log_mu.unsqueeze(2) - log_nu.unsqueeze(1)).masked_fill(pad, 0)
        entropy = epsilon * (plan * log_ratio).sum((1, 2))
        error = text_error(log_u, log_v).detach() if cost.numel() else torch.zeros_like(entropy)
    value = (cost.masked_fill(pad, 0) * plan).sum((1, 2)) + entropy
    return SinkhornResult(plan, value, used, error)

"""Optimal transport rows: IPOT, Sinkhorn, and hidden states to distance with gradient, at ViLT's shapes.

Batch 32, at most 40 words x 241 patches ([CLS] counted), 50 iterations at beta 0.5; `full`: no padding, `mixed`: the
lengths of the model's case b8, four times over. The first provider of each group is the base of the ratios: the loop
that ViLT and UNITER run, some 11 kernels an iteration over the padded batch. POT has no (correct) IPOT: its row is 50
of its Sinkhorn iterations, one sample after the other, cropped to what is real: less work, and not the same result.

A timed sample is the mean of some 30 ms of calls in a row: one call of a millisecond on its own would measure the
caches and the sleeping threads that the provider before it leaves behind.
"""

import importlib.util
from functools import partial

import torch
import torch.nn.functional as F

from vilt_fast import functional, testing
from vilt_fast.commands import report

from . import cases as shapes
from . import measure, table

BATCH, WIDTH, ITERATIONS, BETA, EPSILON = 32, 768, 50, 0.5, 0.1


def lengths(kind):
    """(words, patches) of each sample."""
    case = shapes.CASES["b8"]
    if kind == "full":
        words, patches = [max(case.texts)], [max(n - t for n, t in zip(case.lengths(), case.texts, strict=True))]
    else:
        words, patches = list(case.texts), [n - t for n, t in zip(case.lengths(), case.texts, strict=True)]
    return (words * BATCH)[:BATCH], (patches * BATCH)[:BATCH]


def rows(repeats, step=lambda what: None, sample=0.03):
    """Rows without the columns of the machine.

    Each case twice: calls in a row, about `sample` seconds long, and (`_single`) one call at a time in turn with the
    other providers', with cold caches and threads that sleep.
    """
    found = []
    for group in (_ipot, _distance, _sinkhorn):
        for kind in ("full", "mixed"):
            words, patches = lengths(kind)
            name = f"{group.__name__[1:]}_{kind}"
            step(f"transport: {name}")
            calls, truth, flops, moved = group(words, patches)
            errors = {
                k: None if k.startswith("pot") else report.relative_error(c().double(), truth) for k, c in calls.items()
            }
            backends = {k: measure.backends(c) or ("pot" if k.startswith("pot") else "torch") for k, c in calls.items()}
            common = {"subject": "transport", "shape": f"b{BATCH} {max(words)}x{max(patches)}", "dtype": "float32"}
            common |= {"flops": flops, "bytes": moved}
            for case, length in ((name, sample), (f"{name}_single", 0)):
                times = {k: report.quantiles(v) for k, v in _seconds(calls, repeats, length).items()}
                base = next(iter(times.values()))[1]
                for provider, quantiles in times.items():
                    found.append(
                        common
                        | {
                            "provider": provider,
                            "backend": backends[provider],
                            "case": case,
                            **table.times(quantiles, base),
                            "error": errors[provider],
                        }
                    )
    return found


def _seconds(calls, repeats, sample):
    """Seconds of one call, `{name: [repeats values]}`, from interleaved runs of about `sample` seconds each."""
    counts = {name: max(1, round(sample / measure.best_of(call, sample))) for name, call in calls.items()}

    def run(name):
        for _ in range(counts[name]):
            calls[name]()

    times = report.interleave({name: partial(run, name) for name in calls}, repeats, warmup=1)
    return {name: [seconds / counts[name] for seconds in values] for name, values in times.items()}


def _cells(words, patches):
    return sum(m * n for m, n in zip(words, patches, strict=True))


def _inputs(words, patches):
    """Hidden states whose costs spread as a trained model's do, and masks."""
    generator = torch.Generator().manual_seed(0)
    topic = torch.randn(BATCH, 1, WIDTH, generator=generator)
    text = torch.randn(BATCH, max(words), WIDTH, generator=generator) + topic * torch.rand(
        BATCH, max(words), 1, generator=generator
    )
    image = torch.randn(BATCH, max(patches), WIDTH, generator=generator) + topic * torch.rand(
        BATCH, max(patches), 1, generator=generator
    )
    return text, image, testing.padding_masks(words), testing.padding_masks(patches)


def _costs(words, patches):
    text, image, text_pad, image_pad = _inputs(words, patches)
    cost = 1 - F.normalize(text, dim=-1) @ F.normalize(image, dim=-1).transpose(1, 2)
    return cost.masked_fill(text_pad.unsqueeze(2) | image_pad.unsqueeze(1), 0), text_pad, image_pad


def original_ipot(cost, text_pad, image_pad, iterations):
    """The recurrence as ViLT and UNITER write it: padded, patches by words, masks added to the denominators."""
    batch, words, patches = cost.shape
    pad = (text_pad.unsqueeze(2) | image_pad.unsqueeze(1)).transpose(1, 2)
    m, n = ((~mask).sum(1).to(cost.dtype).view(batch, 1, 1) for mask in (text_pad, image_pad))
    text_mask, image_mask = (mask.to(cost.dtype).unsqueeze(1) * 1e4 for mask in (text_pad, image_pad))
    sigma = (torch.ones_like(text_mask[:, 0]) / m[:, 0]).masked_fill(text_pad, 0)
    plan = torch.ones_like(cost.transpose(1, 2)).masked_fill(pad, 0)
    kernel = torch.exp(-cost.transpose(1, 2) / BETA).masked_fill(pad, 0)
    for _ in range(iterations):
        q = kernel * plan
        sigma = sigma.view(batch, words, 1)
        delta = 1 / (n * q.matmul(sigma).view(batch, 1, patches) + image_mask)
        sigma = 1 / (m * delta.matmul(q) + text_mask)
        plan = delta.view(batch, patches, 1) * q * sigma
    return plan.masked_fill(pad, 0).transpose(1, 2)


def original_distance(text, image, text_pad, image_pad):
    """Distance [B]: cosine costs, the loop, the trace of C T."""
    cost = 1 - F.normalize(text, dim=-1, eps=1e-5).matmul(F.normalize(image, dim=-1, eps=1e-5).transpose(1, 2))
    cost.masked_fill_(text_pad.unsqueeze(2) | image_pad.unsqueeze(1), 0)
    product = cost.matmul(original_ipot(cost.detach(), text_pad, image_pad, ITERATIONS).transpose(1, 2))
    diagonal = torch.eye(product.shape[1], dtype=torch.bool).expand_as(product)
    return product.masked_select(diagonal).view(len(text), -1).sum(1)


def _pot(cost, words, patches, epsilon, iterations):
    import warnings

    import numpy as np
    import ot

    real = [c[:m, :n].numpy() for c, m, n in zip(cost, words, patches, strict=True)]
    shares = [[np.full(k, 1 / k, np.float32) for k in c.shape] for c in real]

    def call():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that so few iterations have not converged
            return [
                ot.sinkhorn(*s, c, epsilon, numItermax=iterations, stopThr=0) for s, c in zip(shares, real, strict=True)
            ]

    return call


def _with_pot(calls, *arguments):
    return {**calls, "pot_one_by_one": _pot(*arguments)} if importlib.util.find_spec("ot") else calls


def _ipot(words, patches):
    arguments = _costs(words, patches)
    calls = {"original": partial(original_ipot, *arguments, ITERATIONS)}
    calls = _with_pot(calls, arguments[0], words, patches, BETA, ITERATIONS)
    calls["ours"] = partial(functional.ipot, *arguments, beta=BETA, iterations=ITERATIONS)
    truth = original_ipot(arguments[0].double(), *arguments[1:], ITERATIONS)
    cells = _cells(words, patches)
    # An iteration: one product and two multiply-adds an entry. Costs read, plan written.
    return calls, truth, 5 * cells * ITERATIONS, 8 * cells


def _sinkhorn(words, patches):
    arguments = _costs(words, patches)
    options = {"epsilon": EPSILON, "iterations": ITERATIONS}
    calls = {"reference": lambda: functional.sinkhorn(*arguments, **options, backend="reference").plan}
    calls = _with_pot(calls, arguments[0], words, patches, EPSILON, ITERATIONS)
    calls["ours"] = lambda: functional.sinkhorn(*arguments, **options).plan
    truth = functional.sinkhorn(arguments[0].double(), *arguments[1:], **options).plan
    cells = _cells(words, patches)
    return calls, truth, 4 * cells * ITERATIONS, 8 * cells


def _distance(words, patches):
    """Distance, then its gradient into text and image; the error is that of the gradients."""
    text, image, text_pad, image_pad = _inputs(words, patches)
    signs = torch.where(torch.arange(BATCH) % 2 == 0, 0.1 / BATCH, -0.1 / BATCH)

    def gradients(distance, dtype=torch.float32):
        given = [x.to(dtype).detach().requires_grad_() for x in (text, image)]

        def call():
            loss = (distance(*given, text_pad, image_pad) * signs.to(dtype)).sum()
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, given)])

        return call

    ours = partial(functional.word_patch_distance, beta=BETA, iterations=ITERATIONS)
    calls = {"original": gradients(original_distance), "ours": gradients(ours)}
    truth = gradients(original_distance, torch.float64)()
    cells, states = _cells(words, patches), (sum(words) + sum(patches)) * WIDTH
    # Three products over the width; states read twice, gradients written.
    return calls, truth, 6 * cells * WIDTH + 5 * cells * ITERATIONS, 12 * states

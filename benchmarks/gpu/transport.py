"""Optimal transport on a GPU: the loop that ViLT and UNITER run, and our backends; the loop too is timed in a graph.

64 pairs of 40 words and 240 patches, `full` and with the lengths of the mixed batch, 50 iterations, beta 0.5: plans
(`ipot`), and hidden states to distances with their gradients (`word_patch_distance`).
"""

from functools import partial

import torch
import torch.nn.functional as F

from vilt_fast import functional, testing
from vilt_fast.ops import registry

from .. import counts
from ..transport import BETA, original_ipot
from . import checks, timing


def transport(context):
    """The CUDA kernels, which were not built yet when all else was checked: their tests, and float64; then times."""
    if context.device.type == "cuda":
        for op in ("ipot", "sinkhorn", "word_patch_distance"):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                if checks.applies(op, dtype):
                    name = f"{op}, cuda, {str(dtype).removeprefix('torch.')}"
                    context.item(name, partial(checks.check, context, op, "cuda", dtype))
    for kind in ("mixed",) if context.dry else ("full", "mixed"):
        words, patches = lengths(context, kind)
        context.item(f"ipot, {kind}", partial(_ipot, context, kind, words, patches), 4.0)
        context.item(f"word_patch_distance, {kind}", partial(_distance, context, kind, words, patches), 4.0)
    if context.device.type == "cuda" and not context.warm and not registry.why_unavailable("ipot", "cuda"):
        context.item("tests", partial(checks.pytest, context, ["-m", "gpu", *checks.OF_THE_LIBRARY]), 10.0, 600.0)


def lengths(context, kind):
    """(words, patches) of each pair."""
    pairs, most_words, most_patches = (3, 5, 7) if context.dry else (64, 40, 240)
    if kind == "full":
        return [most_words] * pairs, [most_patches] * pairs
    case = context.case(2 if context.dry else 8)
    tokens = case.lengths(context.config.patch_size)
    patches = [n - 1 - t for n, t in zip(tokens, case.texts, strict=True)]
    return (list(case.texts) * pairs)[:pairs], (patches * pairs)[:pairs]


def distance_loop(text, image, text_pad, image_pad, iterations):
    """Distances [B]: cosine costs, the loop, <C, T> as a sum: the original selects a diagonal, which no graph holds."""
    cost = 1 - F.normalize(text, dim=-1, eps=1e-5) @ F.normalize(image, dim=-1, eps=1e-5).transpose(1, 2)
    cost = cost.masked_fill(text_pad.unsqueeze(2) | image_pad.unsqueeze(1), 0)
    with torch.no_grad():
        plan = original_ipot(cost, text_pad, image_pad, iterations)
    return (cost * plan).sum((1, 2))


def _inputs(context, words, patches):
    """Hidden states that share a topic, so that costs spread as a trained model's do; and masks."""
    draw, width = torch.Generator().manual_seed(0), context.config.hidden_size
    topic = torch.randn(len(words), 1, width, generator=draw)
    states = []
    for sizes in (words, patches):
        share = torch.rand(len(sizes), max(sizes), 1, generator=draw)
        states.append(torch.randn(len(sizes), max(sizes), width, generator=draw) + topic * share)
    given = (*states, testing.padding_masks(words), testing.padding_masks(patches))
    return [t.to(context.device) for t in given]


def _backends(context, op, **facts):
    """Our backends for this device, where they can run."""
    found = [name for name in registry.backends(op) if name == "triton" or name == context.device.type]
    for name in found[:]:
        if reason := registry.why_unavailable(op, name, device=context.device.type, **facts):
            context.note(f"{op}, {name}: {reason}", incomplete=name == "triton")
            found.remove(name)
    return found


@torch.no_grad()
def _ipot(context, kind, words, patches):
    text, image, text_pad, image_pad = _inputs(context, words, patches)
    cost = 1 - F.normalize(text, dim=-1) @ F.normalize(image, dim=-1).transpose(1, 2)
    cost = cost.masked_fill(text_pad.unsqueeze(2) | image_pad.unsqueeze(1), 0)
    calls = {"loop": partial(original_ipot, cost, text_pad, image_pad, context.iterations)}
    options = {"beta": BETA, "iterations": context.iterations}
    for backend in _backends(context, "ipot"):
        calls[backend] = partial(functional.ipot, cost, text_pad, image_pad, **options, backend=backend)
    truth = partial(original_ipot, cost.double(), text_pad, image_pad, context.iterations)
    shape = f"b{len(words)} {max(words)}x{max(patches)}"
    work = counts.ipot(words, patches, context.iterations)
    timing.group(context, "alignment", f"ipot {kind}", shape, "float32", calls, truth, work)


def _distance(context, kind, words, patches):
    text, image, text_pad, image_pad = _inputs(context, words, patches)
    options = {"beta": BETA, "iterations": context.iterations}
    loop = partial(distance_loop, iterations=context.iterations)

    def gradients(distance, dtype=torch.float32):
        given = [x.to(dtype).detach().requires_grad_() for x in (text, image)]

        def call():
            total = distance(*given, text_pad, image_pad)
            return [total, *torch.autograd.grad(total.sum(), given)]

        return call

    calls = {"loop": gradients(loop)}
    for backend in _backends(context, "word_patch_distance", requires_grad=True):
        calls[backend] = gradients(partial(functional.word_patch_distance, **options, backend=backend))
    forward = counts.word_patch_distance(words, patches, context.iterations, context.config.hidden_size)
    work = forward._replace(products=3 * forward.products, bytes=3 * forward.bytes)
    shape = f"b{len(words)} {max(words)}x{max(patches)}"
    truth = gradients(loop, torch.float64)
    timing.group(context, "alignment", f"distance and gradient {kind}", shape, "float32", calls, truth, work)
    with torch.no_grad():
        given = text, image, text_pad, image_pad
        calls = {"loop": partial(loop, *given)}
        for backend in _backends(context, "word_patch_distance"):
            calls[backend] = partial(functional.word_patch_distance, *given, **options, backend=backend)
        truth = partial(loop, text.double(), image.double(), text_pad, image_pad)
        timing.group(context, "alignment", f"distance {kind}", shape, "float32", calls, truth, forward)

"""A small ViLT learns the world of shapes: its model, its batches, its steps, and its examination."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from ..data import Collator, PairDataset, TokenBudget, WholeWordMasking
from ..data.shapes import VOCABULARY, World
from .samples import word_tokenizer

PATCH = 48  #: a cell of the world
TRANSPORT = {"beta": 0.5, "iterations": 50}  #: words are shown where the loss that was learnt had them: its own plan
LOSSES = ("mlm_loss", "itm_loss", "wpa_loss")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is learnt from, and how."""

    steps: int
    tokens: int = 700  #: packed tokens of a batch: about 29 scenes
    scenes: int = 20_000
    hidden: int = 128
    layers: int = 4
    patch: int = PATCH
    learning_rate: float = 2e-3
    masked: float = 0.3  #: share of the words; ViLT's 0.15 learns the same from twice as many steps
    alignment: float = 10.0  #: weight that word-patch alignment rises to, on top of its own 0.1
    aligned_after: float = 0.5  #: share of the steps without it: words find places once they know what they name
    seed: int = 0
    world: dict = dataclasses.field(default_factory=dict)  #: of :class:`World`


@dataclasses.dataclass(frozen=True)
class Step:
    """One step, taken."""

    number: int  #: from 1 on
    losses: dict[str, float]  #: of `LOSSES`, those that this step had
    seconds: float  #: since the first began, batches included


def tokenizer():
    """BERT's tokenizer with the words of the captions."""
    return word_tokenizer(VOCABULARY)


def model(plan: Plan):
    """A :class:`~vilt_fast.objectives.ViltForPreTraining` with weights drawn from the seed.

    They are drawn wider than HuggingFace's (0.08, positions too): so narrow a model learns several times faster then.
    """
    from transformers import ViltConfig

    from ..objectives import ViltForPreTraining

    torch.manual_seed(plan.seed)
    config = ViltConfig(
        hidden_size=plan.hidden, num_hidden_layers=plan.layers, num_attention_heads=plan.hidden // 32,
        intermediate_size=4 * plan.hidden, image_size=96, patch_size=plan.patch, vocab_size=len(VOCABULARY),
        max_position_embeddings=24, initializer_range=0.08,
    )  # fmt: skip
    made = ViltForPreTraining(config)
    with torch.no_grad():
        for parameter in (made.vilt.embeddings.position_embeddings, made.vilt.embeddings.cls_token):
            parameter.normal_(0, config.initializer_range)
    return made


def pairs(world: World, plan: Plan) -> PairDataset:
    """The scenes and their captions as samples, a false image each."""
    shorter = min(min(size) for size in world.sizes)
    return PairDataset(
        world, world.captions, tokenizer(), false_image=True, shorter=shorter, divisor=plan.patch, seed=plan.seed
    )


def batches(plan: Plan) -> Iterator[dict[str, torch.Tensor]]:
    """Batches without end, epoch after epoch."""
    world = World(plan.scenes, seed=plan.seed, **plan.world)
    samples = pairs(world, plan)
    collate = Collator(
        samples.tokenizer, masking=WholeWordMasking(samples.tokenizer, share=plan.masked, length=24), seed=plan.seed
    )
    sampler = TokenBudget(samples.lengths(world.sizes), plan.tokens, seed=plan.seed, drop_last=True)
    loader = DataLoader(samples, batch_sampler=sampler, collate_fn=collate)
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from loader


def train(learner, plan: Plan, steps: int | None = None) -> Iterator[Step]:
    """Pre-train in place, masked words and matching, later alignment too; yields after each of `steps` (the plan's).

    AdamW, betas 0.9 and 0.98, weight decay 0.01 but for biases and norms; a tenth of the plan's steps warm up, the
    others decay linearly to 0; gradients are clipped at norm 1.
    """
    from ..objectives import pretraining_loss

    learner.train()
    decayed, others = [], []
    for parameter in learner.parameters():
        (decayed if parameter.dim() > 1 else others).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
        lr=plan.learning_rate, betas=(0.9, 0.98), eps=1e-8,
    )  # fmt: skip
    warm = max(1, plan.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (plan.steps - step) / max(1, plan.steps - warm))
    )
    generator = torch.Generator().manual_seed(plan.seed)
    late = round(plan.steps * plan.aligned_after)
    begun = time.perf_counter()
    for number, batch in enumerate(itertools.islice(batches(plan), steps or plan.steps), 1):
        # Slowly: what comes at once takes words away from where they were.
        weights = {"wpa": plan.alignment * max(0, number - late) / max(1, plan.steps - late)}
        output = pretraining_loss(learner, batch, generator=generator, weights=weights)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses = {name: output[name].item() for name in LOSSES if name in output}
        yield Step(number, losses, time.perf_counter() - begun)


# --- the examination --------------------------------------------------------------------------------------------------


def held_out(plan: Plan, count: int, part: int = 1, **world) -> World:
    """Scenes that were not learnt from; `part` numbers sets of them."""
    return World(count, seed=plan.seed + (part << 20), **plan.world | world)


@torch.no_grad()
def examine(learner, plan: Plan, count: int = 256, candidates: int = 48) -> dict[str, float]:
    """What it has learnt, as shares of 1, on `count` held-out scenes for each question.

    masked_colour: each colour word masked on its own, told from the picture. itm: its own picture, and one of other
    shapes, told apart. image_recall, text_recall: the right one ranked first of `candidates` with different captions.
    colour_one, noun_one, colour_two, noun_two: see :func:`points`, in pictures of one and of two shapes.
    """
    learner.eval()
    world = held_out(plan, count)
    texts, images, tokens = _inputs(world, plan)
    marks = {"masked_colour": _colours(learner, world, texts, images, tokens.mask_token_id)}
    false = [_another(world, i) for i in range(count)]
    right = learner(**texts, **images).itm_logits.argmax(-1) == 1
    wrong = learner(**texts, **{name: tensor[false] for name, tensor in images.items()}).itm_logits.argmax(-1) == 0
    marks["itm"] = torch.stack((right, wrong)).float().mean().item()
    first = {caption: i for i, caption in reversed(list(enumerate(world.captions)))}
    few = torch.tensor(sorted(first.values())[:candidates])
    scores = torch.stack([_score(learner, texts, images, few, image) for image in few], 1)  # [texts, images]
    ranks = torch.arange(len(few))
    marks["image_recall"] = (scores.argmax(1) == ranks).float().mean().item()
    marks["text_recall"] = (scores.argmax(0) == ranks).float().mean().item()
    for shapes, share in (("one", 0.0), ("two", 1.0)):
        found = points(learner, held_out(plan, count, 2, pairs=share), plan)
        marks |= {f"{word}_{shapes}": part for word, part in zip(("colour", "noun"), found, strict=True)}
    return marks


def _inputs(world, plan):
    """(texts, images, tokenizer): the keyword arguments of a forward on all scenes."""
    samples = pairs(world, plan)
    batch = Collator(samples.tokenizer)([samples[i] for i in range(len(world))])
    texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return texts, {name: batch[name] for name in ("pixel_values", "pixel_mask")}, samples.tokenizer


def _colours(learner, world, texts, images, mask_id):
    """The share of colours that are told when they are masked."""
    named = [(i, place + 1) for i, scene in enumerate(world.scenes) for place, _ in scene.named()[::2]]  # after [CLS]
    rows, places = torch.tensor(named).T
    masked = {name: tensor[rows] for name, tensor in (texts | images).items()}
    right = masked["input_ids"][torch.arange(len(rows)), places]
    masked["input_ids"] = masked["input_ids"].index_put((torch.arange(len(rows)), places), torch.tensor(mask_id))
    said = learner(**masked).mlm_logits[torch.arange(len(rows)), places].argmax(-1)
    return (said == right).float().mean().item()


def _another(world, index):
    """The next scene of which no caption of this one is true."""
    shapes = [{(shape.colour, shape.kind) for shape in scene.shapes} for scene in world.scenes]
    return next(i % len(world) for i in range(index + 1, index + len(world)) if shapes[i % len(world)] != shapes[index])


def _score(learner, texts, images, few, image):
    """How well each of the texts goes with one image: log-odds of the matching head."""
    mask = images["pixel_mask"][image]
    real = int(mask[:, 0].sum()), int(mask[0].sum())
    one = {name: _repeated(tensor[image, ..., : real[0], : real[1]], len(few)) for name, tensor in images.items()}
    logits = learner(**{name: tensor[few] for name, tensor in texts.items()}, **one).itm_logits
    return logits[:, 1] - logits[:, 0]


def _repeated(tensor, count):
    return tensor.expand(count, *tensor.shape)


def points(learner, world, plan) -> tuple[float, float]:
    """Of colours, and of nouns: how many have the middle of their strongest patch in the box of the shape they name."""
    from ..alignment.align import align

    texts, images, _ = _inputs(world, plan)
    hits = []
    for scene, aligned in zip(world.scenes, align(learner, texts | images, **TRANSPORT), strict=True):
        columns = aligned.grid[1]
        side = aligned.image_size[1] / columns
        for word, shape in scene.named():
            row, column = divmod(int(aligned.plan[word].argmax()), columns)
            top, left, bottom, right = shape.box
            hits.append(bool(top <= (row + 0.5) * side <= bottom and left <= (column + 0.5) * side <= right))
    colours, nouns = hits[::2], hits[1::2]
    return sum(colours) / len(colours), sum(nouns) / len(nouns)

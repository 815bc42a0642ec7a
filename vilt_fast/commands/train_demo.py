"""`vilt-fast train-demo`: a small ViLT learns the world of shapes in minutes; curves, marks, heatmaps, a page."""

import dataclasses
import statistics
from pathlib import Path

import torch

from . import report
from .arguments import add_threads, set_threads, whole

STEPS = 1000
#: What is examined: how it is called, and what it should come to.
GOALS = {
    "masked_colour": ("masked colours told from the picture", 0.97),
    "itm": ("pictures that belong to the text told from others", 0.97),
    "colour_one": ("strongest patch of a colour within the shape, one in the picture", 0.85),
    "noun_one": ("strongest patch of a noun within the shape, one in the picture", 0.85),
    "colour_two": ("strongest patch of a colour within its shape, of two", None),
    "noun_two": ("strongest patch of a noun within its shape, of two", None),
    "image_recall": ("right picture of 48 ranked first", None),
    "text_recall": ("right text of 48 ranked first", None),
}
NAMES = {"mlm_loss": "masked words", "itm_loss": "matching", "wpa_loss": "alignment"}
OURS, THEIRS = "#1f6f8b", "0.6"


def add(commands):
    """The subcommand and its arguments."""
    parser = commands.add_parser("train-demo", help="a small ViLT learns pictures of shapes: curves, marks, heatmaps")
    parser.add_argument("--out", default="demo", help="where training.md and its pictures go (default: demo)")
    parser.add_argument("--steps", type=whole(1, 100_000), default=STEPS, help=f"(default: {STEPS})")
    parser.add_argument("--seed", type=whole(0, 2**31), default=0, help="of weights, scenes and draws (default: 0)")
    parser.add_argument(
        "--plain", type=whole(0, 100), default=10, metavar="PERCENT",
        help="steps that HuggingFace's own model takes too, for the curve beside (default: 10 in 100)",
    )  # fmt: skip
    add_threads(parser)
    parser.set_defaults(run=_run)


def _run(arguments, rest):
    from . import lesson

    set_threads(arguments.threads)
    plan = lesson.Plan(steps=arguments.steps, seed=arguments.seed)
    return 0 if run(plan, arguments.out, plain=arguments.plain / 100) else 1


def run(plan, out="demo", *, plain=0.1, scenes=256, console=None):
    """Train, examine and compare; write `out`/training.md, training.png and a picture a scene.

    `plain` is the share of the steps that HuggingFace's own model takes, with the same weights, batches and draws, to
    be drawn at its own speed. `scenes` are examined. Returns True if every goal of `GOALS` is reached.
    """
    import matplotlib  # noqa: F401  missing packages are to be named before minutes of work, not after
    from rich.console import Console

    import vilt_fast

    from . import lesson

    console = console or Console()
    learner = vilt_fast.accelerate(lesson.model(plan))
    ours = _trained(learner, plan, plan.steps, "vilt_fast", console)
    with console.status("Examining on held-out scenes"):
        marks = lesson.examine(learner, plan, scenes)
    other = lesson.model(plan)
    theirs = _trained(other, plan, round(plan.steps * plain), "HuggingFace", console) if plain else []

    table = _marks(marks)
    console.print(report.rich_table(f"After {plan.steps} steps, {ours[-1].seconds:.0f} s", *table, text_columns=1))
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    draw(out / "training.png", ours, theirs)
    pictures = _heatmaps(out, learner, plan)
    parameters = sum(parameter.numel() for parameter in learner.parameters())
    (out / "training.md").write_text(_markdown(plan, parameters, ours, theirs, table, pictures), encoding="utf-8")
    console.print(f"Wrote {out / 'training.md'} and its pictures", soft_wrap=True, markup=False)
    return all(goal is None or marks[name] >= goal for name, (_, goal) in GOALS.items())


def _trained(learner, plan, count, whose, console):
    """The steps, shown as they are taken: losses beside the bar, and a line now and then."""
    from . import lesson

    steps, every = [], max(1, plan.steps // 10)
    with report.progress(console) as bar:
        task = bar.add_task(whose, total=count)
        for step in lesson.train(learner, plan, count):
            steps.append(step)
            recent = _smooth(steps[-20:])
            bar.update(task, advance=1, description=f"{whose}: {recent}")
            if step.number % every == 0 or step.number == count:
                console.print(f"{whose}, step {step.number}, {step.seconds:.0f} s: {recent}", highlight=False)
    return steps


def _smooth(steps):
    """The mean losses of some steps, in words."""
    losses = {name: [step.losses[name] for step in steps if name in step.losses] for name in NAMES}
    return ", ".join(f"{NAMES[name]} {statistics.fmean(values):.3f}" for name, values in losses.items() if values)


def _marks(marks):
    """Header and rows of the examination's table."""
    rows = [
        (words, f"{100 * marks[name]:.1f} %", "" if goal is None else f"{100 * goal:.0f} %")
        for name, (words, goal) in GOALS.items()
    ]
    return ("on held-out scenes", "result", "goal"), rows


def draw(path, ours, theirs):
    """The losses against seconds, and the first of them against steps, where the two models should agree."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.4), facecolor="white", layout="constrained")
    axes = figure.subplots(2, 3)
    for column, (name, words) in enumerate(NAMES.items()):
        above, below = axes[:, column]
        for taken, colour, label in ((theirs, THEIRS, "HuggingFace"), (ours, OURS, "vilt_fast")):
            steps = [step for step in taken if name in step.losses]
            if not steps:
                continue
            losses = _running([step.losses[name] for step in steps])
            style = {"color": colour, "linewidth": 2.6 if taken is theirs else 1.5, "label": label}
            above.plot([step.seconds for step in steps], losses, **style)
            shown = sum(name in step.losses for step in theirs) or len(steps)
            below.plot([step.number for step in steps][:shown], losses[:shown], **style)
        above.set_title(words, fontsize=12, loc="left")
        above.set_xlabel("seconds")
        below.set_xlabel("steps")
        for axis in (above, below):
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25)
    axes[0, 0].legend(frameon=False)
    for axis in axes[:, 0]:
        axis.set_ylabel("loss")
    figure.savefig(path, dpi=110)
    return figure


def _running(values, window=10):
    """The mean of each value and those before it, `window` of them."""
    return [statistics.fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def _heatmaps(out, learner, plan, count=3):
    """A picture a held-out scene: which patches each word is transported to. Returns their names and captions."""
    from ..alignment.align import align
    from ..data import Collator
    from . import lesson

    world = lesson.held_out(plan, count)
    samples = lesson.pairs(world, plan)
    pictures = []
    for i, scene in enumerate(world.scenes):
        batch = Collator(samples.tokenizer)([samples[i]])
        names = ("input_ids", "attention_mask", "pixel_values", "pixel_mask")
        (aligned,) = align(learner, {name: batch[name] for name in names}, **lesson.TRANSPORT)
        aligned = dataclasses.replace(aligned, tokens=tuple(scene.caption.split()))
        aligned.save(out / f"training-{i + 1}.png", image=world[i], text=scene.caption, dpi=100)
        pictures.append((f"training-{i + 1}.png", scene.caption))
    return pictures


def _markdown(plan, parameters, ours, theirs, table, pictures):
    """The page."""
    from . import lesson

    model = f"{plan.layers} layers of {plan.hidden}, {parameters / 1e6:.2f} million parameters"
    lines = [
        "# A small ViLT learns the world of shapes",
        f"{model}, from random weights; {plan.steps} steps of masked words, image-text matching and word-patch "
        f"alignment, {plan.tokens} packed tokens a batch, in {ours[-1].seconds:.0f} s on {torch.get_num_threads()} "
        f"threads, torch {torch.__version__}. The pictures are drawn, the captions are true, and what is examined was "
        "never learnt from.",
        report.markdown_table(*table, text_columns=1),
        "![Losses against seconds and steps](training.png)",
    ]
    if theirs:
        first = ours[: len(theirs)]
        lines += [
            "Above: against seconds. HuggingFace's own model, with the same weights, batches and draws, took the first "
            f"{len(theirs)} steps too: {theirs[-1].seconds / len(theirs) * 1e3:.0f} ms a step, vilt_fast "
            f"{first[-1].seconds / len(first) * 1e3:.0f} ms in the same steps, making the batches included in both. "
            "Below: against steps, where the two curves should lie on each other.",
        ]
    lines += [
        "## Which patches each word is transported to",
        f"By the plan of the loss (beta {lesson.TRANSPORT['beta']}, {lesson.TRANSPORT['iterations']} iterations), in "
        f"patches of {plan.patch} x {plan.patch} pixels. Nobody tells a word its place. Alignment joins after "
        f"{plan.aligned_after:.0%} of the steps, when words know what they name, and its weight rises to the end; "
        "words find their places with some seeds only.",
    ]
    lines += [f"![{caption}]({name})" for name, caption in pictures]
    return "\n\n".join(lines) + "\n"

"""A small ViLT learns a small world through the accelerated path, which no broken gradient, loss or draw survives."""

import dataclasses

import pytest
import torch
from rich.console import Console

import vilt_fast
from vilt_fast import objectives
from vilt_fast.commands import lesson, main, train_demo

#: A cell a patch: three shapes in four colours on four or six patches.
SMALL = lesson.Plan(
    steps=220, tokens=640, scenes=4000,
    world={"kinds": 3, "colours": 4, "canvases": ((96, 96), (96, 144)), "wordy": False},
)  # fmt: skip


def test_it_learns_to_tell_colours_and_pictures():
    learner = vilt_fast.accelerate(lesson.model(SMALL))
    for _ in lesson.train(learner, SMALL):
        pass
    marks = lesson.examine(learner, SMALL, 128, 16)
    assert marks["masked_colour"] >= 0.9 and marks["itm"] >= 0.9, marks
    assert min(marks["image_recall"], marks["text_recall"]) >= 4 / 16, marks  # of 16, many of which are alike


BRIEF = dataclasses.replace(SMALL, steps=6, scenes=200, tokens=160, hidden=32, layers=2)


def steps(learner, count=None):
    return [step.losses for step in lesson.train(learner, BRIEF, count)]


def test_huggingfaces_own_model_takes_the_same_steps():
    """The same losses to the end: also what the curve of the other model in the demo rests on."""
    with torch.random.fork_rng():
        ours = steps(vilt_fast.accelerate(lesson.model(BRIEF)))
        theirs = steps(lesson.model(BRIEF))
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    assert len(ours) == 6 and ours[0] != ours[1]


def test_one_seed_is_one_run():
    first, again = (steps(vilt_fast.accelerate(lesson.model(BRIEF)), 3) for _ in range(2))
    assert first == again
    other = dataclasses.replace(BRIEF, seed=1)
    assert [s.losses for s in lesson.train(vilt_fast.accelerate(lesson.model(other)), other, 3)] != first


def test_alignment_rises_from_the_middle_on(monkeypatch):
    own, seen = objectives.pretraining_loss, []

    def noted(*args, weights, **options):
        seen.append(weights["wpa"])
        return own(*args, weights=weights, **options)

    monkeypatch.setattr(objectives, "pretraining_loss", noted, raising=False)
    shown = ["wpa_loss" in losses for losses in steps(vilt_fast.accelerate(lesson.model(BRIEF)))]
    assert seen == pytest.approx([0, 0, 0, BRIEF.alignment / 3, BRIEF.alignment * 2 / 3, BRIEF.alignment])
    assert shown == [False] * 3 + [True] * 3


def test_scenes_of_the_examination_were_not_learnt_from():
    learnt = lesson.World(BRIEF.scenes, seed=BRIEF.seed, **BRIEF.world)
    sets = [
        {scene.shapes for scene in world.scenes} for world in (learnt, *(lesson.held_out(BRIEF, 40, i) for i in (1, 2)))
    ]
    assert len(set.union(*sets)) == sum(map(len, sets)) == BRIEF.scenes + 80


def test_the_page(tmp_path):
    console = Console(file=open(tmp_path / "screen", "w"), width=100)
    assert not train_demo.run(BRIEF, tmp_path, plain=0.5, scenes=8, console=console)  # nothing is learnt in six steps
    console.file.close()
    page = (tmp_path / "training.md").read_text()
    for picture in ("training.png", "training-1.png", "training-2.png", "training-3.png"):
        assert f"({picture})" in page and (tmp_path / picture).stat().st_size > 5000
    assert "first 3 steps" in page and "masked colours told from the picture | " in page
    screen = (tmp_path / "screen").read_text()
    assert "vilt_fast, step 6" in screen and "HuggingFace, step 3" in screen and "masked words" in screen


def test_a_goal_that_is_missed_is_the_exit_status(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(train_demo, "run", lambda plan, out, plain: asked.update(plan=plan, out=out, plain=plain))
    assert main(["train-demo", "--steps", "7", "--seed", "3", "--plain", "0", "--out", str(tmp_path)]) == 1
    assert asked["plan"] == lesson.Plan(steps=7, seed=3) and asked["plain"] == 0 and asked["out"] == str(tmp_path)

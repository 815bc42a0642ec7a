"""The world of shapes: captions are true of their pictures."""

import collections

import numpy as np
import pytest

from vilt_fast.data.shapes import CELL, COLOURS, KINDS, VOCABULARY, World


@pytest.fixture(scope="module")
def world():
    return World(400, seed=5)


def test_every_picture_has_what_its_caption_names_where_it_says(world):
    for scene, picture in zip(world.scenes, world, strict=True):
        pixels, words = np.asarray(picture), scene.caption.split()
        assert pixels.shape == (*scene.size, 3) and set(words) <= set(VOCABULARY)
        assert len(scene.named()) == 2 * len(scene.shapes)
        for place, shape in scene.named():
            assert words[place] in (shape.kind, shape.colour)
            assert tuple(pixels[int(shape.y), int(shape.x)]) == COLOURS[shape.colour]
            top, left, bottom, right = shape.box
            assert 0 <= top < bottom <= scene.size[0] and 0 <= left < right <= scene.size[1]
        if len(scene.shapes) == 1:
            assert "only" in words
            continue
        first, second = scene.shapes
        assert first.kind != second.kind
        down, across = second.y - first.y, second.x - first.x
        further, side = (down, "above below") if abs(down) > abs(across) else (across, "left right")
        assert side.split()[int(further < 0)] in words


def test_words_of_a_shape_fit_into_its_cell(world):
    """As a transport plan weighs them: each word alike, and each part of the picture."""
    for scene in world.scenes:
        assert 2 / len(scene.caption.split()) <= CELL**2 / (scene.size[0] * scene.size[1])
    short = World(400, seed=5, wordy=False)
    both = zip(world.captions, short.captions, strict=True)
    assert all(long.startswith(brief.removesuffix("in the picture")) for long, brief in both)
    assert {brief.split()[-1] for brief in short.captions} == {*KINDS, "picture"}


def test_kinds_differ_by_their_outline(world):
    """Of its box a shape covers so much: all, pi / 4, a half, and what two bars do; its edge is a pixel wide."""
    covered = collections.defaultdict(list)
    for scene, picture in zip(world.scenes, world, strict=True):
        shape = scene.shapes[0]
        if any(other.colour == shape.colour for other in scene.shapes[1:]):
            continue
        of_it = (np.asarray(picture) == COLOURS[shape.colour]).all(2)
        covered[shape.kind].append(of_it.sum() / (2 * shape.radius + 1) ** 2)
    means = {kind: np.mean(shares) for kind, shares in covered.items()}
    assert means == pytest.approx({"circle": np.pi / 4, "square": 1, "triangle": 0.5, "cross": 0.59}, abs=0.04)


def test_scenes_belong_to_their_seed_and_all_words_come_up(world):
    again, other = World(400, seed=5), World(400, seed=6)
    assert again.captions == world.captions and other.captions != world.captions
    assert np.array_equal(np.asarray(again[7]), np.asarray(world[7]))
    said = collections.Counter(word for caption in world.captions for word in caption.split())
    assert 160 < sum(len(scene.shapes) == 2 for scene in world.scenes) < 240
    assert said.keys() == set(VOCABULARY[5:]) and len(KINDS) + len(COLOURS) == 10
    assert {word for caption in World(200, kinds=3, colours=2).captions for word in caption.split()} == {
        *VOCABULARY[5 : VOCABULARY.index("red")], "red", "green", "circle", "square", "triangle",
    }  # fmt: skip

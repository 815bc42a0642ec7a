"""How pairs are cut: every cell once, images in a row, batches within the budget and even."""

import numpy as np
import pytest

from vilt_fast.scoring.ranks import in_a_row, tiles_of
from vilt_fast.scoring.tiling import Tiling, batches


def _tilings():
    draw = np.random.default_rng(0)
    for _ in range(10):
        texts, images = draw.integers(1, 200, 2)
        lengths, budget = draw.integers(1, 41, texts), int(draw.choice([1, 200, 1792, 16384]))
        listed = None
        if draw.random() < 0.5:
            listed = np.stack([draw.integers(0, n, 300) for n in (texts, images)], 1)
        yield Tiling(lengths, int(images), listed, budget), int(images), listed


def test_every_cell_is_in_one_tile_and_images_are_wanted_in_a_row():
    for tiling, images, listed in _tilings():
        tiles = list(tiling)
        assert [tile.number for tile in tiles] == list(range(tiling.tiles))
        cells = np.concatenate([tile.cells for tile in tiles])
        assert sorted(cells.tolist()) == list(range(tiling.count))
        for tile in tiles:
            pairs = np.stack([tile.texts, tile.images], 1)
            expected = np.stack(np.divmod(tile.cells, images), 1) if listed is None else listed[tile.cells]
            assert np.array_equal(pairs, expected)
        wanted = {}
        for tile in tiles:
            for image in set(tile.images.tolist()):
                wanted.setdefault(image, []).append(tile.number)
        assert all(numbers == list(range(numbers[0], numbers[-1] + 1)) for numbers in wanted.values())


@pytest.mark.parametrize("world", [1, 3, 8])
def test_ranks_share_all_tiles_and_no_image_where_there_are_enough(world):
    for tiling, _, listed in _tilings():
        parts = [list(tiles_of(tiling, rank, world)) for rank in range(world)]
        assert sorted(t.number for part in parts for t in part) == list(range(tiling.tiles))
        if listed is None and tiling.groups >= world:
            images = [{i for t in part for i in t.images.tolist()} for part in parts]
            assert sum(map(len, images)) == len(set().union(*images))
        for part in parts:
            rows = [cells for _, cells in in_a_row(part)]
            assert not rows or np.array_equal(np.concatenate(rows), np.arange(sum(map(len, rows))))


def test_batches_are_within_the_budget_and_even():
    draw = np.random.default_rng(1)
    for _ in range(200):
        rows = draw.integers(100, 280, draw.integers(1, 90))
        budget, workers = int(draw.choice([1, 500, 1792, 16384])), int(draw.integers(1, 5))
        made = batches(rows, budget, workers)
        assert sorted(np.concatenate(made).tolist()) == list(range(len(rows)))
        sizes = [int(rows[batch].sum()) for batch in made]
        assert all(size <= budget or len(batch) == 1 for size, batch in zip(sizes, made, strict=True))
        assert [rows[batch[0]] for batch in made] == sorted((rows[batch[0]] for batch in made), reverse=True)
        if budget >= 500 and len(rows) >= 4 * workers * len(made):
            assert len(made) % workers == 0 and max(sizes) - min(sizes) <= 2 * rows.max()
    assert batches(np.array([], np.int64), 100, 2) == []

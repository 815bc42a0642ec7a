"""Runs that are streamed to a file, killed, resumed, refused, out of room, or shared by several processes."""

import contextlib
import errno
import json
import os
import random
import signal
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from support import scored, scoring
from support.models import build
from support.original_vilt import ViLTransformerSS

import vilt_fast
from vilt_fast import InputError, testing
from vilt_fast.models import find_pairs
from vilt_fast.scoring import ranks
from vilt_fast.scoring.fingerprint import fingerprint
from vilt_fast.scoring.tiling import Tiling
from vilt_fast.scoring.workers import autocast

KILLS = int(os.environ.get("VILT_FAST_KILLS", "3"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty-four images, one of which is none."""
    where = tmp_path_factory.mktemp("images")
    scoring.files(where, [(64, 64 + 16 * (n % 3)) for n in range(24)])
    (where / "7.png").write_bytes((where / "7.png").read_bytes()[:300])
    return where


@pytest.fixture(scope="module")
def expected(folder):
    """The scores in memory."""
    with pytest.warns(UserWarning, match="1 of 24 images cannot be read.*7.png"):
        found = scored.run(None, folder)
    (bad,) = found.errors
    assert found.images[bad].endswith("7.png") and np.isnan(found.scores[:, bad]).all()
    assert np.isfinite(np.delete(found.scores, bad, 1)).all()
    return found


def test_killed_and_resumed_it_is_what_it_would_have_been(tmp_path, folder, expected):
    """`kill -9` when so many tiles are done, chosen at random; then to the end, with nothing computed twice."""
    out, draw, done = tmp_path / "scores.npy", random.Random(1), 0
    lines = Path(f"{out}.journal")
    for _ in range(KILLS):
        process = scored.start(out, folder)
        goal, end = done + draw.randint(1, 3), time.monotonic() + 120
        while process.is_alive() and _tiles(lines) <= goal and time.monotonic() < end:
            time.sleep(0.0005)
        process.kill()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0)
        done = _tiles(lines)
    with open(lines, "ab") as file:  # a line that a kill has torn
        file.write(b'{"tile": 3, "crc"')
    assert 0 < done
    with pytest.warns(UserWarning, match="cannot be read"):
        found = scored.run(out, folder)
    assert np.array_equal(found.scores, expected.scores, equal_nan=True) and found.errors == expected.errors
    assert np.array_equal(np.load(out, mmap_mode="r"), expected.scores, equal_nan=True)
    assert isinstance(found.scores, np.memmap)
    numbers = [json.loads(line)["tile"] for line in lines.read_text().splitlines()[1:]]
    assert len(numbers) == len(set(numbers))


def _tiles(lines):
    return max(0, len(lines.read_bytes().splitlines()) - 1) if lines.exists() else 0


def test_what_is_there_is_not_computed_again_unless_it_is_not_what_was_written(tmp_path, folder, expected, monkeypatch):
    out = tmp_path / "scores.npy"
    with pytest.warns(UserWarning, match="cannot be read"):
        scored.run(out, folder)
    task, computed = vilt_fast.models.vilt.task_pairs.TaskPairs, []
    pooled = task.pooled
    monkeypatch.setattr(task, "pooled", lambda self, *given: computed.append(len(given[0])) or pooled(self, *given))
    with pytest.warns(UserWarning, match="cannot be read"):
        assert np.array_equal(scored.run(out, folder).scores, expected.scores, equal_nan=True)
    assert not computed
    with open(out, "r+b") as file:  # a cell that somebody has changed
        file.seek(-4, os.SEEK_END)
        file.write(b"abcd")
    with pytest.warns(UserWarning, match="cannot be read"):
        assert np.array_equal(scored.run(out, folder).scores, expected.scores, equal_nan=True)
    assert 0 < sum(computed) <= 16


def test_another_run_is_refused_by_what_is_other(tmp_path):
    model, images = scored.model(), scoring.photographs()
    given = dict(processor=scoring.processor(model), out=tmp_path / "scores.npy")
    vilt_fast.score(model, scoring.texts(), images, **given)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match="resume=True"):
        vilt_fast.score(model, scoring.texts(), images, **given)
    other_weights = build("retrieval", torch.float32, seed=1)
    one_weight = scored.model()
    one_weight.vilt.encoder.layer[2].output.dense.weight.data[3, 4] += 1e-6
    epsilon = scored.model()
    epsilon.config.layer_norm_eps = 1e-5
    other_image = [*images[:-1], images[-1].copy()]
    other_image[-1][0, 0, 0] ^= 1
    fewer = type(given["processor"]).from_dict({**given["processor"].to_dict(), "size_divisor": 32})
    quantized = vilt_fast.accelerate(scored.model(), quantize="int8")
    for named, arguments, more in (
        ("model", (other_weights, scoring.texts(), images), {}),
        ("model", (one_weight, scoring.texts(), images), {}),
        ("model", (epsilon, scoring.texts(), images), {}),
        ("model", (quantized, scoring.texts(), images), {}),
        ("texts", (model, scoring.texts()[:-1] + [[1, 2, 4]], images), {}),
        ("texts, options", (model, scoring.texts()[::-1], images), {"token_budget": 100}),
        ("images", (model, scoring.texts(), other_image), {}),
        ("images", (model, scoring.texts(), images), {"processor": fewer}),
        ("options", (model, scoring.texts(), images), {"pairs": [(0, 0)]}),
    ):
        with pytest.raises(InputError, match=f"begun with other {named}: nothing has been changed"):
            vilt_fast.score(*arguments, **{**given, "resume": True, **more})
    with pytest.raises(InputError, match="begun with other options"), torch.autocast("cpu", torch.bfloat16):
        vilt_fast.score(model, scoring.texts(), images, **given, resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    numbers = np.load(tmp_path / "scores.npy")
    with open(tmp_path / "scores.npy", "wb") as file:
        np.lib.format.write_array(file, numbers, version=(1, 0))
    with pytest.raises(InputError, match=r"no results that can be resumed: an array in version \(1, 0\)"):
        vilt_fast.score(model, scoring.texts(), images, **given, resume=True)
    (tmp_path / "scores.npy.journal").write_text("{}\n")
    with pytest.raises(InputError, match="no results that can be resumed"):
        vilt_fast.score(model, scoring.texts(), images, **given, resume=True)
    (tmp_path / "scores.npy.journal").unlink()
    with pytest.raises(InputError, match="has no journal"):
        vilt_fast.score(model, scoring.texts(), images, **given, resume=True)


def test_what_else_a_model_computes_by_is_told_apart():
    """The kinds of autocast, on a GPU too, and the original's settings."""
    model = testing.random_weights(ViLTransformerSS()).eval()
    model.rank_output = torch.nn.Linear(32, 1)
    mark = lambda: fingerprint(find_pairs(model), [np.array([1])], [], None, None, (1,))  # noqa: E731
    plain = mark()
    assert mark() == plain
    model.hparams.config["max_image_len"] = 7
    assert {name for name, value in mark().items() if value != plain[name]} == {"model"}
    model.hparams.config["max_image_len"] = -1
    seen = [plain["options"]]
    for kind, dtype in (("cpu", torch.bfloat16), ("cpu", torch.float16)):
        with torch.autocast(kind, dtype):
            assert autocast() == {kind: dtype}
            seen.append(mark()["options"])
    torch.set_autocast_enabled("cuda", True)
    try:
        seen.append(mark()["options"])
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert len(set(seen)) == 4


def test_nccl_sends_from_the_gpu_of_the_model(monkeypatch, tmp_path):
    """Whichever was current; told by stand-ins, for it takes two GPUs to go wrong."""
    current, seen = [], []

    @contextlib.contextmanager
    def device(of):
        current.append(of)
        yield
        current.pop()

    fakes = dict(get_rank=lambda: 0, get_world_size=lambda: 1, is_initialized=lambda: True, get_backend=lambda: "nccl")
    fakes["broadcast"] = lambda piece, sender: seen.append(("broadcast", *current))
    fakes["all_gather_object"] = lambda into, mine: seen.append(("errors", *current)) or into.__setitem__(0, mine)
    fakes["barrier"] = lambda: seen.append(("barrier", *current))
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.distributed, name, fake)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, on: self)
    tiling, gpu = Tiling([3], 2, None, 64), torch.device("cuda", 1)
    mine, out = np.array([1, 2], np.float32), tmp_path / "all.npy"
    array, errors = ranks.together(mine, {1: "gone"}, tiling, (1, 2), mine.dtype, 1, out, gpu)
    assert np.array_equal(array, [[1, 2]]) and errors == {1: "gone"} and np.array_equal(np.load(out), array)
    assert seen == [("broadcast", gpu), ("errors", gpu), ("barrier", gpu)]


def test_a_file_that_cannot_be_written_is_said_before_anything_is_computed(tmp_path, monkeypatch):
    model, images = scored.model(), scoring.photographs()
    given = dict(processor=scoring.processor(model))
    with pytest.raises(InputError, match="must end in .npy"):
        vilt_fast.score(model, scoring.texts(), images, out=tmp_path / "scores.csv", **given)
    with pytest.raises(OSError, match="cannot be written: No such file"):
        vilt_fast.score(model, scoring.texts(), images, out=tmp_path / "missing" / "scores.npy", **given)

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)  # where a file system that writes late says so
    with pytest.raises(OSError, match="cannot be written: No space left") as caught:
        vilt_fast.score(model, scoring.texts(), images, out=tmp_path / "scores.npy", **given)
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["fsync", "pwrite"])
def test_a_disk_that_fills_up_keeps_what_is_safe(tmp_path, folder, expected, monkeypatch, where):
    calls, own = [], getattr(os, where)

    def filling(*arguments):
        calls.append(arguments)
        if len(calls) > (9 if where == "fsync" else 30):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return own(*arguments)

    out = tmp_path / "scores.npy"
    with monkeypatch.context() as patch:
        patch.setattr(os, where, filling)
        with pytest.raises(OSError, match=r"No space left on device. \d+ parts of the run are safe.*resume=True"):
            scored.run(out, folder)
    safe = _tiles(Path(f"{out}.journal"))
    assert safe > 0
    with pytest.warns(UserWarning, match="cannot be read"):
        assert np.array_equal(scored.run(out, folder).scores, expected.scores, equal_nan=True)


def test_answers_are_resumed_too(tmp_path):
    model = build("question_answering", torch.float32)
    given = model, scoring.texts(), [*scoring.photographs(), b"no image"]
    options = dict(processor=scoring.processor(model), top_k=2)
    with pytest.warns(UserWarning, match="1 of 6 images"):
        expected = vilt_fast.score(*given, **options)
    for _ in range(2):
        with pytest.warns(UserWarning, match="1 of 6 images"):
            found = vilt_fast.score(*given, **options, out=tmp_path / "a.npy", resume=True)
        assert np.array_equal(found.scores, expected.scores, equal_nan=True)
        assert np.array_equal(found.answers, expected.answers) and (found.answers[:, 5] == -1).all()
    assert found.answer(0, 5) == []


@pytest.mark.parametrize("streamed", [False, True])
def test_two_processes_are_one(tmp_path, folder, expected, streamed):
    out = tmp_path / "scores.npy" if streamed else None
    address = tmp_path / "meeting"
    processes = [scored.start(out, folder, address, rank, 2) for rank in range(2)]
    for process in processes:
        process.join(200)
        assert process.exitcode == 0
    for rank in range(2):
        assert np.array_equal(np.load(f"{address}.{rank}.npy"), expected.scores, equal_nan=True)
    if streamed:
        assert np.array_equal(np.load(out), expected.scores, equal_nan=True)
        numbers = [
            {json.loads(line)["tile"] for line in path.read_text().splitlines()[1:]}
            for path in sorted(tmp_path.glob("scores.*-of-2.npy.journal"))
        ]
        assert len(numbers) == 2 and not numbers[0] & numbers[1] and all(len(n) > 3 for n in numbers)


def test_pairs_a_second_are_counted_from_where_a_run_goes_on(tmp_path, monkeypatch):
    """By tqdm where it is there; without it, or where that is not wanted, nothing is shown."""
    made, moved = [], []

    class Bar:
        def __init__(self, **options):
            made.append(options)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self, count):
            moved.append(count)

    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=Bar))
    model = scored.model()
    given = model, scoring.texts(), scoring.photographs()
    options = dict(processor=scoring.processor(model), out=tmp_path / "scores.npy", resume=True, token_budget=32)
    vilt_fast.score(*given, **options)
    assert (made[0]["total"], made[0]["initial"], made[0]["unit"], sum(moved)) == (30, 0, "pair", 30)
    lines = Path(f"{options['out']}.journal").read_text().splitlines(keepends=True)
    Path(f"{options['out']}.journal").write_text("".join(lines[:2]))
    moved.clear()
    vilt_fast.score(*given, **options)
    assert made[1]["initial"] == 30 - sum(moved) > 0
    vilt_fast.score(*given, processor=options["processor"], progress=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    vilt_fast.score(*given, processor=options["processor"])
    assert len(made) == 2


def test_nothing_is_synchronised_more_often_than_it_has_to_be(tmp_path, folder, monkeypatch):
    """Ordinarily once a second, and at the end."""
    calls, own = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(file) or own(file))
    model = scored.model()
    given = dict(processor=scoring.processor(model), token_budget=32, out=tmp_path / "scores.npy")
    start = time.monotonic()
    with pytest.warns(UserWarning, match="cannot be read"):
        vilt_fast.score(model, scoring.texts(), sorted(folder.iterdir()), **given)
    assert len(calls) <= 3 + 2 * (1 + time.monotonic() - start)

"""Pictures of alignments: hottest on the word's patch, legible at any number of words; the command that makes them."""

import dataclasses
import sys

import pytest
import torch
from support.models import build
from support.planted import picture, plant, planted_batch, processor

import vilt_fast
from vilt_fast import align
from vilt_fast import commands as cli
from vilt_fast.alignment import draw as heatmaps
from vilt_fast.commands.align import run


def drawn(alignment, image, path, monkeypatch, **options):
    """(luminance [height, width] of the picture, its figure with the panels where they were drawn)."""
    import numpy as np
    from matplotlib.figure import Figure
    from PIL import Image

    figures, save = [], Figure.savefig

    def kept(figure, *args, **kwargs):
        figure.set_dpi(kwargs["dpi"])
        figures.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", kept)
    heatmaps.draw(alignment, image, path, **options)
    return np.asarray(Image.open(path).convert("L"), dtype=float), figures[0]


def panels_of(figure, alignment):
    return figure.axes[1 : 1 + len(alignment.tokens)]


def test_the_brightest_spot_of_a_panel_is_the_words_patch(tmp_path, monkeypatch):
    import numpy as np

    grids, places = [(3, 5), (3, 1)], [[7, 2, 11, 4, 14, 0], [1, 2]]
    found = align(plant(build("trunk", torch.float32)), planted_batch("right", grids, places))
    for one, own, (h, w) in zip(found, places, grids, strict=True):
        white = np.full((h * 60, w * 60, 3), 255, dtype=np.uint8)
        pixels, figure = drawn(one, white, tmp_path / "p.png", monkeypatch, text="words", note="note")
        panels = panels_of(figure, one)
        assert [axis.get_title() for axis in panels] == list(one.tokens)
        for axis, place in zip(panels, own, strict=True):
            box = axis.get_window_extent()
            top, left = round(pixels.shape[0] - box.y1), round(box.x0)
            edge = 2  # pixels where a panel blends with the white page
            bottom, right = top + round(box.height) - edge, left + round(box.width) - edge
            inside = pixels[top + edge : bottom, left + edge : right]
            ys, xs = np.nonzero(inside == inside.max())
            tall, wide = box.height / h, box.width / w
            assert abs(ys.mean() + 0.5 + edge - (place // w + 0.5) * tall) < 1 + edge
            assert abs(xs.mean() + 0.5 + edge - (place % w + 0.5) * wide) < 1 + edge
            assert len(ys) > 0.8 * tall * wide  # one patch is hottest, and all of it


def fake(tokens, grid=(4, 6), size=(40, 60)):
    return vilt_fast.Alignment(torch.rand(len(tokens), grid[0] * grid[1]), tuple(tokens), grid, size, 0.5)


@pytest.mark.parametrize("size", [(40, 60), (20, 200), (200, 20)])
@pytest.mark.parametrize("count", [1, 3, 7, 38])
def test_panels_fill_the_picture_and_do_not_touch(count, size, tmp_path, monkeypatch):
    one = fake(["antidisestablishmentarianism" * 2, "$^$", "_"][:count] + ["word"] * (count - 3), size=size)
    steps = []
    _, figure = drawn(one, picture(*size), tmp_path / "p.png", monkeypatch, text="a text " * 40, note="a note " * 30,
                      step=steps.append, dpi=50)  # fmt: skip
    assert steps == list(one.tokens)
    panels = figure.axes[: 1 + count]
    assert all(axis.images for axis in panels) and not any(axis.images for axis in figure.axes[1 + count : -1])
    boxes = [axis.get_tightbbox() for axis in panels] + [text.get_window_extent() for text in figure.texts]
    page = figure.bbox
    for i, box in enumerate(boxes):
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, i
        for other in boxes[:i]:
            assert min(box.x1, other.x1) <= max(box.x0, other.x0) or min(box.y1, other.y1) <= max(box.y0, other.y0)
    shape = {(round(a.bbox.width), round(a.bbox.height)) for a in panels}
    assert len(shape) == 1
    width, height = shape.pop()
    assert max(width, height) > 0.8 * heatmaps.PANEL * 50


def test_nan_and_missing_matplotlib(tmp_path, monkeypatch):
    one = fake(["a"])
    with pytest.raises(ValueError, match="NaN"):
        heatmaps.draw(dataclasses.replace(one, plan=one.plan * float("nan")), picture(), tmp_path / "p.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"vilt_fast\[demo\]"):
        heatmaps.draw(one, picture(), tmp_path / "p.png")
    assert not list(tmp_path.iterdir())


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def photograph(tmp_path):
    from PIL import Image

    turned = Image.fromarray(picture(60, 40))
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera lay on its side: 60 x 40 is to be seen as 40 x 60
    turned.save(tmp_path / "photo.jpg", exif=exif)
    return str(tmp_path / "photo.jpg")


def test_align_command(photograph, tmp_path, capsys):
    build("question_answering", torch.float32).save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    out = tmp_path / "new" / "out.png"
    options = ["--model", str(tmp_path), "--words", "--beta", "0.3", "--iterations", "20"]
    assert cli.main(["align", photograph, "Playing, who?", "-o", str(out), *options]) == 0
    shown = capsys.readouterr().out
    assert "4 words, 4 x 6 patches" in shown and "random" not in shown
    assert out.read_bytes().startswith(b"\x89PNG")


def test_random_weights_are_named(photograph, tmp_path, capsys):
    found = run(photograph, "Two [MASK] cats' eyes", tmp_path / "out.png", model=build("retrieval"))
    assert found.tokens == ("two", "[MASK]", "cats", "'", "eyes")
    assert "The weights are random" in capsys.readouterr().out


def test_align_command_says_what_is_wrong(photograph, tmp_path, capsys):
    build("trunk", torch.float32).save_pretrained(tmp_path)
    (tmp_path / "text.jpg").write_text("no image")
    model = ["--model", str(tmp_path)]
    for arguments, message in (
        ([str(tmp_path / "none.jpg"), "hi"], "none.jpg: no such file"),
        ([str(tmp_path / "text.jpg"), "hi"], "no image that Pillow can read"),
        ([str(tmp_path), "hi"], "cannot be read"),
        ([photograph, "hi", "-o", "x.txt"], "cannot write txt"),
        ([photograph, "hi", *model], "Pass one, for example processor="),
        ([photograph, "hi", "--model", str(tmp_path / "none")], "there is no folder"),
    ):
        assert cli.main(["align", *arguments]) == 2
        assert message in capsys.readouterr().err
    processor().save_pretrained(tmp_path)
    assert cli.main(["align", photograph, " ", *model, "-o", str(tmp_path / "x.png")]) == 2
    assert "no word" in capsys.readouterr().err
    for options in (["--beta", "0"], ["--beta", "nan"], ["--iterations", "0"]):
        with pytest.raises(SystemExit):
            cli.main(["align", photograph, "hi", *options])

"""`decode="fast"`: where it changes pixels and by how much, and what it leaves alone."""

import functools
import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from support import pictures

from vilt_fast import ImageProcessor
from vilt_fast.commands import samples
from vilt_fast.images import resize
from vilt_fast.images.reference import Reference

SMALL = {"size": {"shortest_edge": 64}, "return_tensors": "np"}


drawn = functools.cache(samples.photograph)


@functools.cache
def jpeg(height, width, orientation=None, mode="RGB"):
    return pictures.encoded(drawn(0, height, width), mode, "JPEG", orientation)


def pixels(image, **options):
    return ImageProcessor()(image, **{**SMALL, **options})["pixel_values"][0]


@pytest.mark.core
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("sides", [(600, 800), (601, 799), (200, 261), (1030, 700), (800, 810)])
def test_nearer_than_a_quarter_of_a_pixel(sides, mode):
    """The difference to the exact result is less than that of the picture moved by a quarter of a pixel."""
    data = jpeg(*sides, mode=mode)
    exact, fast = (pixels(data, decode=decode) for decode in ("exact", "fast"))
    image = Image.open(io.BytesIO(data)).convert("RGB")
    quarter = image.width / exact.shape[2] / 4
    moved = image.resize(exact.shape[:0:-1], Image.Resampling.BICUBIC, box=(quarter, 0, image.width, image.height))
    moved = np.asarray(moved).transpose(2, 0, 1) / np.float32(127.5) - 1
    assert fast.shape == exact.shape and (fast != exact).any()
    assert np.abs(fast - exact).mean() < np.abs(moved - exact).mean()


@functools.cache
def exact_pixels(orientation):
    return pixels(jpeg(611, 803, orientation))


@pytest.mark.core
@pytest.mark.parametrize("orientation", range(10))
def test_turned_as_the_exact_one(orientation):
    data = jpeg(611, 803, orientation)
    exact, fast = (pixels(data, decode=decode) for decode in ("exact", "fast"))
    shown = orientation if 1 <= orientation <= 8 else 1
    others = [exact_pixels(other) for other in range(1, 9) if other != shown]
    away = np.abs(fast - exact).mean()
    assert away < 0.1 * min(np.abs(fast - other).mean() for other in others if other.shape == fast.shape)


@pytest.mark.core
def test_threads_change_nothing(monkeypatch):
    """Of one JPEG, which one thread decodes; of several."""
    monkeypatch.setattr(resize, "LARGE", 0)
    data = [jpeg(611, 803, orientation) for orientation in (1, 6, 8)]
    for images in (data[:1], data[1:2], data):
        found = []
        for threads in (1, 2, 5):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            found.append(ImageProcessor()(images, decode="fast", **SMALL)["pixel_values"])
        assert all(np.array_equal(one, found[0]) for one in found[1:])


@pytest.mark.core
def test_what_is_not_reduced_does_not_change():
    """Small images; what the options of a call or of a processor say."""
    data = jpeg(90, 120)
    assert np.array_equal(pixels(data, decode="fast"), pixels(data))
    large = jpeg(300, 400)
    for options in ({"do_resize": False}, {"resample": 0}):
        given = (
            Image.open(io.BytesIO(large)) if "resample" not in options else np.asarray(Image.open(io.BytesIO(large)))
        )
        assert np.array_equal(pixels(given, decode="fast", **options), pixels(given, **options))
    processor = ImageProcessor(decode="fast")
    assert np.array_equal(processor(large, **SMALL)["pixel_values"][0], pixels(large, decode="fast"))
    assert np.array_equal(processor(large, decode="exact", **SMALL)["pixel_values"][0], pixels(large))


@pytest.mark.core
def test_an_image_of_somebody_else_stays_as_it_is(tmp_path):
    """An unread image is still unread and of its size, its file where it was; one drafted by its owner is taken so."""
    path = tmp_path / "photo.jpg"
    path.write_bytes(jpeg(600, 800))
    whole = pixels(path, decode="fast")
    for file in (path, io.BytesIO(path.read_bytes())):
        with Image.open(file) as image:
            place = image.fp.tell()
            for _ in range(2):
                assert np.array_equal(pixels(image, decode="fast"), whole)
                assert image.size == (800, 600) and image.tile and image.fp.tell() == place
            assert np.asarray(image).shape == (600, 800, 3)
            read = pixels(image, decode="fast")  # decoded: no more scaling by the decoder
            assert not np.array_equal(read, whole) and not np.array_equal(read, pixels(path))
    with Image.open(path) as image:
        image.draft(None, (200, 150))
        again = Image.open(path)
        again.draft(None, (200, 150))
        assert np.array_equal(pixels(image, decode="fast"), pixels(again.convert("RGB"), decode="fast"))


@pytest.mark.core
def test_the_first_of_several_pictures_in_a_file():
    """MPO, as telephones write it; and not the first where another was chosen."""
    frames = [Image.fromarray(drawn(i, 600, 800)) for i in range(2)]
    file = io.BytesIO()
    frames[0].save(file, "MPO", save_all=True, append_images=frames[1:])
    first, second = Image.open(file), Image.open(io.BytesIO(file.getvalue()))
    second.seek(1)
    assert first.format == "MPO"
    near = [
        np.abs(pixels(image, decode="fast") - pixels(frame)).mean()
        for image, frame in zip((first, second), frames, strict=True)
    ]
    apart = np.abs(pixels(frames[0]) - pixels(frames[1])).mean()
    assert np.array_equal(pixels(file.getvalue(), decode="fast"), pixels(first, decode="fast"))
    assert max(near) < 0.1 * apart


@pytest.mark.core
def test_what_cannot_be_had_is_said():
    floats = np.random.default_rng(0).uniform(0, 255, (100, 100, 3)).round()
    with pytest.warns(UserWarning, match='decode="fast" does nothing'):
        assert np.array_equal(pixels(floats, decode="fast"), Reference()(floats, **SMALL)["pixel_values"][0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels(floats)
        pixels(jpeg(200, 200), decode="fast")
    for wrong in ("draft", None, 1):
        with pytest.raises(ValueError, match='"exact" or "fast"'):
            ImageProcessor(decode=wrong)
    with pytest.raises(ValueError, match='"exact" or "fast"'):
        pixels(floats, decode="slow")

"""Files that are damaged, strange or made to do harm: what Pillow says, or a clear error before memory is spent."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError
from support import pictures

from vilt_fast import ImageProcessor, InputError
from vilt_fast.commands.samples import photograph
from vilt_fast.images import sources
from vilt_fast.images.reference import CONVERTS, Reference

pytestmark = pytest.mark.core
SMALL = {"size": {"shortest_edge": 64}, "return_tensors": "np"}


def png(height, width):
    """A PNG whose header says so, and which holds next to nothing."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def jpeg(height, width, **options):
    return pictures.encoded(photograph(0, height, width), "RGB", "JPEG", **options)


@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_damaged_files(decode, tmp_path):
    processor = ImageProcessor(decode=decode)
    whole = jpeg(300, 400)
    for bad, error in (
        (whole[: len(whole) // 2], OSError), (whole[:200], OSError), (b"", UnidentifiedImageError),
        (b"GIF89a", OSError), (b"not an image", UnidentifiedImageError), (png(64, 64), OSError),
        (tmp_path, OSError), (tmp_path / "nowhere.jpg", FileNotFoundError),
    ):  # fmt: skip
        with pytest.raises(error):
            processor(bad, **SMALL)
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match="truncated") as caught:
        processor([whole, tmp_path / "half.jpg"], **SMALL)
    if hasattr(caught.value, "add_note"):
        assert "one of 2 images" in caught.value.__notes__[0] and "half.jpg" in caught.value.__notes__[0]
    unread = Image.open(io.BytesIO(whole[: len(whole) // 2]))
    with pytest.raises(OSError, match="truncated"):
        processor(unread, **SMALL)


@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_bombs_take_no_memory(decode, tmp_path, monkeypatch):
    """Too many pixels are Pillow's error; too thin to have a result is ours. Both are known from the header."""
    processor = ImageProcessor(decode=decode)
    loaded = []
    monkeypatch.setattr(sources, "upright", loaded.append)
    cases = [
        (png(20_000, 20_000), Image.DecompressionBombError), (png(1, 2**31 - 1), Image.DecompressionBombError),
        (png(2, 20_000_000), InputError), (png(9_000_000, 10), InputError),
    ]  # fmt: skip
    tracemalloc.start()
    try:
        for data, error in cases:
            path = tmp_path / "bomb.png"
            path.write_bytes(data)
            for given in (data, path, [path]):
                with pytest.raises(error):
                    processor(given, **SMALL)
        with pytest.raises(InputError, match="too thin"):
            processor(Image.open(io.BytesIO(png(10, 9_000_000))), **SMALL)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not loaded and peak < 2**20
    with pytest.warns(Image.DecompressionBombWarning):
        sources.opened(png(10_000, 10_000))


def test_images_without_pixels_and_modes_that_are_refused():
    processor = ImageProcessor()
    for size in ((0, 10), (10, 0)):
        with pytest.raises(InputError, match="must have pixels"):
            processor(Image.new("RGB", size), **SMALL)
    with pytest.raises(InputError, match="must have pixels"):
        processor(np.zeros((0, 20, 3), np.uint8), **SMALL)
    for mode in ("L", "P", "RGBA", "LA", "CMYK", "I;16", "1"):
        image = pictures.in_mode(photograph(0, 40, 50), mode)
        with pytest.raises(InputError, match=rf'mode {mode}, .*convert\("RGB"\)'):
            processor([Image.new("RGB", (40, 40)), image], **SMALL)
        assert processor(image.convert("RGB"), **SMALL)["pixel_values"].shape[1] == 3


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_picture(kind):
    """Of a file; of an image that somebody has wound on, that one, as the reference takes it."""
    frames = [Image.fromarray(photograph(i, 60, 80)) for i in range(3)]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=40)
    image = Image.open(io.BytesIO(file.getvalue()))
    first = image.convert("RGB")
    image.seek(2)
    assert np.array_equal(*(processor(one, **SMALL)["pixel_values"] for processor, one in (
        (ImageProcessor(), file.getvalue()), (Reference(), first)
    )))  # fmt: skip
    if image.mode == "RGB" or CONVERTS:
        options = {**SMALL, **({"do_convert_rgb": True} if CONVERTS else {})}
        got, expected = (processor(image, **options)["pixel_values"] for processor in (ImageProcessor(), Reference()))
        assert np.array_equal(got, expected)

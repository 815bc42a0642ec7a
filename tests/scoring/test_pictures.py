"""Images of every kind and source, as Pillow shows them; those that are none, told one by one."""

import io
import pathlib
import re

import numpy as np
import pytest
import torch
from PIL import Image
from support import scoring
from support.models import build
from support.original_vilt import ViLTransformerSS

import vilt_fast
from vilt_fast import ImageProcessor, testing
from vilt_fast.scoring import pictures


@pytest.fixture(scope="module")
def model():
    return build("retrieval", torch.float32)


@pytest.fixture(scope="module")
def original():
    model = testing.random_weights(ViLTransformerSS()).eval()
    model.rank_output = testing.random_weights(torch.nn.Linear(32, 1), seed=3)
    return model


def score(model, images, **more):
    return vilt_fast.score(model, scoring.texts()[:2], images, **{"processor": scoring.processor(model), **more})


def _encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_however_an_image_is_given(model, tmp_path):
    array = scoring.photographs([(70, 90)])[0]
    image = Image.fromarray(array)
    png = _encoded(image, "PNG")
    (tmp_path / "a.png").write_bytes(png)
    made = scoring.processor(model)(image, return_tensors="pt")
    loose = {"pixel_values": made["pixel_values"][0]}
    padded = {
        "pixel_values": torch.nn.functional.pad(made["pixel_values"], (0, 32, 0, 16), value=float("nan")),
        "pixel_mask": torch.nn.functional.pad(made["pixel_mask"], (0, 32, 0, 16)),
    }
    padded_arrays = {name: np.asarray(part) for name, part in padded.items()}
    images = [
        str(tmp_path / "a.png"), pathlib.Path(tmp_path / "a.png"), png, bytearray(png), memoryview(png), image, array,
        torch.from_numpy(array), torch.from_numpy(array).float() / 255, dict(made), loose, padded,
        padded_arrays,
    ]  # fmt: skip
    scores = score(model, images).scores
    assert np.isfinite(scores).all() and (scores == scores[:, :1]).all()
    assert score(model, images[:2]).images == (str(tmp_path / "a.png"),) * 2
    assert score(model, images[4:6]).images == ("image 0", "image 1")
    assert np.array_equal(score(model, [loose]).scores, score(model, [loose], processor=None).scores)  # needs none


def test_strange_images_as_pillow_shows_them(model):
    draw = np.random.default_rng(5)
    array = draw.integers(0, 256, (64, 96, 3), dtype=np.uint8)
    image = Image.fromarray(array)
    deep = draw.integers(0, 65536, (64, 80), dtype=np.uint16)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    frames = _encoded(image.quantize(64), "GIF", save_all=True, append_images=[image.rotate(180)])
    cmyk = _encoded(image.convert("CMYK"), "JPEG", quality=95)
    turned = _encoded(image, "JPEG", exif=exif, quality=95)
    cases = {
        "animated": (frames, Image.open(io.BytesIO(frames)).convert("RGB")),
        "CMYK": (cmyk, Image.open(io.BytesIO(cmyk)).convert("RGB")),
        "16 bits": (_encoded(Image.fromarray(deep), "PNG"), np.rint(deep / 257).astype(np.uint8)),
        "turned": (turned, Image.open(io.BytesIO(turned)).transpose(Image.Transpose.ROTATE_270)),
        "left as it is": (Image.open(io.BytesIO(turned)), np.asarray(Image.open(io.BytesIO(turned)))),
        "a palette": (_encoded(image.quantize(16), "PNG"), image.quantize(16).convert("RGB")),
        "transparent": (_encoded(image.convert("RGBA"), "PNG"), image),
        "grey": (_encoded(image.convert("L"), "PNG"), image.convert("L").convert("RGB")),
    }
    found = score(model, [given for given, _ in cases.values()] + [shown for _, shown in cases.values()]).scores
    for column, name in enumerate(cases):
        assert np.array_equal(found[:, column], found[:, column + len(cases)]), name


def test_one_in_a_hundred_is_no_image(model, tmp_path):
    paths = scoring.files(tmp_path, [(64, 64 + 16 * (n % 2)) for n in range(100)])
    paths[37].write_bytes(paths[37].read_bytes()[:200])
    with pytest.warns(UserWarning, match=r"1 of 100 images cannot be read, their scores are NaN: .*37.png: OSError"):
        found = score(model, paths)
    assert list(found.errors) == [37] and np.isnan(found.scores[:, 37]).all()
    whole = score(model, [path for path in paths if path != paths[37]]).scores
    assert np.array_equal(np.delete(found.scores, 37, 1), whole)


@pytest.mark.parametrize(
    "bad, why",
    [
        (b"", "UnidentifiedImageError"),
        (b"\xff\xd8\xff\xe0 no more", "Error"),
        ("missing.png", "FileNotFoundError"),
        (np.zeros((0, 5, 3), np.uint8), "must have pixels"),
        (np.full((8, 8, 3), np.nan), "values from nan"),
        (np.zeros((64, 64, 5), np.uint8), "channels|array"),
        (np.zeros((4, 4000, 3), np.uint8), "."),
        ({"pixel_values": torch.zeros(2, 3, 32, 32)}, "of one image"),
        ({"pixel_values": torch.ones(1, 4, 32, 32)}, "channel"),
        ({"pixel_values": torch.zeros(1, 3, 32, 32), "pixel_mask": torch.zeros(1, 32, 32)}, "pixel_mask"),
        ({"pixel_values": torch.ones(1, 3, 32, 32), "pixel_mask": torch.eye(32)[None, :16]}, "like pixel_values"),
        ({"pixel_values": torch.ones(1, 3, 32, 32), "pixel_mask": torch.eye(32)}, "like pixel_values"),
        ({"pixel_values": torch.ones(1, 3, 32, 32), "pixel_mask": "no"}, "Error"),
        ({"pixels": 1}, "KeyError"),
    ],
)
def test_what_is_no_image_is_told_and_the_rest_is_right(model, original, bad, why):
    good, given = scoring.photographs()[:2], dict(processor=scoring.processor(model))
    told = lambda kind, images: vilt_fast.score(kind, scoring.texts()[:2], images, **given)  # noqa: E731
    for kind in (model, original):
        with pytest.warns(UserWarning, match="1 of 3 images cannot be read"):
            found = told(kind, [good[0], bad, good[1]])
        whole = told(kind, good).scores
        assert np.isnan(found.scores[:, 1]).all() and np.array_equal(found.scores[:, ::2], whole)
        assert re.search(why, found.errors[1]) or (kind is original and "pixel_mask" in found.errors[1])
        with pytest.raises(vilt_fast.InputError, match="none of the images can be read"):
            told(kind, [bad])


def test_a_bomb_is_told(model, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.warns(UserWarning, match="DecompressionBombError"):
        score(model, [_encoded(Image.new("RGB", (64, 64)), "PNG"), scoring.photographs()[0]])


def test_files_of_cameras_are_decoded_as_small_as_was_asked_for(model, monkeypatch):
    """By `ImageProcessor`, which gets the file and not the picture; other kinds of file as Pillow shows them."""
    photograph = Image.fromarray(scoring.photographs([(16, 24)])[0]).resize((960, 640), Image.Resampling.BICUBIC)
    jpeg, png = _encoded(photograph, "JPEG"), _encoded(photograph, "PNG")
    process = scoring.processor(model)
    exact = pictures.quick(process)
    assert type(exact) is ImageProcessor
    fast = ImageProcessor.from_reference(process, decode="fast")
    given = []
    own = ImageProcessor.preprocess

    def watched(self, image, *args, **options):
        given.append(image)
        return own(self, image, *args, **options)

    monkeypatch.setattr(ImageProcessor, "preprocess", watched)
    slow, quick = score(model, [jpeg, png]).scores, score(model, [jpeg, png], processor=fast).scores
    assert [type(image) for image in given].count(bytes) == 2
    assert np.abs(quick - slow).max() < 0.2 * np.abs(slow).max() and not np.array_equal(quick[:, 0], slow[:, 0])
    theirs = process(Image.open(io.BytesIO(jpeg)), return_tensors="pt")
    assert np.array_equal(score(model, [dict(theirs)]).scores, slow[:, :1])

    class Own(type(process)):
        pass

    assert type(pictures.quick(Own.from_dict(process.to_dict()))) is Own


def test_digests_know_images_apart(tmp_path):
    array = scoring.photographs([(64, 64)])[0]
    other = array.copy()
    other[3, 4, 1] ^= 1
    coloured = Image.fromarray(array).quantize(16)
    (tmp_path / "a.png").write_bytes(_encoded(Image.fromarray(array), "PNG"))
    (tmp_path / "b.png").write_bytes(_encoded(Image.fromarray(other), "PNG"))
    sources = [
        array, other, torch.from_numpy(array).float(), array.reshape(32, 128, 3), Image.fromarray(array), coloured,
        tmp_path / "a.png", tmp_path / "b.png", tmp_path / "missing.png", {"pixel_values": torch.zeros(1, 3, 32, 32)},
        {"pixel_values": torch.zeros(1, 3, 32, 32), "pixel_mask": torch.ones(1, 32, 32)},
    ]  # fmt: skip
    digests = [picture.digest() for picture in pictures.read(sources, None)]
    assert len(set(digests)) == len(sources)
    assert [picture.digest() for picture in pictures.read(sources, None)] == digests
    (again,) = pictures.read([(tmp_path / "a.png").read_bytes()], None)
    assert again.digest() == digests[6]

"""`ImageProcessor` gives what HuggingFace's image processor gives, bit for bit, whatever it is given."""

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from support import pictures
from transformers.image_utils import load_image

from vilt_fast import ImageProcessor
from vilt_fast.commands.samples import photograph
from vilt_fast.images import resize
from vilt_fast.images.reference import CONVERTS, Reference

pytestmark = pytest.mark.core


@pytest.fixture
def computed(monkeypatch):
    """How many times a batch was computed here, not by the reference."""
    calls = []
    batch = ImageProcessor._batch
    monkeypatch.setattr(ImageProcessor, "_batch", lambda *arguments: calls.append(1) or batch(*arguments))
    return calls


def outcome(processor, images, **options):
    """The result of a call, or the exception that it ended with."""
    try:
        return processor(images, **options)
    except Exception as error:
        return error


def assert_same(got, expected):
    """The same names, kinds, dtypes, shapes and bits; or an error where the reference has one, of its class."""
    if isinstance(expected, Exception):
        assert isinstance(got, type(expected)), got
        return
    if isinstance(got, Exception):
        raise got
    assert type(got) is type(expected) and list(got) == list(expected)
    for name in expected:
        assert type(got[name]) is type(expected[name])
        ours, theirs = ([x[name]] if hasattr(x[name], "dtype") else x[name] for x in (got, expected))
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert type(one) is type(other) and one.dtype == other.dtype and one.shape == other.shape
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_two_hundred_odd_images(tmp_path, computed):
    rng = np.random.default_rng(13)
    fast, plain = ImageProcessor(), Reference()
    answered = 0
    for number in range(200):
        picture = photograph(rng, *pictures.size(rng))
        options = {"return_tensors": "pt"}
        if CONVERTS and number % 3 == 0:
            options["do_convert_rgb"] = True
        if number % 2:
            mode, kind = pictures.FILES[number // 2 % len(pictures.FILES)]
            orientation = [None, *range(0, 10)][int(rng.integers(0, 11))]
            data = pictures.encoded(picture, mode, kind, orientation)
            path = tmp_path / f"{number}.image"
            path.write_bytes(data)
            given = [path, str(path), data][number // 2 % 3]
            # Not only the path: Pillow turns some TIFF files otherwise when it reads them from memory.
            known = load_image(Image.open(io.BytesIO(data)) if given is data else str(path))
        else:
            given = known = pictures.in_mode(picture, pictures.MODES[number // 2 % len(pictures.MODES)])
        expected = outcome(plain, known, **options)
        assert_same(outcome(fast, given, **options), expected)
        answered += not isinstance(expected, Exception)
    assert answered > 100 and len(computed) > 85


OPTIONS = {
    "nothing but bytes": {"do_rescale": False, "do_normalize": False},
    "no resize": {"do_resize": False},
    "no rescale": {"do_rescale": False},
    "no normalize": {"do_normalize": False},
    "no padding": {"do_pad": False},
    "another size": {"size": {"shortest_edge": 96}, "size_divisor": 16},
    "a size no multiple": {"size": {"shortest_edge": 77}, "size_divisor": 1},
    "another filter": {"resample": Image.Resampling.LANCZOS, "size": {"shortest_edge": 64}},
    "the nearest": {"resample": 0, "size": {"shortest_edge": 64}},
    "ImageNet": {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    "a scalar": {"image_mean": 0.4, "image_std": 0.3},
    "another factor": {"rescale_factor": 1 / 127.5},
    "negative": {"rescale_factor": -0.01, "image_std": [0.1, 1e-3, 7.0]},
}
LEFT_TO_THE_REFERENCE = {
    "an integer size": {"size": 64},
    "no shortest edge": {"size": {"height": 64, "width": 64}},
    "an integer factor": {"rescale_factor": 2},
    "None": {"do_resize": None},
    "a layout": {"data_format": "channels_last"},
    "no mean": {"image_mean": [0.5, 0.5]},
    "an unknown one": {"colour": "blue"},
    "no divisor": {"size_divisor": 0},
}


@pytest.mark.parametrize("tensors", ["pt", "np", None])
@pytest.mark.parametrize("name", [*OPTIONS, *LEFT_TO_THE_REFERENCE])
def test_options(name, tensors, computed):
    """Of a call, and of the processor itself."""
    options = {**OPTIONS, **LEFT_TO_THE_REFERENCE}[name]
    rng = np.random.default_rng(3)
    images = [Image.fromarray(photograph(rng, *sides)) for sides in ((90, 120), (150, 70), (90, 120))]
    assert_same(
        outcome(ImageProcessor(), images, return_tensors=tensors, **options),
        outcome(Reference(), images, return_tensors=tensors, **options),
    )
    here = bool(computed)
    if "colour" not in options:
        made = [
            outcome(lambda images, kind=kind: kind(**options)(images), images) for kind in (ImageProcessor, Reference)
        ]
        assert_same(*made)
    assert here == (name in OPTIONS)


def test_all_equal_without_padding(computed):
    images = [Image.fromarray(photograph(i, 60, 80)) for i in range(3)]
    for tensors in ("pt", "np", None):
        given = {"do_pad": False, "size": {"shortest_edge": 64}, "return_tensors": tensors}
        assert_same(ImageProcessor()(images, **given), Reference()(images, **given))
    assert len(computed) == 3


def kinds_of_input():
    rng = np.random.default_rng(5)
    last = [photograph(rng, 50, 70), photograph(rng, 80, 40)]
    first = [np.ascontiguousarray(one.transpose(2, 0, 1)) for one in last]
    images = [Image.fromarray(one) for one in last]
    return {
        "one image": (images[0], True),
        "a tuple": (tuple(images), True),
        "the same one twice": ([images[0], images[1], images[0]], True),
        "arrays": (last, True),
        "arrays, channels first": (first, True),
        "a view": (last[0][::-1, ::2], True),
        "a batch": (np.stack([last[0]] * 2), True),
        "tensors": ([torch.from_numpy(one) for one in first], True),
        "a batch of tensors": (torch.from_numpy(np.stack([first[1]] * 3)), True),
        "images and arrays": ([images[0], last[1]], True),
        "layouts that differ": ([images[0], first[1]], False),
        "floats": ([one.astype(np.float32) for one in last], False),
        "floats from 0 to 1": ([one / 255 for one in last], False),
        "integers": (last[0].astype(np.int64), False),
        "one channel": (last[0][..., :1], False),
        "no channels": (last[0][..., 0], False),
        "three rows": (last[0][:3], False),
        "nested": ([[images[0]], [images[1]]], False),
        "a list of batches": ([np.stack([last[0]] * 2)], False),
        "none": ([], False),
        "None": (None, False),
        "text": ("no such file.jpg", False),
    }


@pytest.mark.parametrize("name", kinds_of_input())
def test_kinds_of_input(name, computed):
    images, here = kinds_of_input()[name]
    options = {"size": {"shortest_edge": 64}, "return_tensors": "pt"}
    expected = outcome(Reference(), images, **options)
    got = outcome(ImageProcessor(), images, **options)
    if name == "none":
        assert isinstance(got, ValueError) and "empty" in str(got) and isinstance(expected, ValueError | IndexError)
    else:
        assert_same(got, expected)
    assert bool(computed) == here


def test_threads_change_nothing(monkeypatch, computed):
    """One image in bands, several with a thread each, files too; images that share one open file."""
    monkeypatch.setattr(resize, "LARGE", 2**12)
    rng = np.random.default_rng(7)
    plain = {"size": {"shortest_edge": 64}, "return_tensors": "pt"}
    drawn = [photograph(rng, *sides) for sides in ((300, 211), (197, 300), (320, 230), (64, 64), (200, 190))]
    images = [Image.fromarray(one) for one in drawn]
    file = io.BytesIO(pictures.encoded(drawn[0], "RGB", "JPEG"))
    for threads, count in itertools.product((1, 2, 5), (1, 2, 5)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert_same(ImageProcessor()(images[:count], **plain), Reference()(images[:count], **plain))
        shared = [Image.open(file) for _ in range(count)]
        assert_same(ImageProcessor()(shared, **plain), Reference()([Image.open(file)] * count, **plain))
    assert len(computed) == 18


@pytest.mark.parametrize("resample", range(6))
def test_bands_are_the_whole(resample, monkeypatch):
    """Whatever is larger or smaller, and whichever of rows and columns this Pillow filters first."""
    monkeypatch.setattr(resize, "LARGE", 0)
    banded = []
    in_bands = resize._in_bands
    monkeypatch.setattr(resize, "_in_bands", lambda *arguments: banded.append(1) or in_bands(*arguments))
    rng = np.random.default_rng(resample)
    for _ in range(60):
        (height, width), wanted = rng.integers(1, 200, 2), tuple(map(int, rng.integers(1, 90, 2)))
        if rng.integers(0, 2):  # what bands are made of: so many quarters of a row to a row
            wanted = 4 * (wanted[0] // 8 + 1), wanted[1]
            height = wanted[0] * int(rng.integers(3, 13)) // 4
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        edges = sorted(rng.uniform(0, width, 2)), sorted(rng.uniform(0, height, 2))
        box = [None, (*(low for low, _ in edges), *(high for _, high in edges))][int(rng.integers(0, 3)) // 2]
        got = resize.exact(image, wanted, resample, int(rng.integers(1, 9)), box)
        assert got.tobytes() == image.resize(wanted[::-1], resample, box=box).tobytes()
    assert bool(banded) == (resample != 0)


def test_a_pillow_of_another_order_is_found_out(monkeypatch):
    """One that filters columns first of a band, and rows first of the whole, is not given bands."""
    assert resize._probed()

    class Turned:
        """Pillow's image, whose resize filters columns first where few rows are wanted."""

        def __init__(self, image):
            self.image = image

        def resize(self, size, resample, box=None):
            if size[1] * 8 >= self.image.height:
                return self.image.resize(size, resample, box=box)
            return self.image.resize((self.image.width, size[1]), resample, box=box).resize(size, resample)

        def __getattr__(self, name):
            return getattr(self.image, name)

    fromarray = Image.fromarray
    monkeypatch.setattr(Image, "fromarray", lambda array: Turned(fromarray(array)))
    assert not resize._probed.__wrapped__()


def test_methods_of_ones_own_are_called(computed):
    """On a subclass, or on an instance."""
    image = Image.fromarray(photograph(1, 40, 50))

    class Darker(ImageProcessor):
        def rescale(self, image, scale, **options):
            return super().rescale(image, scale / 2, **options)

    class Documented(ImageProcessor):
        """One that changes nothing."""

        def preprocess(self, images, **options):
            return super().preprocess(images, **options)

    given = {"size": {"shortest_edge": 64}, "return_tensors": "np"}
    whole = ImageProcessor()(image, do_normalize=False, **given)["pixel_values"]
    half = Darker()(image, do_normalize=False, **given)["pixel_values"]
    assert len(computed) == 1 and np.allclose(half * 2, whole)
    patched = ImageProcessor()
    patched.normalize = lambda image, *options, **formats: image * 0
    assert not patched(image, **given)["pixel_values"].any() and len(computed) == 1
    assert_same(Documented()(image, **given), Reference()(image, **given))
    assert len(computed) == 2

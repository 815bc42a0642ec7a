"""Where a `ViltProcessor` takes an image processor, ours will do; what is saved is the reference."""

import copy
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from support import pictures
from transformers import AutoImageProcessor, ViltProcessor
from transformers.image_utils import load_image

import vilt_fast
from vilt_fast import ImageProcessor
from vilt_fast.commands.samples import photograph, word_tokenizer
from vilt_fast.images.reference import Reference

pytestmark = pytest.mark.core


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(pictures.encoded(photograph(0, 300, 420), "RGB", "JPEG", 6))
    return path


@pytest.fixture
def tokenizer():
    return word_tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cats", "two"])


def test_in_the_processor_of_a_model(photo, tokenizer, monkeypatch):
    computed = []
    batch = ImageProcessor._batch
    monkeypatch.setattr(ImageProcessor, "_batch", lambda *arguments: computed.append(1) or batch(*arguments))
    plain = ViltProcessor(Reference(size={"shortest_edge": 64}), tokenizer)
    expected = plain(load_image(str(photo)), "two cats", return_tensors="pt")
    given = ViltProcessor(ImageProcessor.from_reference(plain), tokenizer)
    assigned = copy.copy(plain)
    assigned.image_processor = assigned.current_processor = ImageProcessor(size={"shortest_edge": 64})
    for processor in (given, assigned):
        for image in (load_image(str(photo)), str(photo), [photo]):
            got = processor(image, "two cats", return_tensors="pt")
            assert sorted(got) == sorted(expected) and all(torch.equal(got[name], expected[name]) for name in expected)
    assert len(computed) == 6
    given.image_processor.decode = "fast"
    got = given(photo, "two cats", return_tensors="pt")["pixel_values"]
    assert torch.equal(got, given.image_processor(photo, return_tensors="pt", decode="fast")["pixel_values"])
    assert got.shape == expected["pixel_values"].shape and not torch.equal(got, expected["pixel_values"])


def test_saved_and_loaded(photo, tmp_path):
    """By HuggingFace's own classes as the reference, by ours with all that was said."""
    said = {"size": {"shortest_edge": 64}, "size_divisor": 16, "image_mean": [0.4, 0.5, 0.6], "resample": 2}
    for decode in ("exact", "fast"):
        ours = ImageProcessor(decode=decode, **said)
        folder = tmp_path / decode
        ours.save_pretrained(folder)
        image = load_image(str(photo))
        expected = Reference(**said)(image, return_tensors="np")["pixel_values"]
        for loaded in (AutoImageProcessor.from_pretrained(folder), Reference.from_pretrained(folder)):
            assert not isinstance(loaded, ImageProcessor)
            assert np.array_equal(loaded(image, return_tensors="np")["pixel_values"], expected)
        again = ImageProcessor.from_pretrained(folder)
        assert again.decode == decode
        for other in (
            again,
            copy.deepcopy(ours),
            pickle.loads(pickle.dumps(ours)),
            ImageProcessor.from_reference(ours),
        ):
            assert np.array_equal(other(image, decode="exact", return_tensors="np")["pixel_values"], expected)
        assert ImageProcessor.from_pretrained(folder, decode="fast").decode == "fast"
        assert ("decode" in (folder / "preprocessor_config.json").read_text()) == (decode == "fast")


def test_from_the_reference():
    """Every option, also one assigned later; nobody else's class."""
    plain = Reference(do_pad=False)
    plain.image_std = [0.1, 0.2, 0.3]
    image = Image.fromarray(photograph(0, 70, 90))
    ours = ImageProcessor.from_reference(plain, decode="fast")
    assert ours.decode == "fast"
    got, expected = (one(image, return_tensors="np") for one in (ours, plain))
    assert list(got) == list(expected) == ["pixel_values"]
    assert np.array_equal(got["pixel_values"], expected["pixel_values"])
    plain.image_std[0] = 9.0
    assert ours.image_std[0] == 0.1

    class Torchvision(Reference):
        """Somebody's own."""

    with pytest.raises(TypeError, match="Torchvision.*from_dict"):
        ImageProcessor.from_reference(Torchvision())
    with pytest.raises(TypeError, match="got builtins.NoneType"):
        ImageProcessor.from_reference(None)
    assert isinstance(ours, Reference) and vilt_fast.ImageProcessor is ImageProcessor

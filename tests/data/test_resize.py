"""The sizes that ViLT resizes to, and the pixels."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.vilt.image_processing_pil_vilt import get_resize_output_image_size

from vilt_fast import InputError
from vilt_fast.commands.samples import scenes
from vilt_fast.data import target_size, to_pixels
from vilt_fast.images.reference import Reference
from vilt_fast.testing import assert_within_budget


@pytest.mark.parametrize("given, expected", [
    ((640, 384), (608, 352)), ((500, 500), (384, 384)), ((3000, 1000), (608, 192)), ((100, 1000), (64, 608)),
    ((384, 640), (352, 608)), ((384, 639), (384, 608)), ((1, 1), (384, 384)),
])  # fmt: skip
def test_sizes_of_the_original(given, expected):
    assert target_size(*given) == expected


def test_sizes_are_huggingfaces_whatever_the_image():
    draw = np.random.default_rng(0)
    for _ in range(2000):
        height, width = (int(side) for side in np.exp(draw.uniform(np.log(200), np.log(1500), 2)))
        shorter, divisor = [(384, 32), (96, 16), (224, 16)][draw.integers(3)]
        image = np.broadcast_to(np.uint8(0), (3, height, width))
        longer = int(1333 / 800 * shorter)
        theirs = tuple(get_resize_output_image_size(image, shorter=shorter, longer=longer, size_divisor=divisor))
        assert target_size(height, width, shorter=shorter, divisor=divisor) == theirs


def test_pixels_are_huggingfaces():
    photograph = scenes(3)[2][0]
    theirs = Reference()([photograph], return_tensors="pt")["pixel_values"][0]
    ours = to_pixels(Image.fromarray(photograph))
    exact = (torch.round((ours.double() + 1) * 127.5) / 255 - 0.5) / 0.5
    assert_within_budget(ours, theirs, exact)


@pytest.mark.parametrize("size", [(1000, 40), (40, 1000), (33, 1000)])
def test_less_than_a_patch_is_an_error(size):
    with pytest.raises(InputError, match=f"{size[0]} x {size[1]} pixels is too long and thin.*Crop it"):
        target_size(*size)
    with pytest.raises(InputError, match="too long and thin"):
        to_pixels(Image.new("RGB", size[::-1]))


def test_no_pixels_is_an_error():
    with pytest.raises(InputError, match="must have pixels, got 0 x 4"):
        target_size(0, 4)

"""Inputs that look like real ones: photographs, texts, and the tensors ViLT takes.

The photographs ship inside scikit-image, so nothing is downloaded. Without scikit-image the same shapes are drawn
from noise. Sizes follow the checkpoint: shorter side = `config.image_size`, sides floored to the patch size.
"""

import re
import tempfile
from pathlib import Path

import numpy as np
import torch

# (scikit-image name, crop as rows and columns, text). Crops give portrait shapes; texts go from 4 to 31 words.
_SCENES = (
    ("astronaut", None, "Who is this person?"),
    ("coffee", None, "What is next to the cup on the wooden table?"),
    ("chelsea", None, "What colour are the eyes of the cat?"),
    ("rocket", None, "Is the rocket standing on the launch pad in the daytime, or has it already taken off at night?"),
    ("stereo_motorcycle", None, "What vehicle is parked in the workshop?"),
    (
        "astronaut",
        (slice(0, 512), slice(80, 380)),
        (
            "The woman in the orange suit is smiling at the camera while a model of a space shuttle and a flag stand "
            "behind her; how many patches can you count on the suit?"
        ),
    ),
    ("hubble_deep_field", None, "How many galaxies are there in this part of the sky, roughly?"),
    ("rocket", (slice(0, 427), slice(200, 455)), "What lights up the tower beside the rocket?"),
)
_NOISE_SHAPES = ((384, 384), (400, 600), (300, 451), (427, 640), (500, 741), (512, 300), (436, 500), (427, 255))


def scenes(count=8):
    """`count` pairs (image, text): uint8 RGB arrays [height, width, 3] of several aspect ratios, texts of any length.

    Real photographs where scikit-image is installed, seeded noise of the same shapes where it is not.
    """
    try:
        from skimage import data
    except ImportError:
        noise = np.random.default_rng(0)
        images = [noise.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in _NOISE_SHAPES]
    else:
        images = []
        for name, crop, _ in _SCENES:
            image = getattr(data, name)()
            image = image[0] if isinstance(image, tuple) else image
            images.append(np.ascontiguousarray(image if crop is None else image[crop]))
    pairs = [(image, text) for image, (_, _, text) in zip(images, _SCENES, strict=True)]
    return [pairs[i % len(pairs)] for i in range(count)]


def photograph(seed, height, width):
    """A drawn photograph of any size: uint8 RGB [height, width, 3]; `seed` may be a NumPy generator.

    Detail at every scale (a little less in each octave), hard edges, the grain of a sensor, as real ones have; as a
    JPEG of quality 90 it takes about 2 bits a pixel, as they do.
    """
    from PIL import Image

    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    cells, weight = 3, 1.0
    while cells <= max(3, min(height, width) // 3):
        coarse = rng.normal(0, weight, (cells, max(1, cells * width // height), 3)).astype(np.float32)
        for channel in range(3):
            plane = Image.fromarray(coarse[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            total[..., channel] += np.asarray(plane)
        cells, weight = 2 * cells, 0.8 * weight
    for _ in range(12):
        (top, bottom), (left, right) = (np.sort(rng.integers(0, side + 1, 2)) for side in (height, width))
        total[top:bottom, left:right] += rng.normal(0, 1, 3)
    total = (total - total.mean()) * (45 / max(float(total.std()), 1e-6)) + 120
    return np.clip(total + rng.normal(0, 3, (height, width, 1)), 0, 255).astype(np.uint8)


def words(text):
    """Words and punctuation of a text, in lower case, one by one."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def word_ids(texts, limit, vocab_size):
    """Token ids for weights that never saw a tokenizer: words and punctuation numbered in order of first appearance.

    Returns `input_ids` and `attention_mask`, int64 [len(texts), longest text], at most `limit` tokens, [CLS] and [SEP]
    included. Ids stay below `vocab_size`.
    """
    texts = [words(text) for text in texts]
    numbers = {word: i for i, word in enumerate(dict.fromkeys(w for row in texts for w in row))}
    first = min(1000, vocab_size // 2)
    cls, sep = (101, 102) if vocab_size > 103 else (1, 2)
    rows = [
        [cls, *(first + numbers[w] % (vocab_size - first) for w in row[: max(limit - 2, 0)]), sep][:limit]
        for row in texts
    ]
    longest = max(map(len, rows))
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows]), torch.tensor(mask)


def image_processor(config):
    """The ViLT image processor at the sizes of `config`: HuggingFace's results, bit for bit."""
    from ..images.processor import ImageProcessor

    return ImageProcessor(size={"shortest_edge": config.image_size}, size_divisor=config.patch_size)


def word_tokenizer(words):
    """HuggingFace's `BertTokenizer`, the fast one, that knows these words: the first has the number 0."""
    from transformers import BertTokenizerFast

    with tempfile.TemporaryDirectory() as folder:  # a file is what every release of transformers takes
        file = Path(folder) / "vocab.txt"
        file.write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
        return BertTokenizerFast(str(file))


def model_inputs(config, pairs, checkpoint=None):
    """The keyword arguments of a ViLT forward for `pairs` of (image, text).

    `checkpoint` (folder or hub id) supplies image processor and tokenizer where it has them. For several images per
    text (NLVR2), see `group_images`.
    """
    images, texts = [image for image, _ in pairs], [text for _, text in pairs]
    processor, tokenizer = image_processor(config), None
    if checkpoint is not None:
        processor, tokenizer = _load_processor(checkpoint, processor)
    limit = config.max_position_embeddings
    if tokenizer is None:
        ids, mask = word_ids(texts, limit, config.vocab_size)
    else:
        encoded = tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
    pixels = processor(images, return_tensors="pt")
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": pixels["pixel_values"].float(),
        "pixel_mask": pixels["pixel_mask"],
    }
    return inputs


def group_images(inputs, images):
    """Regroup a batch of B images into B // `images` samples of `images` photographs each (NLVR2: two)."""
    batch = inputs["input_ids"].shape[0] // images
    inputs = {name: value[: batch * images] for name, value in inputs.items()}
    for name in ("pixel_values", "pixel_mask"):
        inputs[name] = inputs[name].unflatten(0, (batch, images))
    for name in ("input_ids", "attention_mask"):
        inputs[name] = inputs[name][::images]
    return inputs


def _load_processor(checkpoint, fallback):
    """(image processor, tokenizer) of a checkpoint; what it does not have is the fallback, or None for a tokenizer."""
    from transformers import AutoTokenizer

    processor, tokenizer = fallback, None
    try:
        processor = type(fallback).from_pretrained(checkpoint)
    except (OSError, ValueError):
        pass
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError, KeyError):
        pass
    # A folder without a vocabulary gets a tokenizer that knows nothing but [UNK] and the like.
    known = tokenizer is not None and len(tokenizer) > len(tokenizer.all_special_tokens)
    return processor, tokenizer if known else None


def real_rows(inputs, config):
    """Which rows of a reference `last_hidden_state` mean something: bool [batch, text + 1 + most patches].

    Text rows follow `attention_mask`; of the image rows the reference puts [CLS] and a sample's own patches first and
    fills up with padding cells. Patches are counted like the reference counts them: the mask at each patch's top-left
    pixel, first column times first row; a positive `config.max_image_length` caps the count.
    """
    cells = inputs["pixel_mask"][:, :: config.patch_size, :: config.patch_size] != 0
    patches = cells[:, :, 0].sum(1) * cells[:, 0, :].sum(1)
    if config.max_image_length > 0:
        patches = patches.clamp(max=config.max_image_length)
    order = torch.arange(int(patches.max()) + 1)
    return torch.cat([inputs["attention_mask"] != 0, order[None] < patches[:, None] + 1], dim=1)


def token_counts(inputs, config):
    """(real tokens, rows the padded reference computes) of a batch."""
    rows = real_rows(inputs, config)
    return int(rows.sum()), rows.numel()

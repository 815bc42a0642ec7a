"""Datasets, batches and the loader: what is real, what is drawn and by whom, what cannot be read."""

import collections
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vilt_fast import InputError
from vilt_fast.commands.samples import word_tokenizer
from vilt_fast.data import Collator, PairDataset, RandAugment, TokenBudget, WholeWordMasking, to_pixels
from vilt_fast.data.negatives import other, other_texts

TOKENIZER = word_tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"])
SIZES = [(40, 60), (60, 40), (50, 50), (33, 90), (40, 41)]  #: height and width
SMALL = {"shorter": 32, "divisor": 16}


def photograph(number):
    height, width = SIZES[number % len(SIZES)]
    noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    noise[..., 0] = number  # an image is known by its red
    return Image.fromarray(noise)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def texts(count):
    return [" ".join("abcdefgh"[: 1 + i % 8]) for i in range(count)]


def pairs(count=12, images=None, **options):
    images = [encoded(photograph(i)) for i in range(count)] if images is None else images
    return PairDataset(images, texts(count), TOKENIZER, **SMALL | options)


def loader(dataset, workers, epoch=0, batch=0, **options):
    budget = TokenBudget(dataset.lengths(), 48, seed=3)
    budget.set_epoch(epoch, batch)
    collate = Collator(TOKENIZER, masking=WholeWordMasking(TOKENIZER), seed=3)
    return DataLoader(dataset, batch_sampler=budget, num_workers=workers, collate_fn=collate, **options)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_is_the_same_with_any_number_of_workers():
    dataset = pairs(augment=RandAugment(), false_image=True, seed=3)
    alone = list(loader(dataset, 0))
    assert len(alone) > 3
    for workers in (1, 3):
        several = list(loader(dataset, workers))
        assert len(several) == len(alone) and all(map(same, several, alone))
    later = list(loader(dataset, 0, epoch=1))
    assert not all(same(a, b) for a, b in zip(alone, later, strict=False))
    assert all(map(same, loader(dataset, 0, batch=2), alone[2:]))  # a run goes on where another one stopped


def test_an_epoch_reaches_workers_that_outlive_it():
    dataset = pairs(8, augment=RandAugment(), false_image=True)
    collate = Collator(TOKENIZER, masking=WholeWordMasking(TOKENIZER))
    lasting = DataLoader(dataset, batch_size=4, num_workers=1, persistent_workers=True, collate_fn=collate)
    first = list(lasting)
    dataset.set_epoch(1)
    second = list(lasting)
    assert not any(map(same, first, second))
    assert all(map(same, second, DataLoader(dataset, batch_size=4, collate_fn=collate)))


def test_the_batch_is_what_models_take():
    dataset = pairs(3, false_image=True)
    batch = Collator(TOKENIZER, masking=WholeWordMasking(TOKENIZER))([dataset[i] for i in range(3)])
    assert batch["input_ids"].tolist() == [[2, 5, 3, 0, 0], [2, 5, 6, 3, 0], [2, 5, 6, 7, 3]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 4, 5]
    assert batch["token_type_ids"].shape == batch["labels"].shape == batch["mlm_input_ids"].shape == (3, 5)
    assert batch["pixel_values"].shape == (3, 3, 48, 48) and batch["pixel_mask"].shape == (3, 48, 48)
    for i in range(3):
        pixels = to_pixels(photograph(i), **SMALL)
        _, height, width = pixels.shape
        assert torch.equal(batch["pixel_values"][i, :, :height, :width], pixels)
        assert batch["pixel_mask"][i, :height, :width].all() and batch["pixel_mask"][i].sum() == height * width
        assert not (batch["pixel_values"][i] * (1 - batch["pixel_mask"][i])).any()
    assert batch["false_pixel_mask"].shape == batch["false_pixel_values"][:, 0].shape
    lengths = batch["attention_mask"].sum(1) + 1 + batch["pixel_mask"].sum((1, 2)) // 256
    assert lengths.tolist() == dataset.lengths().tolist() == dataset.lengths(SIZES[:3]).tolist()


def test_several_images_a_text_and_labels():
    image_of = [(0, 1), (2, 2), (1, 0)]
    dataset = pairs(3, images=[photograph(i) for i in range(3)], image_of=image_of, labels=[1, 0, 1])
    batch = Collator(TOKENIZER)([dataset[i] for i in range(3)])
    assert batch["pixel_values"].shape == (3, 2, 3, 48, 48) and batch["pixel_mask"].shape == (3, 2, 48, 48)
    assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][2].flip(0))
    assert batch["labels"].tolist() == [1, 0, 1]
    assert dataset.lengths().tolist() == [3 + 2 + 12, 4 + 2 + 8, 5 + 2 + 12]
    with pytest.raises(ValueError, match="leave out one"):
        Collator(TOKENIZER, masking=WholeWordMasking(TOKENIZER))([dataset[0]])
    soft = PairDataset([photograph(0)], texts(1), TOKENIZER, labels=[torch.tensor([0.0, 0.6])], **SMALL)
    assert Collator(TOKENIZER)([soft[0]])["labels"].tolist() == [[0.0, pytest.approx(0.6)]]


def red(pixels):
    """The number of the photograph."""
    return round((pixels[0].mean().item() + 1) * 127.5)


def test_a_false_image_never_is_the_right_one():
    draw = np.random.default_rng(0)
    counts = collections.Counter(other(2, 5, draw) for _ in range(4000))
    assert counts.keys() == {0, 1, 3, 4} and min(counts.values()) > 850
    with pytest.raises(InputError, match="there are 1"):
        other(0, 1, draw)
    image_of = [0, 0, 1, 2, 2, 2]
    dataset = pairs(6, images=[photograph(i) for i in range(3)], image_of=image_of, false_image=True)
    seen = {(image_of[i], red(dataset[e, i]["false_pixel_values"])) for e in range(20) for i in range(6)}
    assert seen == {(a, b) for a in range(3) for b in range(3) if a != b}


def test_false_texts_are_different_and_of_other_images():
    image_of = np.repeat(np.arange(6), 4)
    draw = np.random.default_rng(0)
    counts = np.zeros(24)
    for _ in range(400):
        drawn = other_texts(2, image_of, 15, draw)
        assert len(set(drawn)) == 15
        counts[drawn] += 1
    assert not counts[8:12].any() and counts[image_of != 2].min() > 250
    assert sorted(other_texts(2, image_of, 20, draw)) == [i for i in range(24) if image_of[i] != 2]
    with pytest.raises(InputError, match="21 false texts.*only 20"):
        other_texts(2, image_of, 21, draw)
    dataset = pairs(24, images=[photograph(i) for i in range(6)], image_of=image_of, false_texts=15)
    batch = Collator(TOKENIZER)([dataset[8], dataset[0]])
    assert batch["false_input_ids"].shape[:2] == (2, 15)
    assert batch["false_attention_mask"].equal((batch["false_input_ids"] != 0).long())


def broken(tmp_path):
    """Images of which some cannot be used: cut off, no image, missing, too thin."""
    (tmp_path / "cut.jpg").write_bytes(encoded(photograph(3), "JPEG")[:400])
    (tmp_path / "text.png").write_text("no image")
    good = [encoded(photograph(i)) for i in range(8)]
    thin = encoded(Image.new("RGB", (20, 1200)))
    return [*good, tmp_path / "cut.jpg", str(tmp_path / "text.png"), tmp_path / "missing.png", thin]


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_cannot_be_used_are_left_out_and_counted(tmp_path, workers, caplog):
    dataset = pairs(12, images=broken(tmp_path), false_image=True)
    batches = list(loader(dataset, workers))
    assert sum(len(batch["input_ids"]) for batch in batches) == 8
    assert dataset.unreadable == [8, 9, 10, 11]
    for batch in batches:
        assert not {red(pixels) for pixels in batch["pixel_values"]} & {8, 9, 10, 11}
    if not workers:
        assert "image 8" in caplog.text and "cut.jpg" in caplog.text and caplog.text.count("too long and thin") == 1
    with pytest.raises(InputError, match="no image of this batch"):
        Collator(TOKENIZER)([dataset[i] for i in range(8, 12)])


@pytest.mark.parametrize("number, message", [(8, "cut.jpg"), (9, "text.png"), (10, "missing.png"), (11, "thin")])
def test_strict_raises(tmp_path, number, message):
    with pytest.raises(InputError, match=rf"image {number} \(.*{message}"):
        pairs(12, images=broken(tmp_path), strict=True)[number]


def test_what_breaks_while_augmenting_is_no_damaged_image():
    def wrong(image, generator):
        raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        pairs(augment=wrong)[0]


def test_no_false_image_can_be_read():
    dataset = pairs(2, images=[encoded(photograph(0)), b"no image"], false_image=True)
    with pytest.raises(InputError, match="1 of 2 images cannot"):
        dataset[0]


def test_images_are_opened_once_a_sample_and_turned_as_their_camera_says(monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(photograph(0), "JPEG", exif=exif)
    opened, original = [], Image.open
    dataset = pairs(2, images=[turned, encoded(photograph(1))], false_image=True)
    assert dataset.lengths().tolist() == [3 + 1 + 6, 4 + 1 + 6]
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(a) or original(*a, **k))
    assert dataset[0]["pixel_values"].shape == (3, 48, 32) and len(opened) == 2  # its own and the false one


def test_batches_are_filled_to_the_budget():
    lengths = np.random.default_rng(0).integers(20, 200, 5000)
    sampler = TokenBudget(lengths, 4000, seed=1)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    sums = [lengths[[index for _, index in batch]].sum() for batch in batches]
    assert max(sums) <= 4000 and np.mean(sums[:-1]) > 0.97 * 4000
    assert sorted(index for batch in batches for _, index in batch) == list(range(5000))
    first = [index for _, index in batches[0]]
    following = [lengths[batch[0][1]] for batch in batches[1:]]
    assert all(total + extra > 4000 for total, extra in zip(sums, following, strict=False))  # none would have fitted
    assert [len(batch) for batch in TokenBudget([5] * 6, 10)] == [2, 2, 2]
    sampler.set_epoch(1)
    assert list(sampler)[0][0][0] == 1 and [index for _, index in list(sampler)[0]] != first
    assert [index for _, index in next(iter(TokenBudget(lengths, 4000, shuffle=False)))][:3] == [0, 1, 2]
    assert max(map(len, TokenBudget(lengths, 4000, samples=7))) == 7
    assert list(TokenBudget(lengths, 4000, seed=1, drop_last=True)) == batches[:-1]


def test_processes_share_the_batches():
    lengths = np.random.default_rng(0).integers(20, 200, 500)
    whole = list(TokenBudget(lengths, 1000, seed=1))
    parts = [list(TokenBudget(lengths, 1000, seed=1, rank=rank, world=3)) for rank in range(3)]
    assert len({len(part) for part in parts}) == 1
    together = [batch for three in zip(*parts, strict=True) for batch in three]
    assert together[: len(whole)] == whole and together[len(whole) :] == whole[: len(together) - len(whole)]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="sample 1 has 90 tokens, more than the budget of 80"):
        TokenBudget([80, 90], 80)
    with pytest.raises(ValueError, match="no samples"):
        TokenBudget([], 80)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        TokenBudget([1], 80, rank=2, world=2)
    with pytest.raises(ValueError, match="'texts': 3, 'image_of': 2"):
        pairs(3, image_of=[0, 1])
    with pytest.raises(ValueError, match=r"\[0, 3\), got 0 to 3"):
        pairs(3, image_of=[0, 1, 3])
    with pytest.raises(ValueError, match="one image each"):
        pairs(3, image_of=[(0, 1)] * 3, false_image=True)

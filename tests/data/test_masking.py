"""Whole-word masking: its statistics, which tokens it never touches, and texts that have nothing to mask."""

import random

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, hypergeom
from scipy.stats.contingency import crosstab

from vilt_fast import InputError
from vilt_fast.commands.samples import word_tokenizer
from vilt_fast.data import WholeWordMasking
from vilt_fast.data.draws import MASK, generator

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [f"w{i}" for i in range(20)]
PIECES = ["##a", "##b", "##c"]
PAD, UNK, CLS, SEP, MASKED = range(5)
WORD, PIECE = len(SPECIAL), len(SPECIAL) + len(WORDS)
TOKENIZER = word_tokenizer([*SPECIAL, *WORDS, *PIECES])
LIKELY = 1e-4  #: of a fixed seed; a wrong recipe gives 0


def rng(count, seed=0):
    return [generator(seed, 0, i, MASK) for i in range(count)]


def texts(rows, width=None):
    """(input_ids, attention_mask) of lists of ids, [CLS] and [SEP] put around them."""
    rows = [[CLS, *row, SEP] for row in rows]
    width = width or max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    return ids, (torch.arange(width) < torch.tensor([[len(row)] for row in rows])).long()


#: Ten words, two of them of two pieces and one of three.
TEXT = [WORD, WORD + 1, PIECE, WORD + 2, WORD + 3, PIECE, PIECE + 1, *range(WORD + 4, WORD + 9), PIECE + 2, WORD + 9]
BEGINS = [0, 1, 3, 4, 7, 8, 9, 10, 11, 13]  #: where each of the words begins in TEXT


@pytest.fixture(scope="module")
def clean():
    """100,000 words in 10,000 texts."""
    ids, real = texts([TEXT] * 10_000)
    return ids, *WholeWordMasking(TOKENIZER)(ids, real, rng(len(ids)))


def test_clean_masks_fifteen_in_a_hundred_words_each_as_often(clean):
    ids, _, labels = clean
    masked = (labels != -100)[:, 1:-1][:, BEGINS]
    counts = masked.sum(0).numpy()
    assert chisquare(counts, [1500] * 10 * np.array(counts.sum() / 15000)).pvalue > LIKELY
    of_texts = masked.sum(1)  # 1.5 of ten: one or two
    assert chisquare(torch.bincount(of_texts)[1:].numpy(), [5000, 5000]).pvalue > LIKELY
    assert of_texts.min() == 1 and of_texts.max() == 2


@pytest.mark.parametrize("recipe", ["clean", "published"])
def test_words_are_masked_whole(recipe):
    ids, real = texts([TEXT] * 300)
    _, labels = WholeWordMasking(TOKENIZER, recipe=recipe)(ids, real, rng(300))
    masked = (labels != -100)[:, 1:-1]
    for begin, end in zip(BEGINS, [*BEGINS[1:], len(TEXT)], strict=True):
        assert (masked[:, begin:end] == masked[:, begin : begin + 1]).all()
    assert (labels == torch.where(labels != -100, ids, -100)).all()


@pytest.mark.parametrize("recipe", ["clean", "published"])
def test_eight_in_ten_become_the_mask_one_another_token_one_stays(clean, recipe):
    ids, out, labels = clean
    if recipe == "published":
        out, labels = WholeWordMasking(TOKENIZER, recipe=recipe)(ids, ids != PAD, rng(len(ids)))
    masked = labels != -100
    assert (out == ids)[~masked].all()
    now, was = out[masked], labels[masked]
    first = WORD if recipe == "clean" else 0  # of the tokens that may replace one
    others = len(TOKENIZER) - first
    hidden, replaced = (now == MASKED), (now != MASKED) & (now != was)
    lucky = 0.1 / others  # a replacement that is the token itself, or [MASK] where that may be one
    share = np.array([0.8 + (lucky if first == 0 else 0), 0.1 - lucky * (2 if first == 0 else 1), 0.1 + lucky])
    counts = np.array([hidden.sum(), replaced.sum(), (now == was).sum()])
    assert chisquare(counts, share * counts.sum()).pvalue > LIKELY
    drawn = torch.bincount(now[replaced], minlength=len(TOKENIZER)).numpy()
    kinds = np.array([i for i in range(first, len(TOKENIZER)) if i != MASKED])
    was_that = torch.bincount(was, minlength=len(TOKENIZER)).numpy()[kinds] / len(was)
    expected = (1 - was_that) / (1 - was_that).sum() * drawn.sum()
    assert drawn.sum() == drawn[kinds].sum() and chisquare(drawn[kinds], expected).pvalue > LIKELY


def test_clean_never_masks_or_draws_special_tokens():
    row = [UNK, WORD, UNK, PIECE, MASKED, SEP, CLS, WORD + 1]
    ids, real = texts([row, row + [WORD] * 8] * 500)
    out, labels = WholeWordMasking(TOKENIZER, share=0.9)(ids, real, rng(len(ids)))
    masked = labels != -100
    assert masked.any() and not (masked & (ids < WORD)).any()
    assert ((out == MASKED) | (out >= WORD))[masked].all()


def one_by_one(row, draw):
    """The published recipe, told as a story: which of the tokens of a text padded to 40 end up masked."""
    words = []
    for place, token in enumerate(row):
        if token in (CLS, SEP):
            continue
        if words and token >= PIECE:
            words[-1].append(place)
        else:
            words.append([place])
    draw.shuffle(words)
    taken = []
    for word in words:
        if len(taken) + len(word) <= 6:
            taken += word
    return [place for place in taken if row[place] >= WORD]


def test_published_masks_as_the_original_did():
    draw = random.Random(0)
    count, padded = 10_000, [CLS, *TEXT, SEP] + [PAD] * (38 - len(TEXT))
    ids, real = texts([TEXT] * count)
    _, labels = WholeWordMasking(TOKENIZER, recipe="published")(ids, real, rng(count))
    ours = (labels != -100).numpy()
    theirs = np.zeros_like(ours)
    for i in range(count):
        theirs[i, one_by_one(padded, draw)] = True
    for counted in (lambda m: m.sum(1), lambda m: m.nonzero()[1]):  # how many of a text, and which
        a, b = counted(ours), counted(theirs)
        table = crosstab(np.r_[np.zeros(len(a)), np.ones(len(b))], np.r_[a, b]).count
        table = table[:, table.sum(0) > 20]
        expected = table.sum(0) * table.sum(1, keepdims=True) / table.sum()
        spare = table.size - table.shape[1]  # of as many numbers, those that are not free
        assert chisquare(table.ravel(), expected.ravel(), ddof=spare, sum_check=False).pvalue > LIKELY


@pytest.mark.parametrize("width", [12, 20, 40])
def test_published_is_hypergeometric_for_words_of_one_token_however_wide_the_batch(width):
    ids, real = texts([range(WORD, WORD + 10)] * 5000, width)
    _, labels = WholeWordMasking(TOKENIZER, recipe="published")(ids, real, rng(len(ids)))
    counts = np.bincount((labels != -100).sum(1).numpy(), minlength=7)
    expected = hypergeom(38, 10, 6).pmf(range(7)) * len(ids)
    assert expected[0] / len(ids) == pytest.approx(0.14, abs=0.005)
    tail = slice(None, 5)
    assert chisquare([*counts[tail], counts[5:].sum()], [*expected[tail], expected[5:].sum()]).pvalue > LIKELY


@pytest.mark.parametrize("recipe", ["clean", "published"])
def test_a_text_without_words_comes_back(recipe):
    ids, real = texts([[], [UNK, UNK], [WORD]] * 50)
    out, labels = WholeWordMasking(TOKENIZER, recipe=recipe)(ids, real, rng(150))
    wordless = (ids >= WORD).sum(1) == 0
    assert (out[wordless] == ids[wordless]).all() and (labels[wordless] == -100).all()
    if recipe == "clean":
        assert ((labels[~wordless] != -100) == torch.tensor([False, True, False, False])).all()


@pytest.mark.parametrize("recipe", ["clean", "published"])
def test_masks_belong_to_the_sample_not_to_the_batch(recipe):
    masking = WholeWordMasking(TOKENIZER, recipe=recipe)
    ids, real = texts([TEXT, TEXT[:3], TEXT[:9]])
    together = masking(ids, real, rng(3))
    for i in range(3):
        size = int(real[i].sum())
        alone = masking(ids[i : i + 1, :size], real[i : i + 1, :size], [generator(0, 0, i, MASK)])
        assert all((a[0] == t[i, :size]).all() for a, t in zip(alone, together, strict=True))
    assert (masking(ids, real, rng(3, seed=1))[1] != together[1]).any()


def test_words_told_by_number():
    ids, real = texts([[WORD, WORD, WORD + 1, WORD + 2]] * 200)
    numbers = torch.tensor([[-1, 0, 0, 1, 2, -1]] * 200)
    _, labels = WholeWordMasking(TOKENIZER)(ids, real, rng(200), numbers)
    masked = labels != -100
    assert masked[:, 1].any() and (masked[:, 1] == masked[:, 2]).all() and not (masked[:, 2] & masked[:, 3]).any()


class Sentencepiece:
    """A tokenizer that marks where words begin."""

    mask_token_id, cls_token_id, sep_token_id, all_special_ids = 4, 2, 3, [0, 1, 2, 3, 4]

    def __init__(self, *words):
        self.names = [*SPECIAL, *words]

    def __len__(self):
        return len(self.names)

    def convert_ids_to_tokens(self, ids):
        return [self.names[i] for i in ids]


def test_bad_input_is_named():
    masking = WholeWordMasking(TOKENIZER, length=8)
    ids, real = texts([TEXT[:4]])
    with pytest.raises(InputError, match="16 tokens.*made for 8"):
        masking(*texts([TEXT[:14]]), rng(1))
    with pytest.raises(InputError, match="B generators"):
        masking(ids, real, rng(2))
    with pytest.raises(InputError, match=r"in \[0, 28\), got 0 to 28"):
        masking(*texts([[0, 28]]), rng(1))
    with pytest.raises(InputError, match="word_ids must be"):
        masking(ids, real, rng(1), ids[:, 1:])
    with pytest.raises(ValueError, match="pass word_ids"):
        WholeWordMasking(Sentencepiece("▁red", "ish"))(ids[:, :2], real[:, :2], rng(1))
    for wrong, message in (({"recipe": "dirty"}, "clean, published"), ({"share": 0}, "share must be above 0")):
        with pytest.raises(ValueError, match=message):
            WholeWordMasking(TOKENIZER, **wrong)
    with pytest.raises(ValueError, match="knows no word"):
        WholeWordMasking(Sentencepiece())
    nameless = Sentencepiece("red")
    nameless.mask_token_id = None
    with pytest.raises(ValueError, match="has no mask token"):
        WholeWordMasking(nameless)

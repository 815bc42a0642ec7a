"""Whole-word masking for masked language modelling: which words are masked, and by what.

A word is a token and the pieces ("##...") behind it, or the tokens with one number in `word_ids`. Of the tokens of a
masked word 80 % become [MASK], 10 % another token, 10 % stay; all are labelled. Two recipes say which words:

    "clean"      15 % of the real words: the whole part of 0.15 W, one more with the probability of the rest, at least
                 one. [CLS], [SEP], [PAD] and other special tokens ([UNK] too) are no words and nobody's replacement.
    "published"  as ViLT was trained. Of the text *padded* to 40 tokens, words come in random order, [PAD]s among them
                 as words of one token, and are masked while they fit into max(1, round(0.15 * 40)) = 6 sub-tokens; one
                 that does not is passed over. What falls on [PAD] (or [UNK]) is dropped afterwards, so that of a text
                 of ten words 1.6 are masked on average, and none of one text in seven. Any token is a replacement.

A text without a word has no label (-100 everywhere) and comes back as it was.
Source: BERT (Devlin et al. 2019), its whole-word masking; ViLT (Kim et al. 2021) sec. 3.3; the original's collator.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..errors import InputError

RECIPES = ("clean", "published")
IGNORED = -100  #: the label of what is not masked, as HuggingFace and torch's cross entropy have it
_MASKED, _REPLACED = 0.8, 0.9  # below the one: [MASK]; from the other on: another token
_OTHER_MARKS = ("\u0120", "\u2581")  # of tokenizers that mark where words begin: theirs are told by word_ids alone


class WholeWordMasking:
    """Masks whole words of a batch of texts; a sample's draws come from its own generator.

    Args:
        tokenizer: has `mask_token_id`, `all_special_ids`, `cls_token_id`, `sep_token_id`, `convert_ids_to_tokens` and a
            length, as transformers' have.
        recipe: "clean" or "published". share: of words ("clean") or sub-tokens ("published") that are masked.
        length: tokens of the longest text; of the padded one, to "published".

    Raises:
        ValueError: no such recipe, a share outside (0, 1], no mask token, or a vocabulary of special tokens alone.
    """

    def __init__(self, tokenizer, *, recipe: str = "clean", share: float = 0.15, length: int = 40):
        if recipe not in RECIPES:
            raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}.")
        if not 0 < share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {share}.")
        if tokenizer.mask_token_id is None:
            raise ValueError(f"{type(tokenizer).__name__} has no mask token: masked language modelling needs one.")
        self.recipe, self.share, self.length = recipe, share, length
        self.mask_id = tokenizer.mask_token_id
        names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self._piece = np.array([str(name).startswith("##") for name in names])
        self._marked_otherwise = not self._piece.any() and any(str(n).startswith(_OTHER_MARKS) for n in names)
        self._special = np.zeros(len(names), bool)
        self._special[tokenizer.all_special_ids] = True
        self._ends = np.zeros(len(names), bool)
        self._ends[[i for i in (tokenizer.cls_token_id, tokenizer.sep_token_id) if i is not None]] = True
        self._ordinary = np.flatnonzero(~self._special)
        if not len(self._ordinary):
            raise ValueError(f"{type(tokenizer).__name__} knows no word: its vocabulary is special tokens only.")

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        generators: Sequence[np.random.Generator],
        word_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask a batch.

        Args:
            input_ids: int64 [B, T], T at most `length`. attention_mask: [B, T], non-zero where real.
            generators: B of them, one a sample, each advanced by the same number of draws whatever its text.
            word_ids: int64 [B, T], the number of each token's word, -1 for none, as fast tokenizers tell it; by default
                words are told by "##".

        Returns:
            (mlm_input_ids, labels), int64 [B, T]: the masked texts, and the tokens that were there, -100 elsewhere.

        Raises:
            InputError: texts longer than `length`, ids that the tokenizer does not know, shapes that do not fit.
            ValueError: the tokenizer marks words otherwise than by "##", and there are no `word_ids`.
        """
        ids, real = input_ids.numpy(), attention_mask.numpy() != 0
        self._check(ids, real, generators, word_ids)
        batch, size = ids.shape
        drawn = np.stack([g.random(3 * self.length + 1) for g in generators]) if batch else np.zeros((0, 1))
        key, fate, other = (drawn[:, i * self.length : (i + 1) * self.length] for i in range(3))
        continues = self._continues(ids, word_ids)
        if self.recipe == "clean":
            candidate = real & ~self._special[ids]
        else:
            candidate = ~self._ends[ids] | ~real
            candidate, continues = (
                np.pad(a, ((0, 0), (0, self.length - size)), constant_values=value)
                for a, value in ((candidate, True), (continues & real, False))
            )
        word, sizes = _words(candidate, continues)
        # A word's place in a random order; words that are not there come last.
        order = np.where(sizes > 0, key[:, : sizes.shape[1]], 2.0).argsort(1)
        if self.recipe == "clean":
            count = (sizes > 0).sum(1)
            wanted = np.maximum(np.floor(self.share * count + drawn[:, -1]), 1)
            taken = np.arange(order.shape[1]) < np.minimum(wanted, count)[:, None]
        else:
            taken = _that_fit(np.take_along_axis(sizes, order, 1), max(1, round(self.length * self.share)))
        chosen = np.zeros(sizes.shape, bool)
        np.put_along_axis(chosen, order, taken, 1)
        masked = (np.take_along_axis(chosen, np.maximum(word, 0), 1) & candidate)[:, :size]
        masked &= real & ~self._special[ids]

        fate, other = fate[:, :size], other[:, :size]
        choices = self._ordinary if self.recipe == "clean" else np.arange(len(self._special))
        replaced = choices[(other * len(choices)).astype(np.int64)]
        out = np.where(masked & (fate < _MASKED), self.mask_id, np.where(masked & (fate >= _REPLACED), replaced, ids))
        return torch.from_numpy(out), torch.from_numpy(np.where(masked, ids, IGNORED))

    def _check(self, ids, real, generators, word_ids):
        if ids.ndim != 2 or real.shape != ids.shape or len(generators) != len(ids):
            raise InputError(
                f"masking takes input_ids and attention_mask [B, T] and B generators, got {list(ids.shape)}, "
                f"{list(real.shape)} and {len(generators)}."
            )
        if ids.shape[1] > self.length:
            raise InputError(
                f"texts have up to {ids.shape[1]} tokens, this masking was made for {self.length}: truncate them, or "
                "pass length= to WholeWordMasking."
            )
        if ids.size and not 0 <= ids.min() <= ids.max() < len(self._special):
            raise InputError(f"input_ids must be in [0, {len(self._special)}), got {ids.min()} to {ids.max()}.")
        if word_ids is None and self._marked_otherwise:
            raise ValueError('this tokenizer does not mark the pieces of words by "##": pass word_ids.')
        if word_ids is not None and tuple(word_ids.shape) != ids.shape:
            raise InputError(f"word_ids must be {list(ids.shape)}, got {list(word_ids.shape)}.")

    def _continues(self, ids, word_ids):
        """bool [B, T]: tokens that belong to the word of the token before."""
        if word_ids is None:
            return self._piece[ids]
        number = word_ids.numpy()
        same = np.zeros(ids.shape, bool)
        same[:, 1:] = (number[:, 1:] == number[:, :-1]) & (number[:, 1:] >= 0)
        return same


def _words(candidate, continues):
    """(number of each token's word, -1 for none, and sizes of the words), both [B, L]."""
    begins = candidate & ~continues
    first = candidate & (candidate.cumsum(1) == 1)  # a piece with nothing before it
    word = np.where(candidate, (begins | first).cumsum(1) - 1, -1)
    batch, length = word.shape
    rows = np.arange(batch)[:, None] * length
    sizes = np.bincount((rows + word)[candidate], minlength=batch * length).reshape(batch, length)
    return word, sizes


def _that_fit(sizes, budget):
    """bool [B, L]: the words, in this order, that are taken while they fit into the budget; others are passed over."""
    taken, used = np.zeros(sizes.shape, bool), np.zeros(len(sizes), np.int64)
    for i in range(sizes.shape[1]):
        taken[:, i] = (sizes[:, i] > 0) & (used + sizes[:, i] <= budget)
        used += np.where(taken[:, i], sizes[:, i], 0)
    return taken

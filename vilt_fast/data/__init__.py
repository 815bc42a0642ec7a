"""Batches as ViLT is trained on them; knows no model.

    pairs = data.PairDataset(files, captions, tokenizer, augment=data.RandAugment(), false_image=True)
    batches = DataLoader(
        pairs, batch_sampler=data.TokenBudget(pairs.lengths(), 6000), num_workers=2,
        collate_fn=data.Collator(tokenizer, masking=data.WholeWordMasking(tokenizer)),
    )

Every draw belongs to a sample, an epoch and a seed: a run is the same with any number of workers.
"""

from .augment import OPERATIONS, RandAugment
from .budget import TokenBudget
from .collate import Collator
from .masking import WholeWordMasking
from .pairs import PairDataset
from .resize import target_size, to_pixels

__all__ = [
    "OPERATIONS", "Collator", "PairDataset", "RandAugment", "TokenBudget", "WholeWordMasking", "target_size",
    "to_pixels",
]  # fmt: skip

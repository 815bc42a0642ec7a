"""Masked words with HuggingFace's Trainer, on one process or several; stop, and go on where it stopped.

    python examples/trainer.py --steps 100 --out run
    python examples/trainer.py --steps 100 --out run --resume     # from the last checkpoint on, as if never stopped
    torchrun --nproc-per-node 2 examples/trainer.py --steps 100 --out run

Needs accelerate, as any Trainer does. It learns drawn pictures of shapes; `PairDataset(files, captions, tokenizer)`
takes one's own.
"""

import argparse

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, ViltConfig, ViltForMaskedLM
from transformers.modeling_outputs import MaskedLMOutput

import vilt_fast
from vilt_fast import data, objectives
from vilt_fast.commands.lesson import tokenizer
from vilt_fast.data.shapes import VOCABULARY, World


class MaskedWords(ViltForMaskedLM):
    """Its loss is computed of the masked words alone. A step of several batches, or processes, weighs each word alike:
    `num_items_in_batch` is how many the Trainer has counted in all of them."""

    accepts_loss_kwargs = True

    def forward(self, num_items_in_batch=None, **batch):
        return MaskedLMOutput(loss=objectives.mlm_loss(self, batch, num_items=num_items_in_batch))


class Epochs(TrainerCallback):
    """A sample's draws belong to its epoch, of which a run that goes on in the middle of one would hear nothing."""

    def __init__(self, pairs):
        self.pairs = pairs

    def on_epoch_begin(self, args, state, control, **others):
        self.pairs.set_epoch(int(round(state.epoch, 6)))


def main(argv=None):
    """Train; returns the Trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", default="run")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16, help="samples of a batch, of each process")
    parser.add_argument("--accumulate", type=int, default=2, help="batches of a step")
    parser.add_argument("--save", type=int, default=50, help="steps between checkpoints")
    arguments = parser.parse_args(argv)

    torch.manual_seed(0)
    config = ViltConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256, image_size=96, patch_size=16,
        vocab_size=len(VOCABULARY), max_position_embeddings=20, hidden_dropout_prob=0.1,
    )  # fmt: skip
    model = vilt_fast.accelerate(MaskedWords(config))
    scenes, words = World(arguments.scenes), tokenizer()
    pairs = data.PairDataset(scenes, scenes.captions, words, shorter=96, divisor=16)
    trainer = Trainer(
        model,
        TrainingArguments(
            arguments.out, max_steps=arguments.steps, per_device_train_batch_size=arguments.batch,
            gradient_accumulation_steps=arguments.accumulate, learning_rate=1e-3, adam_beta2=0.98, weight_decay=0.01,
            warmup_steps=arguments.steps // 10, save_steps=arguments.save, logging_steps=1, report_to="none",
            remove_unused_columns=False,  # a sample's are the collator's, not the model's
            ddp_find_unused_parameters=True,  # no loss of words reads the pooler
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=pairs,
        data_collator=data.Collator(words, masking=data.WholeWordMasking(words)),
        callbacks=[Epochs(pairs)],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=arguments.resume)
    return trainer


if __name__ == "__main__":
    main()

"""Masked words, matching and alignment with Lightning; stop after an epoch, and go on where it stopped.

    python examples/lightning_module.py --epochs 2 --out run
    python examples/lightning_module.py --epochs 4 --out run --resume     # as 4 epochs at once would have gone on

Needs lightning. It learns drawn pictures of shapes; `PairDataset(files, captions, tokenizer)` takes one's own.
"""

import argparse
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import ViltConfig

import vilt_fast
from vilt_fast import data, objectives
from vilt_fast.commands.lesson import tokenizer
from vilt_fast.data.shapes import VOCABULARY, World


class Pretraining(lightning.LightningModule):
    """Its model is accelerated before Lightning sees it; nothing else is special."""

    def __init__(self, model, batches):
        super().__init__()
        self.model, self.batches = vilt_fast.accelerate(model), batches
        self.losses, self.random = [], None
        self.run = {"samples": len(batches.dataset), "tokens": batches.batch_sampler.budget}

    def train_dataloader(self):
        return self.batches

    def on_train_epoch_start(self):
        self.batches.batch_sampler.set_epoch(self.current_epoch)  # a sample's draws belong to its epoch

    def training_step(self, batch, number):
        output = self.model(**batch)
        self.log_dict({"masked words": output.mlm_loss, "matching": output.itm_loss}, prog_bar=True)
        self.losses.append(output.loss.item())
        return output.loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["random"] = torch.get_rng_state()  # Lightning keeps none; dropout and matching draw from it
        checkpoint["run"] = self.run

    def on_load_checkpoint(self, checkpoint):
        if checkpoint["run"] != self.run:
            raise SystemExit(
                f"the checkpoint is of another run, of {checkpoint['run']}, and this one is of {self.run}."
            )
        self.random = checkpoint["random"]

    def on_train_start(self):
        if self.random is not None:
            torch.set_rng_state(self.random)


def main(argv=None):
    """Train; returns the losses of the steps taken now."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("run"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=1000, help="packed tokens of a batch")
    arguments = parser.parse_args(argv)

    torch.manual_seed(0)
    config = ViltConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256, image_size=96, patch_size=16,
        vocab_size=len(VOCABULARY), max_position_embeddings=20, hidden_dropout_prob=0.1,
    )  # fmt: skip
    scenes, words = World(arguments.scenes), tokenizer()
    pairs = data.PairDataset(scenes, scenes.captions, words, false_image=True, shorter=96, divisor=16)
    batches = DataLoader(
        pairs,
        batch_sampler=data.TokenBudget(pairs.lengths(scenes.sizes), arguments.tokens, drop_last=True),
        collate_fn=data.Collator(words, masking=data.WholeWordMasking(words)),
        generator=torch.Generator(),  # of its own: what dropout draws does not depend on when a loader begins
    )
    learner = Pretraining(objectives.ViltForPreTraining(config), batches)
    trainer = lightning.Trainer(
        accelerator="auto", devices=1, max_epochs=arguments.epochs, gradient_clip_val=1.0, logger=False,
        use_distributed_sampler=False,  # batches are filled to a budget of tokens by a sampler of their own
        callbacks=[ModelCheckpoint(arguments.out, save_last=True)], default_root_dir=arguments.out,
    )  # fmt: skip
    trainer.fit(learner, ckpt_path=arguments.out / "last.ckpt" if arguments.resume else None)
    return learner.losses


if __name__ == "__main__":
    main()

"""Pre-train a small ViLT in a plain loop, on one process or several; stop, and go on where it stopped.

    python examples/pretrain.py --steps 100 --out run
    python examples/pretrain.py --steps 200 --out run --resume      # the losses that 200 steps at once would have had
    torchrun --nproc-per-node 2 examples/pretrain.py --steps 100 --out run

It learns drawn pictures of shapes; `PairDataset(files, captions, tokenizer)` takes one's own.
"""

import argparse
import os
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import ViltConfig

import vilt_fast
from vilt_fast import data, objectives
from vilt_fast.commands.lesson import tokenizer
from vilt_fast.data.shapes import VOCABULARY, World


def main(argv=None):
    """Train; returns the losses of the steps taken now."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("run"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=1000, help="packed tokens of a batch, of each process")
    arguments = parser.parse_args(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        distributed.init_process_group("gloo")

    torch.manual_seed(0)  # equal weights in every process
    config = ViltConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256, image_size=96, patch_size=16,
        vocab_size=len(VOCABULARY), max_position_embeddings=20, hidden_dropout_prob=0.1,
    )  # fmt: skip
    model = vilt_fast.accelerate(objectives.ViltForPreTraining(config)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    torch.manual_seed(1 + rank)  # other dropout and other matching labels in each

    scenes = World(arguments.scenes)
    words = tokenizer()
    pairs = data.PairDataset(scenes, scenes.captions, words, false_image=True, shorter=96, divisor=16)
    sampler = data.TokenBudget(pairs.lengths(scenes.sizes), arguments.tokens, drop_last=True, rank=rank, world=world)
    collate = data.Collator(words, masking=data.WholeWordMasking(words))
    # A loader draws a number whenever it begins, which is not to be one of those that dropout and matching draw.
    batches = DataLoader(pairs, batch_sampler=sampler, collate_fn=collate, generator=torch.Generator())

    step, epoch, batch = 0, 0, 0
    file = arguments.out / f"checkpoint-{rank}.pt"
    if arguments.resume:
        saved = torch.load(file, weights_only=True)
        if saved["world"] != world or saved["scenes"] != arguments.scenes or saved["tokens"] != arguments.tokens:
            had = f"{saved['world']} processes, {saved['scenes']} scenes, {saved['tokens']} tokens a batch"
            raise SystemExit(f"{file} is of another run ({had}): leave out --resume, or ask for the same.")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])
        step, epoch, batch = saved["step"], saved["epoch"], saved["batch"]
    learner = DistributedDataParallel(model) if world > 1 else model

    losses = []
    while step < arguments.steps:
        sampler.set_epoch(epoch, batch)
        for inputs in batches:
            output = learner(**inputs)
            optimizer.zero_grad()
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(output.loss.item())
            step, batch = step + 1, batch + 1
            if rank == 0:
                print(f"step {step}: masked words {output.mlm_loss:.3f}, matching {output.itm_loss:.3f}")
            if step == arguments.steps:
                break
        else:
            epoch, batch = epoch + 1, 0

    arguments.out.mkdir(parents=True, exist_ok=True)
    state = {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state(), "step": step,
        "epoch": epoch, "batch": batch, "world": world, "scenes": arguments.scenes, "tokens": arguments.tokens,
    }  # fmt: skip
    torch.save(state, file)
    if world > 1:
        distributed.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()

"""Masked words with FSDP2: parameters, gradients and optimizer states lie in shards on several processes; or with DDP.

    torchrun --nproc-per-node 2 examples/sharded.py --steps 100 --out run
    torchrun --nproc-per-node 2 examples/sharded.py --steps 100 --out run --ddp    # whole on each process: DDP
    python examples/sharded.py --steps 100 --out run --accumulate 2                # the same steps on one process

A step is one batch of every process, or several; each has its own number of words, and each word weighs alike.
"""

import argparse
import os
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.checkpoint import state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import ViltConfig, ViltForMaskedLM

import vilt_fast
from vilt_fast import data, objectives
from vilt_fast.commands.lesson import tokenizer
from vilt_fast.data.shapes import VOCABULARY, World


class MaskedWords(ViltForMaskedLM):
    """Called as a whole, so that what is sharded is gathered; gives the loss, divided by `num_items`."""

    def forward(self, batch, num_items):
        return objectives.mlm_loss(self, batch, num_items=num_items)


def main(argv=None):
    """Train; returns the losses of the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("run"))
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=1000, help="packed tokens of a batch, of each process")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of a step, of each process")
    parser.add_argument("--ddp", action="store_true", help="all parameters on every process")
    arguments = parser.parse_args(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    torch.manual_seed(0)  # equal weights in every process, which keeps its shard of them
    config = ViltConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256, image_size=96, patch_size=16,
        vocab_size=len(VOCABULARY), max_position_embeddings=20,
    )  # fmt: skip
    model = learner = vilt_fast.accelerate(MaskedWords(config)).train()
    if world > 1:
        distributed.init_process_group("gloo")
    if world > 1 and arguments.ddp:
        learner = DistributedDataParallel(model, find_unused_parameters=True)  # no loss of words reads the pooler
    elif world > 1:
        mesh = distributed.init_device_mesh("cpu", (world,))
        # Blocks one by one, and the rest with the whole: the head shares its decoder with the embedding of words.
        for block in model.vilt.encoder.layer:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)

    scenes, words = World(arguments.scenes), tokenizer()
    pairs = data.PairDataset(scenes, scenes.captions, words, shorter=96, divisor=16)
    sampler = data.TokenBudget(pairs.lengths(scenes.sizes), arguments.tokens, drop_last=True, rank=rank, world=world)
    collate = data.Collator(words, masking=data.WholeWordMasking(words))
    batches = DataLoader(pairs, batch_sampler=sampler, collate_fn=collate)

    losses, epoch, waiting = [], 0, []
    while len(losses) < arguments.steps:
        sampler.set_epoch(epoch)
        for batch in batches:
            waiting.append(batch)
            if len(waiting) < arguments.accumulate:
                continue
            total = sum((batch["labels"] != -100).sum() for batch in waiting)
            if world > 1:
                distributed.all_reduce(total)
            loss = 0.0
            for batch in waiting:
                part = learner(batch, total.clamp(min=1) / world)  # gradients are averaged over the processes
                part.backward()
                loss = loss + part.detach() / world
            if world > 1:
                distributed.all_reduce(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            waiting = []
            if rank == 0:
                print(f"step {len(losses)}: masked words {losses[-1]:.3f}")
            if len(losses) == arguments.steps:
                break
        epoch += 1

    whole = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)  # gathered on the first process
    weights, moments = state_dict.get_state_dict(model, optimizer, options=whole)
    if rank == 0:
        arguments.out.mkdir(parents=True, exist_ok=True)
        torch.save({"model": weights, "optimizer": moments, "losses": losses}, arguments.out / "sharded.pt")
    if world > 1:
        distributed.barrier()  # nobody hangs up while the first still listens
        distributed.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()

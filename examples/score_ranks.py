"""Score a folder of photographs against a file of sentences on several processes or machines.

    torchrun --nproc-per-node 2 examples/score_ranks.py MODEL IMAGES TEXTS scores.npy
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-endpoint HOST:29500 examples/score_ranks.py ...

Each rank reads its own images, and resumes its own part. `torchrun -m vilt_fast score ...` does the same and more.
"""

import sys
from pathlib import Path

import torch
from transformers import ViltForImageAndTextRetrieval

import vilt_fast


def main(name, images, texts, out):
    cuda = torch.cuda.is_available()
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", torch.distributed.get_node_local_rank()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    model = ViltForImageAndTextRetrieval.from_pretrained(name).eval().to(device)
    vilt_fast.accelerate(model)
    found = vilt_fast.score(
        model, Path(texts).read_text().splitlines(), sorted(Path(images).iterdir()), out=out, resume=True
    )
    if torch.distributed.get_rank() == 0:
        best, scores = found.top(1)
        for text, image, score in zip(found.texts, best[:, 0], scores[:, 0], strict=True):
            print(f"{score:8.3f}  {found.images[image]}  {text}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Models whose words coincide with chosen patches, so that the right alignment is known; a photograph, a tokenizer."""

import torch

from support.models import GRIDS, PATCH, build, rectangles
from support.original_vilt import ViLTransformerSS

PLACES = [[7, 2, 11, 4], [6, 1], [14, 0, 13], [0]]  #: the patch that each word of each sample coincides with
FIRST = 10  #: the word with id FIRST + k looks like a patch whose pixel k is lit


def plant(model):
    """Give the word FIRST + k and a patch whose pixel k is lit the same hidden state, one that no other word has."""
    trunk = getattr(model, "vilt", model)
    original = isinstance(model, ViLTransformerSS)
    vision = trunk.transformer if original else trunk.embeddings
    text = trunk.text_embeddings if original else trunk.embeddings.text_embeddings
    tables = [text.position_embeddings.weight, text.token_type_embeddings.weight]
    tables.append((trunk if original else trunk.embeddings).token_type_embeddings.weight)
    tables.append(vision.pos_embed if original else vision.position_embeddings)
    for block in vision.blocks if original else trunk.encoder.layer:
        ends = (block.attn.proj, block.mlp.fc2) if original else (block.attention.output.dense, block.output.dense)
        tables += [parameter for end in ends for parameter in end.parameters()]
    projection = vision.patch_embed.proj if original else vision.patch_embeddings.projection
    with torch.no_grad():
        for norm in (text.LayerNorm, vision.norm if original else trunk.layernorm):
            norm.weight.fill_(1)
            norm.bias.zero_()
        for table in (*tables, projection.weight, projection.bias):
            table.zero_()
        for k in range(32):
            projection.weight[k, 0, k // PATCH, k % PATCH] = 1
        text.word_embeddings.weight[FIRST : FIRST + 32] = torch.eye(32)
    return model


def planted_batch(side="right", grids=GRIDS, places=PLACES):
    """Processed inputs: [CLS] words [SEP] padded on one side; patch number j of each image has its pixel j lit."""
    length = 2 + max(map(len, places))
    ids, mask = torch.zeros(len(places), length, dtype=torch.long), torch.zeros(len(places), length, dtype=torch.long)
    pixels = torch.zeros(len(places), 3, 3 * PATCH, 5 * PATCH)
    for b, (own, (h, w)) in enumerate(zip(places, grids, strict=True)):
        row = torch.tensor([1, *(FIRST + p for p in own), 2])
        at = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[b, at], mask[b, at] = row, 1
        pixels[b, 1, : h * PATCH, : w * PATCH] = 1  # the original takes black for padding
        for j in range(h * w):
            pixels[b, 0, j // w * PATCH + j // PATCH, j % w * PATCH + j % PATCH] = 1
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "pixel_mask": rectangles(grids)}


def processor(words="who is this person ?"):
    """A processor whose words are FIRST and following, "play" and "##ing" among them."""
    from transformers import ViltProcessor

    from vilt_fast.commands.samples import word_tokenizer
    from vilt_fast.images.reference import Reference

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"[{i}]" for i in range(5))]
    tokenizer = word_tokenizer([*special, *words.split(), "play", "##ing", "##s"])
    config = build("trunk").config
    images = Reference(size={"shortest_edge": config.image_size}, size_divisor=config.patch_size)
    return ViltProcessor(images, tokenizer)


def picture(height=40, width=60, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (height, width, 3), generator=draw, dtype=torch.uint8).numpy()

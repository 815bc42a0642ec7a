"""A stand-in for the original repository's model: the same modules, names and arithmetic as far as `infer` goes.

The original is no installable package. Every name that the adapter reads is here as there; layers that only its tasks
and its trainer use are not.
"""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.bert.modeling_bert import BertConfig, BertEmbeddings


class Attention(nn.Module):
    def __init__(self, dim, num_heads, drop):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop)

    def forward(self, x, mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT * self.scale).masked_fill(~mask.bool()[:, None, None], float("-inf"))
        weights = self.attn_drop(scores.softmax(dim=-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2))), weights


class Mlp(nn.Module):
    def __init__(self, dim, drop):
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(2 * dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Block(nn.Module):
    def __init__(self, dim, num_heads, drop):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, drop)
        self.drop_path = nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, drop)

    def forward(self, x, mask=None):
        attended, weights = self.attn(self.norm1(x), mask=mask)
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x))), weights


class PatchEmbed(nn.Module):
    def __init__(self, dim, patch):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)

    def forward(self, x):
        return self.proj(x)


class VisionTransformer(nn.Module):
    def __init__(self, dim, depth, num_heads, image, patch, drop):
        super().__init__()
        self.add_norm_before_transformer = False
        self.patch_embed = PatchEmbed(dim, patch)
        self.patch_size = patch
        self.patch_dim = image // patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_dim**2 + 1, dim))
        self.pos_drop = nn.Dropout(drop)
        self.blocks = nn.ModuleList([Block(dim, num_heads, drop) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def visual_embed(self, pixels, max_image_len=200, mask_it=False):
        assert not mask_it
        x = self.patch_embed(pixels)
        mask = F.interpolate((pixels.sum(dim=1) != 0).float()[:, None], size=x.shape[2:])[:, 0].long()
        heights, widths = mask[:, :, 0].sum(1).tolist(), mask[:, 0].sum(1).tolist()
        table = self.pos_embed[:, 1:].mT.unflatten(2, (self.patch_dim, self.patch_dim))
        counts = [h * w for h, w in zip(heights, widths, strict=True)]
        limit = max(counts) if max_image_len < 0 else min(max(counts), max_image_len)
        tokens, masks, indices = [], [], []
        for b, (h, w) in enumerate(zip(heights, widths, strict=True)):
            position = F.interpolate(table, size=(h, w), mode="bilinear", align_corners=True)[0]
            position = F.pad(position, (0, x.shape[3] - w, 0, x.shape[2] - h))
            real, padding = mask[b].flatten().nonzero()[:, 0], (1 - mask[b]).flatten().nonzero()[:, 0]
            if len(real) >= limit:
                cells = real[torch.multinomial(torch.ones(len(real)), limit)]
            else:
                drawn = torch.multinomial(torch.ones(len(padding)), limit - len(real), replacement=True)
                cells = torch.cat([real, padding[drawn]])
            tokens.append((x[b] + position).flatten(1).T[cells])
            masks.append(mask[b].flatten()[cells])
            indices.append(torch.stack([cells // x.shape[3], cells % x.shape[3]], dim=-1))
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        embedded = self.pos_drop(torch.cat([cls, torch.stack(tokens)], dim=1))
        image_mask = F.pad(torch.stack(masks), (1, 0), value=1)
        return embedded, image_mask, (torch.stack(indices), tuple(x.shape[2:])), None


class Pooler(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.activation = nn.Tanh()

    def forward(self, hidden):
        return self.activation(self.dense(hidden[:, 0]))


class ViLTransformerSS(nn.Module):
    def __init__(self, max_image_len=-1, drop=0.0, dim=32, depth=3, num_heads=4, image=64, patch=16):
        super().__init__()
        bert = BertConfig(
            vocab_size=50, hidden_size=dim, num_attention_heads=num_heads, max_position_embeddings=12,
            hidden_dropout_prob=drop,
        )  # fmt: skip
        self.hparams = SimpleNamespace(config={"max_image_len": max_image_len})
        self.text_embeddings = BertEmbeddings(bert)
        self.token_type_embeddings = nn.Embedding(3, dim)
        self.transformer = VisionTransformer(dim, depth, num_heads, image, patch, drop)
        self.pooler = Pooler(dim)

    def infer(
        self, batch, mask_text=False, mask_image=False, image_token_type_idx=1, image_embeds=None, image_masks=None
    ):
        key = f"image_{image_token_type_idx - 1}"
        suffix = "_mlm" if mask_text else ""
        ids, text_masks = batch[f"text_ids{suffix}"], batch["text_masks"]
        patch_index = labels = None
        if image_embeds is None and image_masks is None:
            image = batch[key if key in batch else "image"][0]
            image_embeds, image_masks, patch_index, labels = self.transformer.visual_embed(
                image, max_image_len=self.hparams.config["max_image_len"], mask_it=mask_image
            )
        text = self.text_embeddings(ids) + self.token_type_embeddings(torch.zeros_like(text_masks))
        image = image_embeds + self.token_type_embeddings(torch.full_like(image_masks, image_token_type_idx))
        x, mask = torch.cat([text, image], dim=1), torch.cat([text_masks, image_masks], dim=1)
        for block in self.transformer.blocks:
            x, _ = block(x, mask=mask)
        x = self.transformer.norm(x)
        width = text.shape[1]
        return {
            "text_feats": x[:, :width], "image_feats": x[:, width:], "cls_feats": self.pooler(x),
            "raw_cls_feats": x[:, 0], "image_labels": labels, "image_masks": image_masks,
            "text_labels": batch[f"text_labels{suffix}"],
            "text_ids": ids, "text_masks": text_masks, "patch_index": patch_index,
        }  # fmt: skip

    def forward(self, batch):
        return self.infer(batch)

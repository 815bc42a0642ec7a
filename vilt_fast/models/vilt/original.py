"""The original `ViLTransformerSS` (dandelin/ViLT): inputs, parameters, outputs of its `infer`.

Everything that the original does with a batch goes through `infer`, so that is what is swapped. The model is known by
its parts, not by its class: the original is no installable package.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import nn

from ...engine import encode as engine
from ...engine.blocks import Attention, Block, FeedForward, activation_kind
from ...engine.listeners import any_hooked
from ...errors import InputError
from ..base import Features, Part, SwappedTrunk
from . import embedding, features
from .options import ViltOptions
from .patches import sampled_mask
from .plan import SequencePlan


def find(model: nn.Module) -> list[Part]:
    """The `ViLTransformerSS`s in `model`."""
    return [Part(module, InferSwap) for module in model.modules() if _is_original(module)]


def _is_original(module) -> bool:
    names = ("text_embeddings", "token_type_embeddings", "transformer", "pooler")
    if not callable(getattr(type(module), "infer", None)) or not all(n in module._modules for n in names):
        return False
    return all(hasattr(module.transformer, n) for n in ("blocks", "norm", "patch_embed", "visual_embed", "pos_drop"))


class InferSwap(SwappedTrunk):
    """`ViLTransformerSS.infer`, packed."""

    name = "infer"
    options_type = ViltOptions

    def __call__(
        self,
        batch,
        mask_text=False,
        mask_image=False,
        image_token_type_idx=1,
        image_embeds=None,
        image_masks=None,
    ):
        model = self.module
        tables = _tables(model)
        ready = image_embeds is not None or image_masks is not None
        # A norm before the blocks and masked patches are the original's own business.
        other = mask_image or model.transformer.add_norm_before_transformer
        if other or not tables.plain or any(map(any_hooked, _embedding_modules(model))):
            return self.own(batch, mask_text, mask_image, image_token_type_idx, image_embeds, image_masks)
        suffix = "_mlm" if mask_text else ""
        ids, text_masks = batch[f"text_ids{suffix}"], batch["text_masks"]
        pixels = None
        if not ready:
            key = f"image_{image_token_type_idx - 1}"
            pixels = batch[key if key in batch else "image"][0]
        plan = self._plan(ids, text_masks, pixels, image_embeds, image_masks)
        modality = torch.full((plan.batch,), image_token_type_idx, device=ids.device)
        text = embedding.text_rows(tables, plan, ids=ids)
        if ready:
            rows = embedding.with_image_embeds(tables, plan, text, image_embeds, modality)
        else:
            rows = embedding.with_patches(tables, plan, text, pixels, modality)
        encoded = self.encode(model.transformer.blocks, _block, rows, plan)
        rows = engine.final_norm(model.transformer.norm, encoded.rows, plan)
        padded = plan.unpack(rows)
        if not ready:
            image_masks = plan.key_mask()[:, plan.text_length :].long()
        return {
            "text_feats": padded[:, : plan.text_length],
            "image_feats": padded[:, plan.text_length :],
            "cls_feats": engine.pool(model.pooler, rows, plan),
            "raw_cls_feats": rows.index_select(0, plan.pool_rows),
            "image_labels": None,
            "image_masks": image_masks,
            "text_labels": batch[f"text_labels{suffix}"],
            "text_ids": ids,
            "text_masks": text_masks,
            "patch_index": None if ready else (_patch_index(plan), plan.patch_grid),
        }

    def features(self, inputs: Mapping, device: torch.device) -> Features:
        if "input_ids" in inputs:  # as a processor names them
            names = {"text_ids": "input_ids", "text_masks": "attention_mask", "image": "pixel_values"}
            inputs = {name: inputs.get(theirs) for name, theirs in names.items()}
        key = "image_0" if "image_0" in inputs else "image"
        if isinstance(inputs.get(key), list | tuple):
            inputs = {**inputs, key: inputs[key][0]}
        given = features.tensors(inputs, device, "text_ids", "text_masks", key)
        pixels, ids = given[key], given["text_ids"]
        out = features.in_raster_order(self)(
            {"text_ids": ids, "text_masks": given["text_masks"], "text_labels": ids, "image": [pixels]}
        )
        index, canvas = out["patch_index"]
        image_real = out["image_masks"].bool()
        shown = sampled_mask(pixels, canvas, lambda picked: picked.sum(dim=1) != 0)
        grids = list(zip(shown[:, :, 0].sum(1).tolist(), shown[:, 0].sum(1).tolist(), strict=True))
        cells = [features.cells(index[b][image_real[b, 1:]], w) for b, (_, w) in enumerate(grids)]
        patch_size = self.module.transformer.patch_embed.proj.kernel_size
        text_real = out["text_masks"].bool()
        return Features(out["text_feats"], out["image_feats"], text_real, image_real, ids, grids, cells, patch_size)

    def _plan(self, ids, text_masks, pixels, image_embeds, image_masks) -> SequencePlan:
        if ids.ndim != 2 or ids.dtype not in (torch.int32, torch.int64):
            raise InputError(f"text_ids must be int32 or int64 [B, T], got {ids.dtype} {list(ids.shape)}.")
        positions = self.module.text_embeddings.position_embeddings.num_embeddings
        if ids.shape[1] > positions:
            raise InputError(f"the text has {ids.shape[1]} tokens and the model {positions} positions: truncate it.")
        image = pixels if pixels is not None else image_embeds
        if image is None or image.shape[0] != ids.shape[0]:
            given = None if image is None else image.shape[0]
            raise InputError(f"{ids.shape[0]} texts need as many images, got {given}.")
        if pixels is None:
            if image_masks is None or image_masks.shape != image_embeds.shape[:2]:
                given = None if image_masks is None else list(image_masks.shape)
                raise InputError(f"image_masks must be {list(image_embeds.shape[:2])} like image_embeds, got {given}.")
            return SequencePlan.from_keep_mask(text_masks, image_masks, text_shape=ids.shape, device=ids.device)
        transformer = self.module.transformer
        patch = transformer.patch_embed.proj.kernel_size
        grid = (pixels.shape[2] // patch[0], pixels.shape[3] // patch[1])
        config = getattr(self.module.hparams, "config", self.module.hparams)
        return SequencePlan.from_masks(
            text_masks,
            # The original takes for padding whatever pixel is zero in the sum of its channels.
            sampled_mask(pixels, grid, lambda picked: picked.sum(dim=1) != 0) if min(grid) > 0 else None,
            text_shape=tuple(ids.shape),
            pixel_shape=tuple(pixels.shape),
            patch_size=patch,
            position_grid=transformer.patch_dim,
            max_image_length=config["max_image_len"],
            patch_order=self.options.patch_order,
            generator=self.options.generator,
            position_dtype=torch.float64 if pixels.dtype == torch.float64 else torch.float32,
            device=ids.device,
        )


def _patch_index(plan):
    """(y, x) of every padded patch position, int64 [B, P, 2]; 0 where there is none."""
    index = torch.zeros(plan.batch, plan.image_length - 1, 2, dtype=torch.long, device=plan.device)
    height, width = plan.patch_grid
    cell = plan.patch_source % (height * width)
    rank = plan.patch_rows - plan.cls_rows[plan.patch_sample] - 1
    index[plan.patch_sample, rank] = torch.stack([cell // width, cell % width], dim=-1)
    return index


# --- parameters -------------------------------------------------------------------------------------------------------


def _tables(model) -> embedding.Tables:
    text, vision = model.text_embeddings, model.transformer
    return embedding.Tables(
        word=text.word_embeddings,
        position=text.position_embeddings,
        token_type=text.token_type_embeddings,
        norm=text.LayerNorm,
        text_dropout=text.dropout,
        modality=model.token_type_embeddings,
        projection=vision.patch_embed.proj,
        cls_token=vision.cls_token,
        image_position=vision.pos_embed,
        image_dropout=vision.pos_drop,
    )


def _embedding_modules(model):
    return model.text_embeddings, model.token_type_embeddings, model.transformer.patch_embed, model.transformer.pos_drop


def _block(block: nn.Module) -> Block:
    """One of the original's transformer blocks as the engine sees it."""
    call_padded = functools.partial(_call_block, block)
    attention, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
    usual = {"norm1", "attn", "drop_path", "norm2", "mlp"} == set(block._modules) and (
        {"qkv", "attn_drop", "proj", "proj_drop"} == set(attention._modules)
        and {"fc1", "act", "fc2", "drop"} == set(mlp._modules)
    )
    # Stochastic depth drops whole samples, which only the block itself knows how to do.
    if not usual or (block.training and type(block.drop_path) is not nn.Identity):
        return Block(block, call_padded)
    sublayers = (
        Attention(
            norm=block.norm1,
            projections=(attention.qkv,),
            num_heads=attention.num_heads,
            scale=attention.scale,
            dropout=attention.attn_drop,
            out=attention.proj,
            out_dropout=attention.proj_drop,
        ),
        FeedForward(
            norm=block.norm2,
            fc1=mlp.fc1,
            activation=mlp.act,
            activation_kind=activation_kind(mlp.act),
            fc2=mlp.fc2,
            fc2_dropout=mlp.drop,
            activation_dropout=mlp.drop,
        ),
    )
    return Block(block, call_padded, sublayers)


def _call_block(block, hidden, plan, want_attention):
    hidden, probabilities = block(hidden, mask=plan.key_mask())
    return hidden, probabilities if want_attention else None

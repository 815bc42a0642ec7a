"""The original `ViLTransformerSS` (dandelin/ViLT): inputs, parameters, outputs of its `infer`.

Everything that the original does with a batch goes through `infer`, so that is what is swapped, where it and what it
calls are the original's code (`published.py`): the blocks and the pooler run packed; an embedding of another make is
called itself.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from ... import record
from ...engine import encode as engine
from ...engine.blocks import Attention, Block, FeedForward, activation_kind
from ...engine.listeners import any_hooked, why_hooked
from ...errors import InputError
from ..base import Features, Part, SwappedTrunk
from . import embedding, features
from .given import check_tensors
from .options import ViltOptions
from .patches import sampled_mask
from .plan import SequencePlan
from .published import is_published, is_published_in, is_text_embedding


def find(model: nn.Module) -> list[Part]:
    """The `ViLTransformerSS`s in `model`, and why those with code of their own cannot be accelerated."""
    return [Part(module, InferSwap, _refusal(module)) for module in model.modules() if _is_original(module)]


def _is_original(module) -> bool:
    names = ("text_embeddings", "token_type_embeddings", "transformer", "pooler")
    if not callable(getattr(type(module), "infer", None)) or not all(n in module._modules for n in names):
        return False
    return all(hasattr(module.transformer, n) for n in ("blocks", "norm", "patch_embed", "visual_embed", "pos_drop"))


def _unknown(model) -> Iterator[tuple[nn.Module, str]]:
    """(module, published name) of what has to be the original's code and is not.

    Padded rows are not computed, which no other code than the original's is known not to read.
    """
    if not is_published_in(type(model), "ViLTransformerSS.infer"):
        yield model, "ViLTransformerSS.infer"
    parts = [(model.pooler, "Pooler.forward")]
    for block in model.transformer.blocks:
        parts.append((block, "Block.forward"))
        if is_published(block, "Block.forward"):
            parts += [(block.attn, "Attention.forward"), (block.mlp, "Mlp.forward")]
    yield from ((module, name) for module, name in parts if not is_published(module, name))


def _refusal(model) -> str:
    for module, name in _unknown(model):
        path = next((path for path, m in model.named_modules() if m is module and path), "the model itself")
        method = name.rpartition(".")[2]
        placed = "is put in its place on the instance and " if method in vars(module) and module is not model else ""
        return (
            f"{type(module).__name__}.{method} ({path}) {placed}is not, as code, the {name} of dandelin/ViLT, which "
            "accelerate stands for: keep that method as it was published and put what you add around it (a linear "
            "layer may be wrapped, an embedding replaced), or use the model without accelerate."
        )
    return ""


class InferSwap(SwappedTrunk):
    """`ViLTransformerSS.infer`, packed."""

    name = "infer"
    options_type = ViltOptions
    part = "infer"

    def compute(
        self,
        batch,
        mask_text=False,
        mask_image=False,
        image_token_type_idx=1,
        image_embeds=None,
        image_masks=None,
    ):
        model = self.module
        # Replaced, or patched on its class, since it was accelerated.
        if why := self.why_own() or self.why_transformed({"batch": batch, "image_embeds": image_embeds}):
            self.say_own(why)
            return self.own(batch, mask_text, mask_image, image_token_type_idx, image_embeds, image_masks)
        suffix = "_mlm" if mask_text else ""
        ids, text_masks = batch[f"text_ids{suffix}"], batch["text_masks"]
        pixels = patch_index = labels = None
        if image_embeds is None and image_masks is None:
            key = f"image_{image_token_type_idx - 1}"
            pixels = batch[key if key in batch else "image"][0]
        why = "image patches are masked" if mask_image else _why_not_known(model)
        if not why:
            rows, plan = self._embed(ids, text_masks, pixels, image_embeds, image_masks, image_token_type_idx)
            if pixels is not None:
                image_masks = plan.key_mask()[:, plan.text_length :].long()
                patch_index = _patch_index(plan), plan.patch_grid
        else:
            text = model.text_embeddings(ids)
            if pixels is not None:
                image_embeds, image_masks, patch_index, labels = model.transformer.visual_embed(
                    pixels, max_image_len=model.hparams.config["max_image_len"], mask_it=mask_image
                )
            text = text + model.token_type_embeddings(torch.zeros_like(text_masks))
            image = image_embeds + model.token_type_embeddings(torch.full_like(image_masks, image_token_type_idx))
            plan = SequencePlan.from_keep_mask(
                text_masks, image_masks, text_shape=text.shape[:2], padding=self.options.padding
            )
            rows = plan.pack(torch.cat([text, image], dim=1))
            record.say("padded", why, ("text embedding", model.text_embeddings), ("image embedding", model.transformer))
        masks = torch.cat([text_masks, image_masks], dim=1)
        encoded = self.encode(model.transformer.blocks, functools.partial(_block, masks=masks), rows, plan)
        rows = engine.final_norm(model.transformer.norm, encoded.rows, plan)
        padded = plan.unpack(rows)
        return {
            "text_feats": padded[:, : plan.text_length],
            "image_feats": padded[:, plan.text_length :],
            "cls_feats": engine.pool(model.pooler, rows, plan),
            "raw_cls_feats": rows.index_select(0, plan.pool_rows),
            "image_labels": labels,
            "image_masks": image_masks,
            "text_labels": batch[f"text_labels{suffix}"],
            "text_ids": ids,
            "text_masks": text_masks,
            "patch_index": patch_index,
        }

    def why_own(self):
        return _refusal(self.module)

    def foretell_parts(self):
        model = self.module
        why = _why_not_known(model)
        parts = ("text embedding", model.text_embeddings), ("image embedding", model.transformer)
        record.say("padded" if why else "packed", why, *parts)
        self.foretell_blocks(model.transformer.blocks, functools.partial(_block, masks=None))
        why = engine.why_norm_padded(model.transformer.norm)
        record.say("padded" if why else "packed", why, ("final norm", model.transformer.norm))
        why = engine.why_pooler_padded(model.pooler, True)
        record.say("padded" if why else "packed", why, ("pooler", model.pooler))

    def features(self, inputs: Mapping, device: torch.device) -> Features:
        if "input_ids" in inputs:  # as a processor names them
            names = {"text_ids": "input_ids", "text_masks": "attention_mask", "image": "pixel_values"}
            inputs = {name: inputs.get(theirs) for name, theirs in names.items()}
        key = "image_0" if "image_0" in inputs else "image"
        if isinstance(inputs.get(key), list | tuple):
            inputs = {**inputs, key: inputs[key][0]}
        given = features.tensors(inputs, device, "text_ids", "text_masks", key)
        pixels, ids = given[key], given["text_ids"]
        out = features.in_raster_order(self).compute(
            {"text_ids": ids, "text_masks": given["text_masks"], "text_labels": ids, "image": [pixels]}
        )
        index, canvas = out["patch_index"]
        image_real = out["image_masks"].bool()
        if image_real.shape[1] != 1 + index.shape[1]:
            raise TypeError(
                f"{type(self.module.transformer).__name__}.visual_embed gives {image_real.shape[1]} image tokens for "
                f"{index.shape[1]} patches: only images of one [CLS] and patches can be aligned."
            )
        shown = sampled_mask(pixels, canvas, lambda picked: picked.sum(dim=1) != 0)
        grids = list(zip(shown[:, :, 0].sum(1).tolist(), shown[:, 0].sum(1).tolist(), strict=True))
        cells = [features.cells(index[b][image_real[b, 1:]], w) for b, (_, w) in enumerate(grids)]
        patch_size = self.module.transformer.patch_embed.proj.kernel_size
        text_real = out["text_masks"].bool()
        return Features(out["text_feats"], out["image_feats"], text_real, image_real, ids, grids, cells, patch_size)

    def _embed(self, ids, text_masks, pixels, image_embeds, image_masks, modality):
        """Packed rows [N, D] by the tables, and the plan they follow."""
        tables = _tables(self.module)
        plan = self._plan(ids, text_masks, pixels, image_embeds, image_masks)
        modality = torch.full((plan.batch,), modality, device=ids.device)
        text = embedding.text_rows(tables, plan, ids=ids)
        record.say("packed", "", ("text embedding", self.module.text_embeddings))
        if pixels is None:
            rows = embedding.with_image_embeds(tables, plan, text, image_embeds, modality)
        else:
            rows = embedding.with_patches(
                tables, plan, text, pixels, modality, engine.in_force(self.weights, self.module)
            )
        record.say("packed", "", ("image embedding", self.module.transformer.patch_embed))
        return rows, plan

    def _plan(self, ids, text_masks, pixels, image_embeds, image_masks) -> SequencePlan:
        check_tensors(
            text_ids=ids, text_masks=text_masks, image=pixels, image_embeds=image_embeds, image_masks=image_masks
        )
        if pixels is not None and pixels.ndim != 4:
            raise InputError(
                f"image must be [B, C, H, W], got {list(pixels.shape)}; one image is a batch of one, .unsqueeze(0)."
            )
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
            return SequencePlan.from_keep_mask(
                text_masks, image_masks, text_shape=ids.shape, padding=self.options.padding, device=ids.device
            )
        transformer = self.module.transformer
        patch = transformer.patch_embed.proj.kernel_size
        grid = (pixels.shape[2] // patch[0], pixels.shape[3] // patch[1])
        return SequencePlan.from_masks(
            text_masks,
            # The original takes for padding whatever pixel is zero in the sum of its channels.
            sampled_mask(pixels, grid, lambda picked: picked.sum(dim=1) != 0) if min(grid) > 0 else None,
            text_shape=tuple(ids.shape),
            pixel_shape=tuple(pixels.shape),
            patch_size=patch,
            position_grid=transformer.patch_dim,
            max_image_length=self.module.hparams.config["max_image_len"],
            patch_order=self.options.patch_order,
            generator=self.options.generator,
            padding=self.options.padding,
            position_dtype=torch.float64 if pixels.dtype == torch.float64 else torch.float32,
            device=ids.device,
        )


def _patch_index(plan):
    """(y, x) of the patch at every position, int64 [B, P, 2]; 0 where there is none."""
    index = torch.zeros(plan.batch, plan.image_length - 1, 2, dtype=torch.long, device=plan.device)
    height, width = plan.patch_grid
    cell = plan.patch_source % (height * width)
    place = torch.empty(plan.total_rows, dtype=torch.long, device=plan.device)
    place = place.index_copy(0, plan.padded_rows, plan.padded_places)
    rank = place[plan.patch_rows] % plan.width - plan.text_length - 1
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


def _why_not_known(model) -> str:
    """Why the tables do not tell all that the model does before its blocks, or ""."""
    vision = model.transformer
    if vision.add_norm_before_transformer:
        return "a norm comes before its blocks"
    for module, name in ((vision, "VisionTransformer.visual_embed"), (vision.patch_embed, "PatchEmbed.forward")):
        if not is_published(module, name):
            return f"{name.partition('.')[2]} of {type(module).__name__} is not the published {name}"
    if not is_text_embedding(model.text_embeddings):
        return f"{type(model.text_embeddings).__name__} does not embed text as BertEmbeddings does"
    for module in (model.text_embeddings, model.token_type_embeddings, vision.patch_embed, vision.pos_drop):
        if any_hooked(module):
            return f"of {type(module).__name__}: {why_hooked(module)}"
    if vision.pos_embed.shape[1] != 1 + vision.patch_dim**2 or not _tables(model).plain:
        return "its tables, or what makes its patches, are of another make or size than ViLT's"
    return ""


def _block(block: nn.Module, masks: torch.Tensor) -> Block:
    """One of the original's transformer blocks as the engine sees it; `masks` [B, L] is what `infer` gives it."""
    call_padded = functools.partial(_call_block, block, masks)
    attention, mlp = block.attn, block.mlp
    # Stochastic depth drops whole samples, which only the block itself knows how to do.
    if type(block.drop_path) is not nn.Identity or not isinstance(attention.scale, int | float):
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


def _call_block(block, masks, hidden, plan, want_attention):
    hidden, probabilities = block(hidden, mask=masks)
    return hidden, probabilities if want_attention else None

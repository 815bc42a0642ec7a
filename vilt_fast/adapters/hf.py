"""HuggingFace's `ViltModel` and its task classes: parameters and outputs."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import GELUActivation
from transformers.modeling_outputs import BaseModelOutputWithPooling, MaskedLMOutput, TokenClassifierOutput
from transformers.models.vilt import modeling_vilt as hf

from .. import engine
from ..errors import InputError
from ..packing import SequencePlan
from ..swap import Swapped
from .hf_inputs import Inputs, embed


def find(model: nn.Module) -> list[tuple[nn.Module, type]]:
    """The `ViltModel`s in `model`, and the task classes around them whose own loop can be improved on."""
    kinds = {
        hf.ViltModel: TrunkForward,
        hf.ViltForMaskedLM: MaskedLMForward,
        hf.ViltForTokenClassification: TokenClassificationForward,
        hf.ViltForImagesAndTextClassification: ImagesAndTextForward,
    }
    return [
        (module, kind)
        for module in model.modules()
        for known, kind in kinds.items()
        if isinstance(module, known) and type(module).forward is known.forward
    ]


@dataclasses.dataclass(slots=True)
class Trunk:
    """What the trunk computed, packed, with the plan of each image."""

    rows: torch.Tensor  #: [N, D] after the final norm
    pooled: torch.Tensor | None  #: [B, D]
    plan: SequencePlan
    dtype: torch.dtype  #: of the residual stream in the reference
    hidden_states: list[torch.Tensor]  #: packed [N, D], in whatever dtype they were computed
    attentions: list[torch.Tensor]  #: padded [B, H, L, L]


class TrunkForward(Swapped):
    """`ViltModel.forward`, packed."""

    def __call__(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        pixel_values=None,
        pixel_mask=None,
        inputs_embeds=None,
        image_embeds=None,
        image_token_type_idx=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        sequence_plan=None,
        **kwargs,
    ):
        config = self.module.config
        trunk = self.run(
            [
                Inputs.checked(
                    self.module,
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    token_type_ids=token_type_ids,
                    pixel_values=pixel_values,
                    pixel_mask=pixel_mask,
                    inputs_embeds=inputs_embeds,
                    image_embeds=image_embeds,
                    modality=image_token_type_idx,
                )
            ],
            sequence_plan,
            _chosen(output_hidden_states, config.output_hidden_states),
            _chosen(output_attentions, config.output_attentions),
        )
        extras = _extras(trunk)
        sequence = trunk.plan.unpack(trunk.rows)
        if not _chosen(return_dict, config.return_dict):
            return (sequence, trunk.pooled, *(e for e in extras if e is not None))
        return BaseModelOutputWithPooling(
            last_hidden_state=sequence, pooler_output=trunk.pooled, hidden_states=extras[0], attentions=extras[1]
        )

    def run(self, images: list[Inputs], plan=None, want_hidden=False, want_attention=False) -> Trunk:
        """Embed, encode, normalise and pool; several images share one text and run as one packed batch."""
        model = self.module
        rows, plan = embed(model, images, plan, self.options)
        if engine.is_hooked(model.encoder) or type(model.encoder) is not hf.ViltEncoder:
            encoded = _call_encoder(model.encoder, rows, plan, want_hidden, want_attention)
        else:
            encoded = engine.encode(
                [_block(layer) for layer in model.encoder.layer],
                rows,
                plan,
                weights=self.weights,
                want_hidden=want_hidden,
                want_attention=want_attention,
            )
        normed = engine.final_norm(model.layernorm, encoded.rows, plan)
        pooled = None
        if model.pooler is not None:
            pooled = engine.pool(model.pooler, normed, plan, first_only=type(model.pooler) is hf.ViltPooler)
        return Trunk(normed, pooled, plan, rows.dtype, encoded.hidden_states, encoded.attentions)


class MaskedLMForward(Swapped):
    """`ViltForMaskedLM.forward`: the head runs on real text tokens only."""

    def __call__(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        pixel_values=None,
        pixel_mask=None,
        inputs_embeds=None,
        image_embeds=None,
        labels=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        **kwargs,
    ):
        given = {k: v for k, v in locals().items() if k not in ("self", "kwargs")} | kwargs
        model = self.module
        if not (_runs_packed(model.vilt) and _is_tokenwise_head(model.mlm_score)):
            return self.own(**given)
        logits, extras = _text_logits(model, given, model.mlm_score)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.view(-1, model.config.vocab_size), labels.to(logits.device).view(-1))
        return _task_output(MaskedLMOutput, model, return_dict, loss, logits, extras)


class TokenClassificationForward(Swapped):
    """`ViltForTokenClassification.forward`: the head runs on real text tokens only."""

    def __call__(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        pixel_values=None,
        pixel_mask=None,
        inputs_embeds=None,
        image_embeds=None,
        labels=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        **kwargs,
    ):
        given = {k: v for k, v in locals().items() if k not in ("self", "kwargs")} | kwargs
        model = self.module
        head = (model.dropout, model.classifier)
        if not (_runs_packed(model.vilt) and engine.is_tokenwise(head[1])) or any(map(engine.any_hooked, head)):
            return self.own(**given)
        logits, extras = _text_logits(model, given, lambda rows: model.classifier(model.dropout(rows)))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.view(-1, model.num_labels), labels.to(logits.device).view(-1))
        return _task_output(TokenClassifierOutput, model, return_dict, loss, logits, extras)


class ImagesAndTextForward(Swapped):
    """`ViltForImagesAndTextClassification.forward`: one packed batch for all images, the text embedded once."""

    def __call__(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        pixel_values=None,
        pixel_mask=None,
        inputs_embeds=None,
        image_embeds=None,
        labels=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        **kwargs,
    ):
        given = {k: v for k, v in locals().items() if k not in ("self", "kwargs")} | kwargs
        model = self.module
        config = model.config
        # A hook within the trunk is to see the images one after the other, as in the reference.
        if not _runs_packed(model.vilt) or any(map(engine.any_hooked, model.vilt.children())):
            return self.own(**given)
        want_hidden = _chosen(output_hidden_states, config.output_hidden_states)
        want_attention = _chosen(output_attentions, config.output_attentions)
        if pixel_values is not None and pixel_values.ndim == 4:
            pixel_values = pixel_values.unsqueeze(1)
        if image_embeds is not None and image_embeds.ndim == 3:
            image_embeds = image_embeds.unsqueeze(1)
        image = pixel_values if pixel_values is not None else image_embeds
        num_images = None if image is None else image.shape[1]
        if num_images != config.num_images:
            raise InputError(
                "Make sure to match the number of images in the model with the number of images in the input: "
                f"the model takes {config.num_images}, got {num_images}."
            )
        if pixel_mask is not None and (pixel_mask.ndim != 4 or pixel_mask.shape[1] != num_images):
            raise InputError(f"pixel_mask must be [B, {num_images}, height, width], got {list(pixel_mask.shape)}.")
        trunk_forward = model.vilt.forward
        images = [
            Inputs.checked(
                model.vilt,
                input_ids=input_ids,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                pixel_values=None if pixel_values is None else pixel_values[:, i],
                pixel_mask=None if pixel_mask is None else pixel_mask[:, i],
                inputs_embeds=inputs_embeds,
                image_embeds=None if image_embeds is None else image_embeds[:, i],
                modality=i + 1,
            )
            for i in range(num_images)
        ]
        trunk = trunk_forward.run(images, None, want_hidden, want_attention)
        batch = images[0].text_shape[0]
        logits = model.classifier(torch.cat(trunk.pooled.split(batch), dim=-1))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.view(-1, model.num_labels), labels.to(logits.device).view(-1))
        extras = _extras_of_each_image(trunk)
        hidden_states = [e[0] for e in extras] if want_hidden else None
        attentions = [e[1] for e in extras] if want_attention else None
        if not _chosen(return_dict, config.return_dict):
            output = (logits, hidden_states, attentions)
            return output if loss is None else (loss, *output)
        return hf.ViltForImagesAndTextClassificationOutput(
            loss=loss, logits=logits, hidden_states=hidden_states, attentions=attentions
        )


def _chosen(given, default):
    return default if given is None else given


def _runs_packed(vilt) -> bool:
    """Whether calling the trunk directly skips nothing: it is accelerated and nobody listens to its calls."""
    return isinstance(vilt.__dict__.get("forward"), TrunkForward) and not engine.has_hooks(vilt)


def _is_tokenwise_head(head) -> bool:
    """Whether calling the masked language modelling head on single rows is calling it on a sequence."""
    if engine.any_hooked(head) or type(head) is not hf.ViltMLMHead:
        return False
    transform = head.transform
    return (
        type(transform) is hf.ViltPredictionHeadTransform
        and isinstance(transform.LayerNorm, nn.LayerNorm)
        and all(map(engine.is_tokenwise, (transform.dense, head.decoder)))
    )


def _extras(trunk: Trunk):
    """(hidden states, attentions) as tuples of padded tensors; None where they were not asked for."""
    hidden = tuple(trunk.plan.unpack(h.to(trunk.dtype)) for h in trunk.hidden_states) or None
    return hidden, tuple(trunk.attentions) or None


def _extras_of_each_image(trunk: Trunk):
    """`_extras` for every image of one packed batch, at the padded width of that image's own batch."""
    plan = trunk.plan
    hidden = [plan.split(plan.unpack(h.to(trunk.dtype))) for h in trunk.hidden_states]
    attentions = [plan.split(a.transpose(1, 2)) for a in trunk.attentions]  # crop the queries, then the keys
    per_image = []
    for i, width in enumerate(plan.widths):
        cropped = tuple(layer[i].transpose(1, 2)[..., :width] for layer in attentions)
        per_image.append((tuple(layer[i] for layer in hidden), cropped))
    return per_image


def _text_logits(model, given, head):
    """Logits [B, T, classes] of a head on the real text rows, zero elsewhere, and the trunk's extras."""
    config = model.config
    names = [f.name for f in dataclasses.fields(Inputs) if f.name != "modality"]
    inputs = Inputs.checked(model.vilt, modality=None, **{name: given[name] for name in names})
    trunk = model.vilt.forward.run(
        [inputs],
        given.get("sequence_plan"),
        _chosen(given["output_hidden_states"], config.output_hidden_states),
        _chosen(given["output_attentions"], config.output_attentions),
    )
    plan = trunk.plan
    rows, places = plan.text_rows, plan.text_source
    if plan.lengths != plan.key_lengths:  # a query-only row stands for a masked token, whose logits mean nothing
        real = torch.isin(rows, plan.padded_rows)
        rows, places = rows[real], places[real]
    logits = head(trunk.rows.index_select(0, rows))
    batch, length = inputs.text_shape
    padded = logits.new_zeros(batch * length, logits.shape[-1])
    return padded.index_copy(0, places, logits).view(batch, length, -1), _extras(trunk)


def _task_output(kind, model, return_dict, loss, logits, extras):
    if not _chosen(return_dict, model.config.return_dict):
        output = (logits, *(e for e in extras if e is not None))
        return output if loss is None else (loss, *output)
    return kind(loss=loss, logits=logits, hidden_states=extras[0], attentions=extras[1])


# --- parameters -------------------------------------------------------------------------------------------------------

_PARTS = {
    "attention": hf.ViltAttention,
    "attention.attention": hf.ViltSelfAttention,
    "attention.output": hf.ViltSelfOutput,
    "intermediate": hf.ViltIntermediate,
    "output": hf.ViltOutput,
}


def _block(layer: nn.Module) -> engine.Block:
    """A `ViltLayer` as the engine sees it."""
    call_padded = functools.partial(_call_layer, layer)
    if type(layer) is not hf.ViltLayer or any(type(layer.get_submodule(p)) is not kind for p, kind in _PARTS.items()):
        return engine.Block.opaque(layer, call_padded)
    attention, self_attention = layer.attention, layer.attention.attention
    checkpoint = layer._gradient_checkpointing_func if layer.gradient_checkpointing and layer.training else None
    activation = layer.intermediate.intermediate_act_fn
    return engine.Block(
        module=layer,
        norm1=layer.layernorm_before,
        qkv=(self_attention.query, self_attention.key, self_attention.value),
        attention_dropout=self_attention.dropout,
        out=attention.output.dense,
        out_dropout=attention.output.dropout,
        norm2=layer.layernorm_after,
        fc1=layer.intermediate.dense,
        activation=activation,
        activation_dropout=None,
        fc2=layer.output.dense,
        fc2_dropout=layer.output.dropout,
        num_heads=self_attention.num_attention_heads,
        scale=self_attention.attention_head_size**-0.5,
        exact_gelu=_is_exact_gelu(activation),
        checkpoint=checkpoint,
        call_padded=call_padded,
    )


def _is_exact_gelu(activation) -> bool:
    if type(activation) is GELUActivation:
        return activation.act is F.gelu
    return activation is F.gelu or (type(activation) is nn.GELU and activation.approximate == "none")


def _call_layer(layer, hidden, plan, want_attention):
    outputs = layer(hidden, _additive(plan, hidden.dtype), want_attention)
    return outputs[0], outputs[1] if want_attention else None


def _additive(plan, dtype):
    """The mask that HuggingFace adds to attention scores: [B, 1, L, L], the lowest finite number at padded keys.

    None where nothing is padded, as there.
    """
    if plan.dense:
        return None
    key_mask = plan.key_mask()
    width = key_mask.shape[1]
    mask = torch.zeros(key_mask.shape, dtype=dtype, device=key_mask.device)
    return mask.masked_fill(~key_mask, torch.finfo(dtype).min)[:, None, None].expand(-1, -1, width, -1)


def _call_encoder(encoder, rows, plan, want_hidden, want_attention) -> engine.Encoded:
    """An encoder that has hooks or is not HuggingFace's own: called as the reference calls it, padded."""
    outputs = encoder(
        plan.unpack(rows, query_rows=True),
        attention_mask=_additive(plan, rows.dtype),
        output_attentions=want_attention,
        output_hidden_states=want_hidden,
        return_dict=True,
    )
    hidden = [plan.pack(h) for h in outputs.hidden_states] if want_hidden else []
    attentions = [engine.of_real_queries(a, plan) for a in outputs.attentions] if want_attention else []
    return engine.Encoded(plan.pack(outputs[0]), hidden, attentions)

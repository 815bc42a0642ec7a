"""HuggingFace's `ViltModel`: its forward, packed, and its blocks as the engine sees them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import torch
from torch import nn
from transformers import activations
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.vilt import modeling_vilt as hf

from ... import record
from ...engine import blocks, captured
from ...engine import encode as engine
from ...engine.blocks import Attention, Block, FeedForward, is_tokenwise
from ...engine.genuine import own_methods, why_not_own
from ...engine.listeners import any_hooked, has_hooks, is_plain, runs_own_code, why_hooked, why_not_plain
from ...engine.packing import Packing
from ...engine.quantization import WeightCache
from ...ops._check import exporting
from ..base import Features, Swapped, SwappedTrunk
from . import features, release, whole
from .inputs import Inputs
from .known import draws_its_patches, patch_size, why_not_known
from .known import is_known as embedding_is_known
from .options import ViltOptions
from .plan import SequencePlan
from .reads import Reads
from .rows import embed, planned


@dataclasses.dataclass(slots=True)
class Trunk:
    """What the trunk computed of what is read, with the plan of each image."""

    sequence: torch.Tensor | None  #: padded [B, L, D] after the final norm, if everything is read
    texts: torch.Tensor | None  #: [m, D] the rows of `plan.texts`, or of a `Reads`, after the final norm
    pooled: torch.Tensor | None  #: [B, D], if it is read or the pooler may do more than that
    plan: SequencePlan | Packing
    dtype: torch.dtype  #: of the residual stream in the reference
    hidden_states: list[torch.Tensor]  #: padded [B, L, D], in whatever dtype they were computed
    attentions: list[torch.Tensor]  #: padded [B, H, L, L]
    weights: WeightCache | None  #: int8 copies that a head may compute with too
    places: torch.Tensor | None = None  #: [m] those of `texts` in the flattened text, of a `Reads`
    others: torch.Tensor | None = None  #: [W, D] the rows of the samples that a `Reads` reads otherwise
    logits: torch.Tensor | None = None  #: what a head has made of the rows that are read, where it was asked for here


_ARGUMENTS = frozenset(
    "input_ids attention_mask token_type_ids pixel_values pixel_mask inputs_embeds image_embeds image_token_type_idx "
    "output_attentions output_hidden_states return_dict".split()
)


class TrunkForward(SwappedTrunk):
    """`ViltModel.forward`, packed."""

    options_type = ViltOptions
    part = "whole trunk"

    def compute(self, *args, sequence_plan=None, **kwargs):
        given = release.understood(self.module, _ARGUMENTS, args, kwargs)
        if why := why_own_now(self, given, sequence_plan, self.module):
            self.say_own(why)
            return self.own(*args, **kwargs)
        config = self.module.config
        wanted = (
            chosen(given.get("output_hidden_states"), config.output_hidden_states),
            chosen(given.get("output_attentions"), config.output_attentions),
        )
        standing = self.standing(given, *wanted)
        modality, sizes = given.get("image_token_type_idx"), standing and standing.sizes
        inputs = Inputs.checked(self.module, **Inputs.among(given), modality=modality, sizes=sizes)
        trunk = self.run([inputs], sequence_plan, *wanted, standing=standing)
        hidden, attentions = extras(trunk)
        sequence = trunk.sequence
        if not release.wants_dict(self.module, given):
            return (sequence, trunk.pooled, *(e for e in (hidden, attentions) if e is not None))
        return BaseModelOutputWithPooling(
            last_hidden_state=sequence, pooler_output=trunk.pooled, hidden_states=hidden, attentions=attentions
        )

    def why_own(self):
        kind = type(self.module)
        return "" if own_methods(kind) else why_not_own(kind)

    def foretell_parts(self):
        model = self.module
        why = why_not_known(model.embeddings)
        record.say("padded" if why else "packed", why, ("embedding", model.embeddings))
        if why := _why_encoder_padded(model.encoder):
            record.say("padded", why, ("blocks", model.encoder))
        else:
            self.foretell_blocks(model.encoder.layer, self._describe())
        why = engine.why_norm_padded(model.layernorm)
        record.say("padded" if why else "packed", why, ("final norm", model.layernorm))
        if model.pooler is not None:
            why = engine.why_pooler_padded(model.pooler, is_plain(model.pooler, hf.ViltPooler))
            record.say("padded" if why else "packed", why, ("pooler", model.pooler))

    def plan(self, **inputs) -> SequencePlan:
        """The plan that a call with these inputs would make."""
        return Inputs.checked(self.module, **Inputs.among(inputs)).plan(self.module, self.options)

    def features(self, inputs: Mapping, device: torch.device) -> Features:
        given = features.tensors(
            inputs, device, "input_ids", "pixel_values", also=("attention_mask", "token_type_ids", "pixel_mask")
        )
        checked = Inputs.checked(
            self.module, inputs_embeds=None, image_embeds=None, modality=inputs.get("image_token_type_idx"), **given
        )
        computed = features.in_raster_order(self).run([checked])
        plan = computed.plan
        text, image = computed.sequence.tensor_split([plan.text_length], dim=1)
        text_real, image_real = plan.key_mask().tensor_split([plan.text_length], dim=1)
        cells = [features.cells(plan.patch_positions(b), w) for b, (_, w) in enumerate(plan.grids)]
        size = patch_size(self.module.embeddings)
        if not plan.grids:
            raise TypeError(
                f"{type(self.module.embeddings).__name__} returns a mask that is not that of text and patches: which "
                "patch an image token is cannot be told."
            )
        return Features(text, image, text_real, image_real, checked.input_ids, plan.grids, cells, size)

    def run(
        self,
        images: list[Inputs],
        plan=None,
        want_hidden=False,
        want_attention=False,
        reads: str | Reads | None = None,
        head: whole.Head | None = None,
        standing: whole.Standing | None = None,
    ) -> Trunk:
        """Embed, encode, normalise and pool; several images share one text and run as one packed batch.

        `reads` says what is read of the result, so that the last block can leave out the rest: "pooled", "texts", or of
        some samples this and of others that (`Reads`); None for everything. Who wants hidden states or attentions, or
        listens to a part after the blocks, gets all rows. `head` is what will be made of it, for a graph to have that
        in it. `standing` is what `standing` has found out for this call.
        """
        weights = engine.in_force(self.weights, self.module, want_hidden, want_attention)
        if standing is None:
            standing = self._standing(images[0].text.device, want_hidden, want_attention, head)
        known = standing is not None and standing.sizes is not None
        plan = planned(self.module, images, plan, self.options, known)
        if known:
            if done := self._replayed(standing, images, plan, reads):
                return done
            images = [inputs.with_tables(self.module) for inputs in images]
        rows, plan = embed(self.module, images, plan, self.options, weights)
        return self.run_rows(rows, plan, weights, want_hidden, want_attention, reads)

    def run_rows(
        self,
        rows: torch.Tensor,
        plan: Packing,
        weights: WeightCache | None = None,
        want_hidden=False,
        want_attention=False,
        reads: str | Reads | None = None,
        apart=False,
    ) -> Trunk:
        """As `run`, from packed rows [N, D] that are embedded already; `apart` is that of `engine.pool`."""
        model = self.module
        few = reads is not None and not (want_hidden or want_attention) and _is_plain_around_blocks(model)
        places = mixed = None
        if isinstance(reads, Reads):
            places = reads.places(plan)
            mixed = reads.selection(plan, places)
        wanted = None if not few else getattr(plan, reads) if mixed is None else mixed
        if why := _why_encoder_padded(model.encoder):
            encoded = _call_encoder(model.encoder, rows, plan, want_hidden, want_attention)
            self.say_without("padded", why, "blocks", model.encoder)
        else:
            encoded = self.encode(
                model.encoder.layer, self._describe(), rows, plan,
                want_hidden=want_hidden, want_attention=want_attention, wanted=wanted,
            )  # fmt: skip
        normed = engine.final_norm(model.layernorm, encoded.rows, plan)
        sequence = texts = pooled = others = None
        if mixed is not None:
            selected = normed if few else normed.index_select(0, mixed.rows)
            texts, others = selected.tensor_split([len(places)])
        elif reads is None:
            sequence, normed = engine.shown(normed, plan)
        elif reads == "texts":
            texts = normed if few else normed.index_select(0, plan.texts.rows)
        text_only = reads == "texts" or (mixed is not None and reads.texts == plan.batch)
        if model.pooler is not None and not (few and text_only):
            first_only = is_plain(model.pooler, hf.ViltPooler)
            if few and mixed is not None:
                normed = others.index_select(0, reads.pool_rows(plan)) if reads.whole else others
            pooled = engine.pool(model.pooler, normed, plan, first_only=first_only, selected=few, apart=apart)
            if mixed is not None and not few:
                pooled = pooled[reads.texts :]
        extra = encoded.hidden_states, encoded.attentions
        return Trunk(sequence, texts, pooled, plan, rows.dtype, *extra, weights, places, others)

    def _describe(self):
        return functools.partial(_block, encoder=self.module.encoder)

    def standing(
        self, given: Mapping, want_hidden: bool, want_attention: bool, head: whole.Head | None = None
    ) -> whole.Standing | None:
        """What is known of the model, where a call with these arguments can be a CUDA graph."""
        ids = given.get("input_ids")
        return self._standing(ids.device, want_hidden, want_attention, head) if isinstance(ids, torch.Tensor) else None

    def _standing(self, device, want_hidden, want_attention, head):
        if self.graphs is None or captured.why_not_now(self.graphs, device, want_hidden, want_attention):
            return None
        if self.weights is not None and self.weights.kind == "int8":  # which are for CPUs: the engine will say so
            return None
        model = self.module
        around = functools.partial(_is_plain_around_blocks, model)
        return whole.standing(self.graphs, model, self._describe(), around, head)

    def _replayed(self, standing, images, plan, reads) -> Trunk | None:
        """All of it as one CUDA graph, where there is one."""
        model = self.module
        found = whole.replay(self.graphs, model, self._describe(), standing, images, plan, self.weights, reads)
        if found is None:
            return None
        sequence = None if found.rows is None else plan.unpack(found.rows)
        dtype = standing.sizes.dtype
        return Trunk(sequence, found.texts, found.pooled, plan, dtype, [], [], None, logits=found.logits)


def _is_plain_around_blocks(model: hf.ViltModel) -> bool:
    """Whether what the encoder's result is given to looks at each row by itself, and nobody listens."""
    parts = [(model.encoder, hf.ViltEncoder), (model.layernorm, nn.LayerNorm)]
    if model.pooler is not None:
        parts.append((model.pooler, hf.ViltPooler))
        if any_hooked(model.pooler):
            return False
    return all(is_plain(part, kind) and not has_hooks(part) for part, kind in parts)


def _why_encoder_padded(encoder) -> str:
    if not has_hooks(encoder) and is_plain(encoder, hf.ViltEncoder):
        return ""
    return why_hooked(encoder, inside=False) or why_not_plain(encoder, hf.ViltEncoder)


def is_known(model: hf.ViltModel) -> bool:
    """Whether each sample of a batch is computed on its own, so that several batches may be computed as one."""
    if not embedding_is_known(model.embeddings) or not is_plain(model.encoder, hf.ViltEncoder):
        return False
    if not is_plain(model.layernorm, nn.LayerNorm) or not is_plain(model.pooler, hf.ViltPooler):
        return False
    return is_tokenwise(model.pooler.dense) and all(_block(layer).packable for layer in model.encoder.layer)


def traced(model: hf.ViltModel) -> bool:
    """Whether the calls of modules are being recorded: a plan made from these masks would become a constant.

    Raises:
        RuntimeError: under `torch.export`, which HuggingFace's own way of drawing patches does not get through.
    """
    if exporting() and draws_its_patches(model.embeddings):
        raise RuntimeError(
            "torch.export of a ViLT needs to know where its tokens are: pass "
            "sequence_plan=vilt_fast.sequence_plan(model, **inputs), for inputs of these masks and sizes."
        )
    return exporting() or torch.jit.is_tracing()


TRACED = "the calls of modules are being recorded: pass sequence_plan=vilt_fast.sequence_plan(model, **inputs)"


def why_own_now(swapped: Swapped, given: dict | None, sequence_plan, trunk: hf.ViltModel) -> str:
    """Why the module's own method has to answer a call with these arguments, or ""."""
    if why := swapped.why_own():
        return why
    if given is None:
        return release.NOT_UNDERSTOOD
    if why := swapped.why_transformed(given | {"sequence_plan": sequence_plan}):
        return why
    return TRACED if sequence_plan is None and traced(trunk) else ""


def chosen(given, default):
    return default if given is None else given


def extras(trunk: Trunk):
    """(hidden states, attentions) as tuples of padded tensors; None where they were not asked for."""
    hidden = tuple(h.to(trunk.dtype) for h in trunk.hidden_states) or None
    return hidden, tuple(trunk.attentions) or None


# --- parameters -------------------------------------------------------------------------------------------------------

_PARTS = {
    "": hf.ViltLayer,
    "attention": hf.ViltAttention,
    "attention.attention": hf.ViltSelfAttention,
    "attention.output": hf.ViltSelfOutput,
    "intermediate": hf.ViltIntermediate,
    "output": hf.ViltOutput,
}


def _block(layer: nn.Module, encoder: nn.Module | None = None) -> Block:
    """A `ViltLayer` of `encoder` as the engine sees it."""
    call_padded = functools.partial(_call_layer, layer, encoder)
    for path, kind in _PARTS.items():
        if not is_plain(layer.get_submodule(path), kind):
            return Block(layer, call_padded, unknown=why_not_plain(layer.get_submodule(path), kind))
    attention, self_attention = layer.attention, layer.attention.attention
    heads, head_size = self_attention.num_attention_heads, self_attention.attention_head_size
    if heads * head_size != self_attention.all_head_size:  # releases differ in which of them they read
        return Block(layer, call_padded)
    activation = layer.intermediate.intermediate_act_fn
    sublayers = (
        Attention(
            norm=layer.layernorm_before,
            projections=(self_attention.query, self_attention.key, self_attention.value),
            num_heads=heads,
            scale=head_size**-0.5,
            dropout=self_attention.dropout,
            out=attention.output.dense,
            out_dropout=attention.output.dropout,
        ),
        FeedForward(
            norm=layer.layernorm_after,
            fc1=layer.intermediate.dense,
            activation=activation,
            activation_kind=activation_kind(activation),
            fc2=layer.output.dense,
            fc2_dropout=layer.output.dropout,
        ),
    )
    return Block(layer, call_padded, sublayers, checkpoint=release.checkpoint(layer, encoder))


def activation_kind(activation) -> str | None:
    """As `blocks.activation_kind`, of transformers' activations too."""
    kind = type(activation)
    if kind.__module__ != activations.__name__ or not runs_own_code(activation):
        return blocks.activation_kind(activation)
    # Every class of that module is elementwise; some keep the function that they call.
    return blocks.activation_kind(activation.act) if "act" in vars(activation) else "elementwise"


def _call_layer(layer, encoder, hidden, plan, want_attention):
    return release.call_layer(layer, encoder, hidden, release.additive_mask(plan, hidden.dtype), want_attention)


def _call_encoder(encoder, rows, plan, want_hidden, want_attention) -> engine.Encoded:
    """An encoder that has hooks or is not HuggingFace's own: called as the reference calls it, padded."""
    outputs = encoder(
        plan.unpack(rows, query_rows=True),
        attention_mask=release.additive_mask(plan, rows.dtype),
        output_attentions=want_attention,
        output_hidden_states=want_hidden,
        return_dict=True,
    )
    hidden = [plan.unpack(plan.pack(h, encoder)) for h in outputs.hidden_states or ()]
    attentions = [engine.of_shown_queries(a, plan) for a in outputs.attentions or ()]
    return engine.Encoded(plan.pack(outputs[0], encoder), hidden, attentions)

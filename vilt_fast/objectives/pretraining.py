"""ViLT's pre-training: masked language modelling, image-text matching and word-patch alignment in one loss.

Source: ViLT (Kim et al. 2021) sec. 3.2 and 4.1; the original repository, tasks "mlm" and "itm".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import nn
from transformers.models.vilt import modeling_vilt as hf
from transformers.utils import ModelOutput

from ..errors import InputError
from ..models.vilt.given import check_tensors
from ..models.vilt.reads import Reads
from ..models.vilt.states import states, trunk_of, why_apart
from ._batch import tensor
from .itm import images_of, labels_of, of_pooled, shared_images
from .mlm import mlm_inputs, mlm_labels, mlm_reads, of_states
from .wpa import wpa_loss

PARTS = ("mlm", "itm", "wpa")


@dataclasses.dataclass
class PretrainingOutput(ModelOutput):
    """The loss and its parts; a part that was not asked for is None."""

    # Not Optional: of `pretraining_loss` it is always there, and who calls `backward` is not to ask a type checker.
    loss: torch.Tensor = None  # type: ignore[assignment]  #: sum of the parts, each times its weight
    mlm_loss: torch.Tensor | None = None
    itm_loss: torch.Tensor | None = None
    wpa_loss: torch.Tensor | None = None  #: signed, times 0.1
    mlm_logits: torch.Tensor | None = None  #: [B, T, vocabulary], of a forward without labels
    itm_logits: torch.Tensor | None = None  #: [B, 2]
    itm_labels: torch.Tensor | None = None  #: [B], 1 where a sample kept its image


def pretraining_loss(
    model: nn.Module,
    batch: Mapping,
    *,
    generator: torch.Generator | None = None,
    weights: Mapping[str, float] | None = None,
) -> PretrainingOutput:
    """The loss of one pre-training batch.

    Masked language modelling sees masked text with its own image, image-text matching the text as it is with its own
    image or a false one, and word-patch alignment the latter's features: two forwards, as in the original. Of an
    accelerated model they are one, of 2B packed samples: each weight is read once and has one gradient, and a patch of
    an image that both see is projected once. Nothing else is shared, since from the first block on the two differ; nor
    is dropout. `patch_order="reference"`, hooks and parts that are not known take two.

    Args:
        model: :class:`ViltForPreTraining`, or what has a `vilt`, an `mlm_score` and an `itm_score`; accelerated or not.
            What is wrapped (DDP, FSDP, a prepared model) is to be called itself: `wrapped(**batch).loss`.
        batch: as `vilt_fast.objectives` lists it; `itm_labels` [B] in place of drawn ones.
        generator: draws which samples keep their image; torch's own by default.
        weights: of "mlm", "itm", "wpa", 1 where not named. 0 leaves a part out, and what only it needs.

    Returns:
        `.loss`, `.mlm_loss`, `.itm_loss`, `.wpa_loss`, `.itm_logits`, `.itm_labels`. A batch of one has no pair, as in
        the original: its sample is given the false image.

    Raises:
        InputError: missing or misshapen tensors, or labels out of range. ValueError: no such weight, or none left.
    """
    weights = _weights(weights)
    heads = [head for head, part in (("mlm_score", "mlm"), ("itm_score", "itm")) if weights[part]]
    trunk = trunk_of(model, *heads)
    matched, whole = weights["itm"] or weights["wpa"], weights["wpa"] > 0
    parts, read, drawn, soft = {}, None, None, batch.get("soft_labels")
    if weights["mlm"] and matched and not why_apart(trunk, batch):
        drawn, labels = labels_of(batch, generator), mlm_labels(batch)
        inputs, image_of = _both(trunk, batch, drawn)
        read = states(trunk, inputs, mlm_reads(model, labels, whole=whole), image_of)
        parts["mlm_loss"] = of_states(model.mlm_score, read, labels, soft_labels=soft)
    elif weights["mlm"]:
        labels = mlm_labels(batch)
        masked = states(trunk, mlm_inputs(batch), mlm_reads(model, labels))
        parts["mlm_loss"] = of_states(model.mlm_score, masked, labels, soft_labels=soft)
    if matched and read is None:
        drawn = labels_of(batch, generator)
        read = states(trunk, {**batch, **images_of(trunk, batch, drawn)}, Reads(0, whole=whole))
    logits = None
    if matched:
        drawn = drawn.to(read.pooled.device, non_blocking=True)
    if weights["itm"]:
        parts["itm_loss"], logits = of_pooled(model.itm_score, read.pooled, drawn)
    if weights["wpa"]:
        parts["wpa_loss"] = wpa_loss(read.text, read.image, read.text_real, read.image_real, drawn)
    loss = torch.stack([weights[name.partition("_")[0]] * part for name, part in parts.items()]).sum()
    return PretrainingOutput(loss=loss, **parts, itm_logits=logits, itm_labels=drawn)


def _weights(given) -> dict[str, float]:
    weights = dict.fromkeys(PARTS, 1.0) | dict(given or {})
    if unknown := [name for name in weights if name not in PARTS]:
        raise ValueError(f"weights has no {unknown[0]!r}; the parts are {', '.join(PARTS)}.")
    if any(not weight >= 0 for weight in weights.values()) or not any(weights.values()):
        raise ValueError(f"weights must be 0 or more, and one of them more than 0, got {weights}.")
    return weights


def _both(trunk, batch, labels) -> tuple[dict, tuple[int, ...]]:
    """The masked samples and the matched ones as one batch, and which image each has."""
    images, image_of = shared_images(trunk, batch, labels)
    masked = mlm_inputs(batch)["input_ids"]
    inputs = {"input_ids": torch.cat([masked, tensor(batch, "input_ids", masked.shape)]), **images}
    for name in ("attention_mask", "token_type_ids"):
        if batch.get(name) is not None:
            value = tensor(batch, name)
            inputs[name] = value if len(value) == 1 < len(labels) else torch.cat([value, value])
    return inputs, (*range(len(labels)), *image_of)


class ViltForPreTraining(hf.ViltPreTrainedModel):
    """ViLT with both heads of its pre-training: `mlm_score`, as `ViltForMaskedLM` has it, and `itm_score`.

    `from_pretrained` takes checkpoints of this class, and of HuggingFace's others for what they have.
    `model(**batch)` is :func:`pretraining_loss`, for a Trainer and for what wraps a model; a batch without labels and
    false images gives logits instead.
    """

    _tied_weights_keys = hf.ViltForMaskedLM._tied_weights_keys
    accepts_loss_kwargs = False  # a Trainer that accumulates divides by its steps: the parts count different things

    def __init__(self, config):
        super().__init__(config)
        self.vilt = hf.ViltModel(config)
        self.mlm_score = hf.ViltMLMHead(config)
        self.itm_score = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def get_output_embeddings(self):
        return self.mlm_score.decoder

    def set_output_embeddings(self, new_embeddings):
        self.mlm_score.decoder = new_embeddings

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        mlm_input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        false_pixel_values: torch.Tensor | None = None,
        false_pixel_mask: torch.Tensor | None = None,
        itm_labels: torch.Tensor | None = None,
        soft_labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
    ) -> PretrainingOutput | tuple:
        """:func:`pretraining_loss` of these, or without labels and false images the logits of both heads."""
        given = dict(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids,
            pixel_values=pixel_values, pixel_mask=pixel_mask, mlm_input_ids=mlm_input_ids, labels=labels,
            false_pixel_values=false_pixel_values, false_pixel_mask=false_pixel_mask, itm_labels=itm_labels,
            soft_labels=soft_labels,
        )  # fmt: skip
        check_tensors(**given)
        given = {name: value for name, value in given.items() if value is not None}
        if labels is None and false_pixel_values is None:
            if not given.keys().isdisjoint(("mlm_input_ids", "soft_labels", "itm_labels")):
                raise InputError(
                    "mlm_input_ids and soft_labels need labels, and itm_labels need false_pixel_values: pass them too."
                )
            outputs = self.vilt(**given, return_dict=True)
            text = outputs.last_hidden_state[:, : input_ids.shape[1]]
            result = PretrainingOutput(
                mlm_logits=self.mlm_score(text), itm_logits=self.itm_score(outputs.pooler_output)
            )
        else:
            result = pretraining_loss(self, given)
        return result if return_dict in (None, True) else result.to_tuple()

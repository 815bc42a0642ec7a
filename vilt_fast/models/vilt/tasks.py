"""HuggingFace's ViLT and its task classes: the trunk packed, and each head on as few rows as it needs."""

from __future__ import annotations

import warnings
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import activations
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput, TokenClassifierOutput
from transformers.models.vilt import modeling_vilt as hf

from ... import record
from ...engine.blocks import is_tokenwise
from ...engine.genuine import own_methods, why_not_own
from ...engine.head import run_head
from ...engine.listeners import any_hooked, has_hooks, is_plain, why_hooked, why_not_own_code, why_not_plain
from ...engine.packed import linear
from ...engine.quantization import WeightCache
from ...errors import InputError
from ...ops._check import readable
from ..base import Part, Swapped
from . import release, whole
from .encoder import EncoderForward
from .given import check_tensors
from .inputs import Inputs, Sizes, joined
from .options import ViltOptions
from .plan import SequencePlan
from .trunk import Trunk, TrunkForward, activation_kind, chosen, extras, is_known, why_own_now


def find(model: nn.Module) -> list[Part]:
    """The `ViltModel`s in `model`, or the encoders of those with a forward of their own, and the tasks around them."""
    kinds = {
        hf.ViltModel: TrunkForward,
        hf.ViltForMaskedLM: MaskedLMForward,
        hf.ViltForTokenClassification: TokenClassificationForward,
        hf.ViltForQuestionAnswering: QuestionAnsweringForward,
        hf.ViltForImageAndTextRetrieval: RetrievalForward,
        hf.ViltForImagesAndTextClassification: ImagesAndTextForward,
    }
    parts = []
    for module in model.modules():
        for known, kind in kinds.items():
            if not isinstance(module, known):
                continue
            if type(module).forward is known.forward:
                parts.append(Part(module, kind))
            elif known is hf.ViltModel and type(module.encoder).forward is hf.ViltEncoder.forward:
                parts.append(Part(module.encoder, EncoderForward))
            else:
                parts.append(Part(module, kind, _refusal(type(module), known)))
    return parts


def _refusal(subclass, known) -> str:
    name = subclass.__name__
    return (
        f"{name} overrides forward of {known.__name__}, which accelerate stands for: keep a {known.__name__} as a part "
        f"of {name} in place of deriving from it, and accelerate is as good as inside."
    )


_ARGUMENTS = frozenset(
    "input_ids attention_mask token_type_ids pixel_values pixel_mask inputs_embeds image_embeds labels "
    "output_attentions output_hidden_states return_dict".split()
)


class TaskForward(Swapped):
    """The forward of a task class. A derived class says what its head makes of the trunk's packed result."""

    options_type = ViltOptions
    part = "head"
    head = "classifier"  #: its name in the model
    output = SequenceClassifierOutput
    reads = "pooled"  #: what the head is given: "pooled" or "texts"
    #: what a head may be made of to be captured in a CUDA graph with the trunk; None: not on the rows that are read
    head_kinds: ClassVar[tuple[type, ...] | None] = (nn.Linear, nn.LayerNorm, nn.GELU, nn.Sequential)

    def compute(self, *args, sequence_plan=None, **kwargs):
        model, config = self.module, self.module.config
        given = release.understood(model, _ARGUMENTS, args, kwargs)
        trunk, labels = model.vilt, None if given is None else given.get("labels")
        check_tensors(labels=labels)
        if labels is not None and isinstance(trunk.__dict__.get("forward"), TrunkForward):
            self.look_at(labels, given.get("attention_mask"), trunk.forward.options.padding)
        if why := why_own_now(self, given, sequence_plan, trunk):
            result = self.own(*args, **kwargs)
            self.say_own(why)
            return result
        self.check(labels)
        wanted = (
            chosen(given.get("output_hidden_states"), config.output_hidden_states),
            chosen(given.get("output_attentions"), config.output_attentions),
        )
        head = None if self.head_kinds is None else whole.Head(self.headed, self.head_modules(), self.head_kinds)
        standing = None if head is None else trunk.forward.standing(given, *wanted, head)
        images = self.images(given, standing and standing.sizes)
        done = trunk.forward.run(images, sequence_plan, *wanted, reads=self.reads, head=head, standing=standing)
        logits = self.logits(done, images)
        if record.listened():
            record.say("packed" if done.logits is None else "CUDA graph", "", ("head", getattr(model, self.head)))
        loss = None if labels is None else self.loss(logits, labels.to(logits.device))
        hidden_states, attentions = self.extras(done)
        if release.wants_dict(model, given):
            return self.output(loss=loss, logits=logits, hidden_states=hidden_states, attentions=attentions)
        output = self.as_tuple(logits, hidden_states, attentions)
        return output if loss is None else (loss, *output)

    def foretell_parts(self):
        record.say("packed", "", ("head", getattr(self.module, self.head)))

    def why_own(self) -> str:
        """Why the model's own forward is to be called, around its trunk, or ""."""
        model = self.module
        trunk = model.vilt
        if not isinstance(trunk.__dict__.get("forward"), TrunkForward):
            return "the trunk inside is not accelerated, or something is wrapped around its forward"
        if has_hooks(trunk):  # it is called past its hooks, so there must be none
            return f"of {type(trunk).__name__}: {why_hooked(trunk, inside=False)}"
        for module in (model, trunk):
            if not own_methods(type(module)):
                return why_not_own(type(module))
        return self.why_not_packable()

    def why_not_packable(self) -> str:
        """Why the head, as it is now, may not be given packed rows, or ""."""
        return ""

    def check(self, labels) -> None:
        """Raise for what the task does not take, before anything is computed."""

    def look_at(self, labels: torch.Tensor, attention_mask: torch.Tensor | None, padding: str) -> None:
        """Say what of the labels cannot count as it does in the reference, where looking at them waits for nothing."""

    def images(self, given, sizes: Sizes | None = None) -> list[Inputs]:
        """The inputs of each image that a sample has."""
        return [Inputs.checked(self.module.vilt, **Inputs.among(given), sizes=sizes)]

    def plan(self, **inputs) -> SequencePlan:
        """The plan that a call with these inputs would make."""
        trunk = self.module.vilt
        return joined([i.plan(trunk, trunk.forward.options) for i in self.images(inputs)])

    def head_modules(self) -> tuple[nn.Module, ...]:
        """The modules that `headed` calls."""
        return (getattr(self.module, self.head),)

    def headed(self, rows: torch.Tensor, weights: WeightCache | None = None) -> torch.Tensor:
        """What the head makes of rows, with 8-bit copies of its weights if there are any."""
        return run_head(getattr(self.module, self.head), rows, weights)

    def logits(self, trunk: Trunk, images: list[Inputs]) -> torch.Tensor:
        return self.headed(trunk.pooled, trunk.weights) if trunk.logits is None else trunk.logits

    def loss(self, logits, labels):
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))

    extras = staticmethod(extras)

    @staticmethod
    def as_tuple(logits, hidden_states, attentions):
        """The output where no dictionary is wanted, without the loss."""
        return (logits, *(e for e in (hidden_states, attentions) if e is not None))


class QuestionAnsweringForward(TaskForward):
    """`ViltForQuestionAnswering.forward`."""

    def loss(self, logits, labels):
        return F.binary_cross_entropy_with_logits(logits, labels) * labels.shape[1]


class RetrievalForward(TaskForward):
    """`ViltForImageAndTextRetrieval.forward`."""

    head = "rank_output"

    def check(self, labels):
        if labels is not None:
            raise NotImplementedError("Training is not yet supported.")

    def headed(self, rows, weights=None):
        return self.module.rank_output(rows)


class TextForward(TaskForward):
    """A task that labels text tokens; its head runs on those that the plan has rows for."""

    head_kinds = (
        nn.Linear, nn.LayerNorm, nn.Dropout, nn.GELU, activations.GELUActivation, hf.ViltMLMHead,
        hf.ViltPredictionHeadTransform,
    )  # fmt: skip

    _said = False

    def look_at(self, labels, attention_mask, padding):
        if self._said or padding != "zero" or not isinstance(attention_mask, torch.Tensor):
            return
        if labels.shape != attention_mask.shape or not readable(labels) or not readable(attention_mask):
            return
        lost = ((labels != -100) & (attention_mask == 0).to(labels.device)).sum().item()
        if lost:
            self._said = True
            warnings.warn(
                f"vilt_fast: {lost} of the labels are of padding (attention_mask 0), whose logits are zero here: the "
                "loss is not the reference's. Label padding -100, or compute it, with vilt_fast.accelerate(model, "
                "padding='reference'). This is said once.",
                stacklevel=2,
            )

    def logits(self, trunk, images):
        """[B, T, classes], zero where a text token has no row that is shown."""
        logits, plan = self.headed(trunk.texts) if trunk.logits is None else trunk.logits, trunk.plan
        padded = logits.new_zeros(plan.batch * plan.text_length, logits.shape[-1])
        return padded.index_copy(0, plan.text_places, logits).view(plan.batch, plan.text_length, -1)


class MaskedLMForward(TextForward):
    """`ViltForMaskedLM.forward`."""

    output = MaskedLMOutput
    reads = "texts"
    head = "mlm_score"

    def why_not_packable(self):
        return why_head_not_packable(self.module.mlm_score)

    def headed(self, rows, weights=None):
        head = self.module.mlm_score
        # The decoder apart: under autocast the op does not copy its [vocabulary, D] weight.
        return linear(head.decoder, head.transform(rows))


class TokenClassificationForward(TextForward):
    """`ViltForTokenClassification.forward`."""

    output = TokenClassifierOutput
    reads = "texts"

    def why_not_packable(self):
        return why_classifier_not_packable(self.module)

    def head_modules(self):
        return self.module.dropout, self.module.classifier

    def headed(self, rows, weights=None):
        return self.module.classifier(self.module.dropout(rows))


class ImagesAndTextForward(TaskForward):
    """`ViltForImagesAndTextClassification.forward`: one packed batch for all images, the text embedded once."""

    output = hf.ViltForImagesAndTextClassificationOutput
    head_kinds = None  # it reads several images of a sample side by side

    def why_not_packable(self):
        # What is not known, or has hooks, is to see the images one after the other, as in the reference.
        vilt = self.module.vilt
        for child in vilt.children():
            if child is not vilt.embeddings and any_hooked(child):
                return f"of {type(child).__name__}: {why_hooked(child)}"
        return "" if is_known(vilt) else "which tokens a part of the trunk looks at is not known"

    def images(self, given, sizes=None):
        of_images = {k: given.get(k) for k in ("pixel_values", "pixel_mask", "image_embeds")}
        check_tensors(**of_images)
        pixel_values, pixel_mask, image_embeds = of_images.values()
        if pixel_values is not None and pixel_values.ndim == 4:
            pixel_values = pixel_values.unsqueeze(1)
        if image_embeds is not None and image_embeds.ndim == 3:
            image_embeds = image_embeds.unsqueeze(1)
        image = pixel_values if pixel_values is not None else image_embeds
        num_images = None if image is None else image.shape[1]
        wanted = self.module.config.num_images
        if pixel_values is not None and pixel_values.ndim != 5:
            raise InputError(f"pixel_values must be [B, {wanted}, C, H, W], got {list(pixel_values.shape)}.")
        if num_images != wanted:
            raise InputError(
                "Make sure to match the number of images in the model with the number of images in the input: "
                f"the model takes {wanted}, got {num_images}."
            )
        if pixel_mask is not None and (pixel_mask.ndim != 4 or pixel_mask.shape[1] != num_images):
            raise InputError(f"pixel_mask must be [B, {num_images}, height, width], got {list(pixel_mask.shape)}.")
        shared = {k: given.get(k) for k in ("input_ids", "attention_mask", "token_type_ids", "inputs_embeds")}
        return [
            Inputs.checked(
                self.module.vilt,
                pixel_values=None if pixel_values is None else pixel_values[:, i],
                pixel_mask=None if pixel_mask is None else pixel_mask[:, i],
                image_embeds=None if image_embeds is None else image_embeds[:, i],
                modality=i + 1,
                **shared,
            )
            for i in range(num_images)
        ]

    def logits(self, trunk, images):
        batch = images[0].text_shape[0]
        return run_head(self.module.classifier, torch.cat(trunk.pooled.split(batch), dim=-1), trunk.weights)

    @staticmethod
    def extras(trunk):
        """Lists over the images, each at the padded width of that image's own batch; None where not asked for."""
        plan = trunk.plan
        hidden = [h if isinstance(h, list) else plan.split(h) for h in trunk.hidden_states]
        hidden = [[part.to(trunk.dtype) for part in parts] for parts in hidden]
        attentions = [a if isinstance(a, list) else plan.shown_attentions(a) for a in trunk.attentions]
        attentions = [a if isinstance(a, list) else [a] for a in attentions]
        images = range(len(plan.widths))
        return (
            [tuple(layer[i] for layer in hidden) for i in images] if hidden else None,
            [tuple(layer[i] for layer in attentions) for i in images] if attentions else None,
        )

    @staticmethod
    def as_tuple(logits, hidden_states, attentions):
        return logits, hidden_states, attentions


def why_head_not_packable(head: nn.Module) -> str:
    """Why a masked LM's head may look at more than one token at once, or has to be called itself; or ""."""
    if any_hooked(head) or not is_plain(head, hf.ViltMLMHead):
        return why_hooked(head) or why_not_plain(head, hf.ViltMLMHead)
    transform = head.transform
    if not is_plain(transform, hf.ViltPredictionHeadTransform):
        return why_not_plain(transform, hf.ViltPredictionHeadTransform)
    if not is_plain(transform.LayerNorm, nn.LayerNorm):
        return why_not_plain(transform.LayerNorm, nn.LayerNorm)
    if activation_kind(transform.transform_act_fn) is None:
        return "which tokens its activation looks at is not known"
    return next(filter(None, map(_why_not_tokenwise, (transform.dense, head.decoder))), "")


def why_classifier_not_packable(model: nn.Module) -> str:
    """The same of the head of a `ViltForTokenClassification`."""
    dropout, classifier = model.dropout, model.classifier
    if any_hooked(dropout) or any_hooked(classifier):
        return why_hooked(dropout) or why_hooked(classifier)
    if not is_plain(dropout, nn.Dropout, nn.Identity):
        return why_not_plain(dropout, nn.Dropout)
    return _why_not_tokenwise(classifier)


def _why_not_tokenwise(linear) -> str:
    if is_tokenwise(linear):
        return ""
    return why_not_own_code(linear) or f"which tokens its {type(linear).__name__} looks at is not known"

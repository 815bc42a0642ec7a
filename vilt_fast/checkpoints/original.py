"""The original repository's checkpoints as HuggingFace models, and these as the original's checkpoints.

What differs between the two, besides names: the original's blocks and final norm have eps 1e-6 (text 1e-12), its masked
LM's decoder is a matrix of its own, attention's three projections are one. While training with dropout it drops within
the feed-forward network too, after the GELU, where HuggingFace's class has no dropout.
"""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import nn
from transformers.models.vilt import modeling_vilt as hf

from ..objectives.pretraining import ViltForPreTraining
from ..swap import accelerate
from . import names
from .lightning import open_checkpoint

EPS = 1e-6  #: of the blocks and the final norm in the original

#: the original's head -> the class that has it; the first that a checkpoint has decides, others it keeps beside
_CLASSES = {
    "nlvr2_classifier": hf.ViltForImagesAndTextClassification,
    "vqa_classifier": hf.ViltForQuestionAnswering,
    "rank_output": hf.ViltForImageAndTextRetrieval,
    "mlm_score": ViltForPreTraining,
    "itm_score": ViltForPreTraining,
}

#: (width, heads) of the original's vision transformers: its config's num_heads is that of the text embeddings alone
_HEADS = {"vit_base": (768, 12), "vit_large": (1024, 16), "vit_huge": (1280, 16)}
_ODD = {"deit": "a distillation token", "resnet": "a ResNet before its blocks", "vit_small": "another attention scale"}

_BUFFER = "text_embeddings.position_ids"  # counts from 0; releases of transformers differ in whether they save it


def load_original(path: str | os.PathLike, *, config: Mapping | None = None, **options) -> hf.ViltPreTrainedModel:
    """A checkpoint of the original repository as an accelerated HuggingFace model, in evaluation mode.

    The head decides the class: `mlm_score` and `itm_score` make a :class:`~vilt_fast.objectives.ViltForPreTraining`,
    `vqa_classifier`, `nlvr2_classifier` and `rank_output` HuggingFace's class for it; without a head, a `ViltModel`.
    The `itm_score` that a retrieval checkpoint has beside its head is kept, frozen, under that name. Norms have the
    original's eps and the decoder a matrix of its own; of these `save_pretrained` keeps the matrix, and `save_original`
    both.

    Args:
        path: a `.ckpt` of PyTorch Lightning 1.x, which need not be installed. Nothing that is pickled in it runs.
        config: entries in place of those of its `hyper_parameters["config"]`; of it, num_heads, vit, max_image_len and
            drop_rate are read. Sizes are those of the tensors.
        options: those of :func:`vilt_fast.accelerate`.

    Raises:
        OSError: there is no such file. ValueError: it is damaged, of another architecture, lacks parameters or has some
        that ViLT has not; the message names them.
    """
    checkpoint = open_checkpoint(path)
    state = checkpoint.get("state_dict")
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path} has no state_dict: it holds {_listed(checkpoint)}.")
    hyper = checkpoint.get("hyper_parameters")
    known = hyper.get("config") if isinstance(hyper, Mapping) else None
    known = {**(known if isinstance(known, Mapping) else {}), **(config or {})}
    state = {name: tensor for name, tensor in state.items() if name != _BUFFER}
    if odd := [name for name, tensor in state.items() if not isinstance(tensor, torch.Tensor)]:
        raise ValueError(f"{path}: {_listed(odd)} in its state_dict is no tensor.")
    model = _made_for(state, known, path)
    with torch.no_grad():
        for name, source in _table(model).items():
            own, given = model.get_parameter(name), _part(state, source, path)
            if own.shape != given.shape:
                raise ValueError(f"{path}: {_name(source)} is {list(given.shape)}, expected {list(own.shape)}.")
            own.data = given.clone()
    return accelerate(model.eval(), **options)


def save_original(model: nn.Module, path: str | os.PathLike, *, config: Mapping | None = None) -> None:
    """Write a model as a checkpoint that the original repository and Lightning 1.x open.

    It holds `state_dict` and `hyper_parameters["config"]`, no optimizer: for `load_path=`, not to resume a run.

    Args:
        model: of one of the classes that `load_original` makes, or a `ViltForMaskedLM`; accelerated or not.
        path: the `.ckpt` to write.
        config: entries of `hyper_parameters["config"]` besides those that the model says, and in their place.

    Raises:
        TypeError: the original has no such model. A norm whose eps is not the original's is warned of: the original
        has no place for it, and computes with its own.
    """
    trunk = getattr(model, "vilt", model)
    if not isinstance(trunk, hf.ViltModel) or (trunk is not model and not _heads_of(model)):
        raise TypeError(f"the original has no counterpart of a {type(model).__name__}.")
    own = {name: parameter.detach().cpu() for name, parameter in model.named_parameters(remove_duplicate=False)}
    state, thirds = OrderedDict(), {}
    for name, source in _table(model).items():
        if isinstance(source, str):
            state[source] = own[name].clone()
        else:
            thirds.setdefault(source[0], {})[source[1]] = own[name]
    state |= {name: torch.cat([parts[i] for i in range(3)]) for name, parts in thirds.items()}
    length = len(state["text_embeddings.position_embeddings.weight"])
    state[_BUFFER] = torch.arange(length)[None]
    if other := sorted({norm.eps for norm in _norms(trunk)} - {EPS}):
        warnings.warn(
            f"vilt_fast: norms of this model have eps {', '.join(f'{eps:g}' for eps in other)}; the original computes "
            f"with {EPS:g} whatever the checkpoint says.",
            stacklevel=2,
        )
    hyper = {"config": {**_config_of(model, trunk), **(config or {})}}
    torch.save(
        {"epoch": 0, "global_step": 0, "pytorch-lightning_version": "1.1.4", "state_dict": state,
         "hparams_name": "config", "hyper_parameters": hyper}, path,
    )  # fmt: skip


def _made_for(state: Mapping, known: Mapping, path) -> nn.Module:
    """A model of the class, sizes and eps that fit a state dict of the original."""
    heads = [head for head in _CLASSES if any(name.startswith(head + ".") for name in state)]
    kind = _CLASSES[heads[0]] if heads else hf.ViltModel
    if heads == ["mlm_score"]:
        kind = hf.ViltForMaskedLM
    own = ["mlm_score", "itm_score"] if kind is ViltForPreTraining else heads[:1]
    beside = ["itm_score"] if "itm_score" in heads and "itm_score" not in own else []
    layers = names.layers_of(state)
    needed = {_name(source) for source in names.trunk(max(layers, 1)).values()}
    needed |= {source for head in own + beside for _, source in names.HEADS[head]}
    vit = str(known.get("vit", ""))
    if odd := next((why for name, why in _ODD.items() if name in vit), ""):
        raise ValueError(f"{path} is a {vit}, which has {odd}: HuggingFace's ViLT has none.")
    if missing := sorted(needed - state.keys()):
        raise ValueError(f"{path} is no ViLT: it has no {_listed(missing)}; it has {_listed(state)}.")
    if unknown := sorted(state.keys() - needed):
        raise ValueError(f"{path} has parameters that HuggingFace's ViLT has no place for: {_listed(unknown)}.")
    model = kind(kind.config_class(**_sizes(state, known, layers, path)))
    for head in beside:
        model.add_module(head, nn.Linear(model.config.hidden_size, 2).requires_grad_(False))
    for norm in _norms(getattr(model, "vilt", model)):
        norm.eps = EPS
    if hasattr(model, "mlm_score"):
        _untie(model)
    return model


def _sizes(state, known, layers, path) -> dict:
    """The arguments of a `ViltConfig`."""
    if "num_heads" not in known:
        raise ValueError(f"{path} has no hyper_parameters['config'] with num_heads: pass config=dict(num_heads=...).")
    patch, table = state["transformer.patch_embed.proj.weight"], state["transformer.pos_embed"]
    words, text = (state[f"text_embeddings.{name}_embeddings.weight"] for name in ("word", "position"))
    side = round((table.shape[1] - 1) ** 0.5) if table.ndim == 3 else 0
    known_forms = table.ndim == 3 and patch.ndim == 4 and words.ndim == 2
    if not known_forms or patch.shape[2] != patch.shape[3] or table.shape[1] != 1 + side**2:
        raise ValueError(
            f"{path}: transformer.patch_embed.proj.weight {list(patch.shape)}, transformer.pos_embed "
            f"{list(table.shape)} and the table of words {list(words.shape)} are not those of words and of square "
            "patches in a square."
        )
    width = words.shape[1]
    named = next((heads for vit, (w, heads) in _HEADS.items() if vit in str(known.get("vit")) and w == width), None)
    heads = known["num_heads"] if named is None else named
    answers = state.get("vqa_classifier.3.weight", state.get("nlvr2_classifier.3.weight"))
    longest = known.get("max_image_len", -1)
    return {
        "vocab_size": len(words), "hidden_size": width, "max_position_embeddings": len(text),
        "type_vocab_size": len(state["text_embeddings.token_type_embeddings.weight"]),
        "modality_type_vocab_size": len(state["token_type_embeddings.weight"]),
        "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": len(state["transformer.blocks.0.mlp.fc1.weight"]),
        "patch_size": patch.shape[2], "image_size": side * patch.shape[2], "num_channels": patch.shape[1],
        "hidden_dropout_prob": known.get("drop_rate", 0.0), "max_image_length": -1 if longest is None else longest,
        "num_images": 2 if "nlvr2_classifier.3.weight" in state else -1,
        **({} if answers is None else {"num_labels": len(answers)}),
    }  # fmt: skip


def _table(model) -> dict:
    """{parameter of the model: where it is in the original}."""
    prefix = "" if isinstance(model, hf.ViltModel) else "vilt."
    layers = len(getattr(model, "vilt", model).encoder.layer)
    table = {prefix + ours: theirs for ours, theirs in names.trunk(layers).items()}
    if getattr(model, "vilt", model).pooler is None:
        table = {ours: theirs for ours, theirs in table.items() if "pooler" not in ours}
    return table | {ours: theirs for head in _heads_of(model) for ours, theirs in names.HEADS[head]}


def _heads_of(model) -> list[str]:
    """The original's heads that a model has."""
    classifier = {kind: head for head, kind in _CLASSES.items() if head.endswith("classifier")}
    named = [head for kind, head in classifier.items() if isinstance(model, kind)]
    return named + [head for head in ("rank_output", "mlm_score", "itm_score") if hasattr(model, head)]


def _norms(trunk):
    """Those that have eps 1e-6 in the original."""
    for layer in trunk.encoder.layer:
        yield from (layer.layernorm_before, layer.layernorm_after)
    yield trunk.layernorm


def _untie(model) -> None:
    """Give the decoder a matrix of its own, and have transformers leave it at that."""
    decoder = model.mlm_score.decoder
    decoder.weight = nn.Parameter(torch.empty_like(decoder.weight))
    model.config.tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):  # since transformers 5
        model.all_tied_weights_keys.pop("mlm_score.decoder.weight", None)


def _config_of(model, trunk) -> dict:
    """What the original's config says of a model like this."""
    config, heads = trunk.config, _heads_of(model)
    width, patch = config.hidden_size, config.patch_size
    vit = next((name for name, (w, _) in _HEADS.items() if w == width), "vit_base")
    tasks = {"itm_score": "itm", "mlm_score": "mlm", "vqa_classifier": "vqa", "nlvr2_classifier": "nlvr2",
             "rank_output": "irtr"}  # fmt: skip
    return {
        "vit": f"{vit}_patch{patch}_{config.image_size}", "image_size": config.image_size, "patch_size": patch,
        "max_image_len": config.max_image_length, "hidden_size": width, "num_heads": config.num_attention_heads,
        "num_layers": len(trunk.encoder.layer), "mlp_ratio": config.intermediate_size // width,
        "drop_rate": config.hidden_dropout_prob, "vocab_size": config.vocab_size,
        "max_text_len": config.max_position_embeddings, "vqav2_label_size": config.num_labels,
        "loss_names": {**dict.fromkeys(("itm", "mlm", "mpp", "vqa", "nlvr2", "irtr"), 0),
                       **{tasks[head]: 1 for head in heads}},
    }  # fmt: skip


def _part(state, source, path) -> torch.Tensor:
    if isinstance(source, str):
        return state[source]
    whole = state[source[0]]
    if len(whole) % 3:
        raise ValueError(f"{path}: {source[0]} is {list(whole.shape)}, expected three times the model's width of rows.")
    return whole.chunk(3)[source[1]]


def _name(source) -> str:
    return source if isinstance(source, str) else source[0]


def _listed(found, most=6) -> str:
    """The first few names, and how many there are besides."""
    found = [str(name) for name in found]
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more if found else "nothing"

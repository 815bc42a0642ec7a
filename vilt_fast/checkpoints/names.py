"""Where each parameter of the original `ViLTransformerSS` is in HuggingFace's ViLT: one table, read both ways."""

from __future__ import annotations

from collections.abc import Mapping

#: the original's head -> its parameters: (in HuggingFace's class, there)
HEADS = {
    "mlm_score": [
        *((f"mlm_score.transform.{name}",) * 2 for name in (
            "dense.weight", "dense.bias", "LayerNorm.weight", "LayerNorm.bias")),
        ("mlm_score.decoder.weight", "mlm_score.decoder.weight"), ("mlm_score.decoder.bias", "mlm_score.bias"),
    ],
    "itm_score": [(f"itm_score.{kind}", f"itm_score.fc.{kind}") for kind in ("weight", "bias")],
    "rank_output": [(f"rank_output.{kind}",) * 2 for kind in ("weight", "bias")],
    **{
        head: [(f"classifier.{i}.{kind}", f"{head}.{i}.{kind}") for i in (0, 1, 3) for kind in ("weight", "bias")]
        for head in ("vqa_classifier", "nlvr2_classifier")
    },
}  # fmt: skip

_EMBEDDINGS = {
    **{
        f"embeddings.text_embeddings.{name}": f"text_embeddings.{name}"
        for name in ("word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight",
                     "LayerNorm.weight", "LayerNorm.bias")
    },
    "embeddings.token_type_embeddings.weight": "token_type_embeddings.weight",
    "embeddings.cls_token": "transformer.cls_token",
    "embeddings.position_embeddings": "transformer.pos_embed",
    "embeddings.patch_embeddings.projection.weight": "transformer.patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "transformer.patch_embed.proj.bias",
    "layernorm.weight": "transformer.norm.weight",
    "layernorm.bias": "transformer.norm.bias",
    "pooler.dense.weight": "pooler.dense.weight",
    "pooler.dense.bias": "pooler.dense.bias",
}  # fmt: skip

_LAYER = {
    "layernorm_before": "norm1",
    "attention.output.dense": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}

_QKV = ("query", "key", "value")


def trunk(layers: int) -> dict[str, str | tuple[str, int]]:
    """{parameter of a `ViltModel` of so many layers: the original's, or (the original's, which third of its rows)}."""
    names: dict[str, str | tuple[str, int]] = dict(_EMBEDDINGS)
    for i in range(layers):
        for kind in ("weight", "bias"):
            for third, name in enumerate(_QKV):
                ours = f"encoder.layer.{i}.attention.attention.{name}.{kind}"
                names[ours] = (f"transformer.blocks.{i}.attn.qkv.{kind}", third)
            for ours, theirs in _LAYER.items():
                names[f"encoder.layer.{i}.{ours}.{kind}"] = f"transformer.blocks.{i}.{theirs}.{kind}"
    return names


def layers_of(state: Mapping) -> int:
    """How many blocks a state dict of the original has."""
    prefix = "transformer.blocks."
    numbers = {name[len(prefix) :].partition(".")[0] for name in state if name.startswith(prefix)}
    return 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)

"""A part whose code is not the one that the swap stands for is called itself, wherever that code was changed."""

import gc
import importlib
import subprocess
import sys
import textwrap

import pytest
import torch
from support.models import (
    TEXT,
    assert_close,
    assert_follows,
    batch,
    build,
    call,
    changed,
    leaves,
    only_real,
    pair,
    real_positions,
    trunk_of,
)
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from transformers.activations import GELUActivation
from transformers.models.vilt import modeling_vilt as hf

import vilt_fast
from vilt_fast.engine import genuine
from vilt_fast.engine.blocks import activation_kind, is_tokenwise
from vilt_fast.models.vilt.trunk import _block


def scaled(own):
    """A function that returns a quarter more than `own`."""

    def more(*args, **kwargs):
        output = own(*args, **kwargs)
        if isinstance(output, dict):
            output[next(iter(output))] = output[0] * 1.25
            return output
        return (output[0] * 1.25, *output[1:]) if isinstance(output, tuple) else output * 1.25

    return more


TRUNK = [
    hf.ViltModel, hf.ViltEmbeddings, hf.TextEmbeddings, hf.ViltPatchEmbeddings, hf.ViltEncoder, hf.ViltLayer,
    hf.ViltAttention, hf.ViltSelfAttention, hf.ViltSelfOutput, hf.ViltIntermediate, hf.ViltOutput, hf.ViltPooler,
    nn.Linear, nn.LayerNorm, nn.Dropout, nn.Embedding, nn.Conv2d, nn.Tanh, nn.Softmax, GELUActivation,
]  # fmt: skip
PATCHED = [
    *(("trunk", kind, "forward") for kind in TRUNK),
    ("trunk", hf.ViltEmbeddings, "visual_embed"),
    ("trunk", hf.ViltSelfAttention, "__call__"),
    ("masked_lm", hf.ViltMLMHead, "forward"),
    ("masked_lm", hf.ViltPredictionHeadTransform, "forward"),
    ("masked_lm", hf.ViltForMaskedLM, "forward"),
    ("masked_lm", hf.ViltModel, "forward"),
    ("token_classification", nn.Dropout, "forward"),
    ("question_answering", hf.ViltModel, "forward"),
    ("nlvr2", hf.ViltLayer, "forward"),
    ("nlvr2", hf.ViltEmbeddings, "visual_embed"),
    *(("trunk", F, name) for name in ("linear", "layer_norm", "softmax", "embedding", "dropout", "conv2d", "gelu")),
    ("trunk", F, "interpolate"),
    ("trunk", torch, "matmul"),
    ("trunk", torch.nn.modules.linear.F, "linear"),
]


@pytest.mark.parametrize("first", ["patch", "accelerate"])
@pytest.mark.parametrize("kind, where, name", PATCHED, ids=lambda v: getattr(v, "__name__", v))
def test_what_is_assigned_to_a_class_or_a_library_is_honoured(monkeypatch, kind, where, name, first):
    if first == "accelerate":
        models = pair(kind)
        call(models[1], batch(kind))
    own = getattr(where, name)
    monkeypatch.setattr(where, name, scaled(own))
    if first == "patch":
        models = pair(kind)
    assert_follows(kind, models, batch(kind))
    monkeypatch.undo()
    assert_follows(kind, models, batch(kind))


@pytest.mark.parametrize("mask", ["create_bidirectional_mask"])
def test_a_function_of_the_model_file_that_is_replaced_is_honoured(monkeypatch, mask):
    models = pair("trunk")
    monkeypatch.setattr(hf, mask, lambda **given: None)  # nothing is masked any more
    assert_close(*(call(m, batch("trunk")).last_hidden_state for m in models))


def test_a_decorator_is_no_own_code(monkeypatch):
    theirs, ours = pair("trunk")
    monkeypatch.setattr(nn.Linear, "forward", torch.no_grad()(nn.Linear.forward))
    for model in (theirs, ours):
        call(model, batch("trunk")).last_hidden_state.sum().backward()
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert (a.grad is None or not a.grad.any()) == (b.grad is None or not b.grad.any()), name


PARTS = [
    "embeddings", "embeddings.text_embeddings", "embeddings.text_embeddings.word_embeddings",
    "embeddings.text_embeddings.LayerNorm", "embeddings.text_embeddings.dropout", "embeddings.token_type_embeddings",
    "embeddings.patch_embeddings", "embeddings.patch_embeddings.projection", "embeddings.dropout", "encoder",
    "encoder.layer.1", "encoder.layer.1.attention", "encoder.layer.1.attention.attention",
    "encoder.layer.1.attention.attention.key", "encoder.layer.1.attention.attention.dropout",
    "encoder.layer.1.attention.output", "encoder.layer.1.intermediate",
    "encoder.layer.1.intermediate.intermediate_act_fn", "encoder.layer.1.output", "encoder.layer.1.layernorm_before",
    "layernorm", "pooler", "pooler.dense", "",
]  # fmt: skip


@pytest.mark.parametrize("place", PARTS)
@pytest.mark.parametrize("kind", ["trunk", "nlvr2"])
def test_a_subclass_with_a_forward_of_its_own_is_honoured(kind, place):
    models = pair(kind)
    for model in models:
        module = trunk_of(model).get_submodule(place)
        usual = type(module)
        module.__class__ = type("Mine", (usual,), {"forward": scaled(usual.forward)})
    assert_follows(kind, models, batch(kind))


@pytest.mark.parametrize("place", ["mlm_score", "mlm_score.transform", "mlm_score.transform.transform_act_fn"])
def test_a_subclass_in_a_head_is_honoured(place):
    models = pair("masked_lm")
    for model in models:
        module = model.get_submodule(place)
        module.__class__ = type("Mine", (type(module),), {"forward": scaled(type(module).forward)})
    assert_follows("masked_lm", models, batch("masked_lm"))


def test_a_class_put_under_the_librarys_name_before_anything_was_accelerated():
    program = """
        import torch
        from torch import nn
        from transformers import ViltConfig
        from transformers.models.vilt import modeling_vilt as hf

        for name in ("ViltSelfAttention", "ViltPatchEmbeddings", "ViltPooler"):
            def forward(self, *args, usual=getattr(hf, name), **kwargs):
                output = usual.forward(self, *args, **kwargs)
                return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2

            setattr(hf, name, type(name, (getattr(hf, name),), {"forward": forward}))

        import vilt_fast
        from vilt_fast.testing import random_weights

        model = hf.ViltModel(ViltConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=64,
            patch_size=16, vocab_size=50, max_position_embeddings=12,
        ))
        model = random_weights(model, seed=0).eval().double()
        inputs = {"input_ids": torch.arange(10).view(2, 5), "pixel_values": torch.randn(2, 3, 64, 64).double()}
        outputs = []
        for change in (None, lambda m: vilt_fast.accelerate(m, patch_order="reference")):
            if change:
                change(model)
            torch.manual_seed(3)
            with torch.no_grad():
                outputs.append(model(**inputs).pooler_output)
        torch.testing.assert_close(*outputs)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=300)


# --- token-wise is what is known to be --------------------------------------------------------------------------------


class Mixing(nn.Linear):
    """A linear layer that adds the mean over the sample, as squeeze-and-excite adapters do."""

    def forward(self, x):
        return super().forward(x + x.mean(-2, keepdim=True))


class Gated(nn.Module):
    """An adapter around a linear layer, with a gate over the sample."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x):
        return self.base_layer(x) * x.mean((-2, -1), keepdim=True).sigmoid()


class GlobalResponse(nn.Module):
    """An activation that divides by a norm over the sample."""

    def forward(self, x):
        return F.gelu(x) / (1 + x.norm(dim=-2, keepdim=True))


class Centred(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x - x.mean(-2, keepdim=True))


class Dropping(nn.Dropout):
    def forward(self, x):
        return x - x.mean(-2, keepdim=True)


def mixing(linear):
    linear.__class__ = Mixing
    return linear


MIXERS = [
    ("encoder.layer.1.attention.output.dense", mixing),
    ("encoder.layer.1.intermediate.dense", Gated),
    ("encoder.layer.1.intermediate.intermediate_act_fn", lambda _: GlobalResponse()),
    ("encoder.layer.1.intermediate.intermediate_act_fn", lambda _: nn.Softmax(dim=-2)),
    ("encoder.layer.1.layernorm_after", lambda _: Centred(32).double()),
    ("encoder.layer.1.output.dropout", lambda _: Dropping()),
    ("layernorm", lambda _: Centred(32).double()),
]


@pytest.mark.parametrize("place, make", MIXERS, ids=lambda v: v if isinstance(v, str) else getattr(v, "__name__", ""))
@pytest.mark.parametrize("kind", ["trunk", "nlvr2"])
def test_modules_that_look_across_tokens(kind, place, make):
    inputs = batch(kind)
    inputs |= {name: torch.ones_like(inputs[name]) for name in ("attention_mask", "pixel_mask")}
    models = pair(kind)
    for model in models:
        parent, _, name = place.rpartition(".")
        holder = trunk_of(model).get_submodule(parent)
        setattr(holder, name, make(getattr(holder, name)))
    assert_follows(kind, models, inputs)


@pytest.mark.parametrize("kind, place", [("masked_lm", "mlm_score.decoder"), ("token_classification", "classifier")])
def test_heads_that_look_across_tokens(kind, place):
    models = pair(kind)
    for model in models:
        mixing(model.get_submodule(place))
    assert_follows(kind, models, batch(kind) | {"attention_mask": torch.ones(4, TEXT)})


def test_an_activation_given_as_a_function():
    for function, kind in ((F.gelu, "gelu"), (torch.tanh, "elementwise"), (lambda x: x / x.norm(dim=-2), None)):
        assert activation_kind(function) == kind


def test_what_is_known_to_be_token_wise():
    class Renamed(nn.Linear):
        pass

    assert is_tokenwise(nn.Linear(2, 2)) and is_tokenwise(Renamed(2, 2))
    assert is_tokenwise(nn.modules.linear.NonDynamicallyQuantizableLinear(2, 2))
    assert not is_tokenwise(Mixing(2, 2)) and not is_tokenwise(Gated(nn.Linear(2, 2))) and not is_tokenwise(nn.Tanh())


def test_a_wrapper_that_is_known(monkeypatch, tmp_path):
    """peft's LoRA by its place and its code; DoRA, a patched forward and an odd part inside it are not known."""
    folder = tmp_path / "peft" / "tuners" / "lora"
    folder.mkdir(parents=True)
    for place in (tmp_path / "peft", tmp_path / "peft" / "tuners", folder):
        (place / "__init__.py").write_text("")
    (folder / "layer.py").write_text(
        textwrap.dedent("""
        from torch import nn

        class Linear(nn.Module):
            def __init__(self, base_layer):
                super().__init__()
                self.base_layer, self.lora_variant, self.use_dora = base_layer, {}, {"default": False}
                self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, 2)}).to(base_layer.weight)
                self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base_layer.out_features)}).to(base_layer.weight)
                self.lora_dropout = nn.ModuleDict({"default": nn.Identity()})

            def forward(self, x):
                more = self.lora_dropout["default"](x)
                return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](more))
    """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        monkeypatch.delitem(sys.modules, name)
    lora = importlib.import_module("peft.tuners.lora.layer").Linear

    models = pair("trunk")
    for model in models:
        for layer in model.encoder.layer:
            torch.manual_seed(0)
            layer.output.dense = lora(layer.output.dense)
    assert all(_block(layer).packable for layer in models[1].encoder.layer)
    for layer in models[1].encoder.layer:
        reason = _block(layer).why_not_plain()
        assert "lora.layer.Linear in place of a linear layer (output.dense): model.merge_and_unload()" in reason
    assert_follows("trunk", models, batch("trunk"))
    for attribute, value in (
        ("lora_variant", {"default": 1}),
        ("use_dora", {"default": True}),
        ("base_layer", Gated(1)),
    ):
        wrapper = lora(nn.Linear(2, 2))
        assert is_tokenwise(wrapper)
        setattr(wrapper, attribute, value)
        assert not is_tokenwise(wrapper)
    monkeypatch.setattr(lora, "forward", scaled(lora.forward))
    assert not any(_block(layer).packable for layer in models[1].encoder.layer)
    assert_follows("trunk", models, batch("trunk"))


def test_every_part_of_a_fresh_model_is_known():
    """Else all would be right, and slow."""
    for kind in ("trunk", "masked_lm"):
        for module in build(kind).modules():
            if not isinstance(module, nn.ModuleList):
                assert genuine.own_methods(type(module)), type(module)
    assert not any(_block(layer).why_not_plain() for layer in build("trunk").encoder.layer)


# --- parameters that are no ordinary tensors --------------------------------------------------------------------------


class Stored(torch.Tensor):
    """A tensor kept in another form, as quantisation libraries keep weights: no memory to read, only operations."""

    @staticmethod
    def __new__(cls, halved):
        return torch.Tensor._make_wrapper_subclass(cls, halved.shape, dtype=halved.dtype, requires_grad=False)

    def __init__(self, halved):
        self.halved = halved

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].halved)
        if function.namespace != "aten":
            raise NotImplementedError(f"no {function} of a Stored: quantisation libraries know torch's own operations")
        plain = tree_map(lambda t: t.halved * 2 if isinstance(t, cls) else t, (args, kwargs or {}))
        return function(*plain[0], **plain[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm, nn.Embedding, nn.Conv2d])
@pytest.mark.parametrize("task", ["trunk", "masked_lm", "nlvr2"])
def test_weights_in_another_form(task, kind, dtype):
    theirs, ours = pair(task, dtype)
    for model in (theirs, ours):
        for module in model.modules():
            if isinstance(module, kind):
                module.weight = nn.Parameter(Stored(module.weight.detach() / 2), requires_grad=False)
    inputs = batch(task, dtype)
    masks = real_positions(theirs, inputs)
    with torch.no_grad():
        for (path, mine), (_, other) in zip(leaves(call(ours, inputs)), leaves(call(theirs, inputs)), strict=True):
            if mine is not None:
                mine, other = (only_real(path, t, masks, task)[0] for t in (mine, other))
                torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())


def test_a_bare_parameter_in_another_form():
    theirs, ours = pair("trunk")
    for model in (theirs, ours):
        embeddings = model.embeddings
        embeddings.position_embeddings = nn.Parameter(Stored(embeddings.position_embeddings.detach() / 2), False)
    with torch.no_grad():
        assert_close(*(call(m, changed()).pooler_output for m in (ours, theirs)))


def test_classes_that_are_gone_are_forgotten():
    def look():
        genuine.own_methods(type("Mine", (nn.Linear,), {}))

    look()
    gc.collect()
    before = len(genuine._codes)
    for _ in range(5):
        look()
    gc.collect()
    assert len(genuine._codes) == before


def test_nothing_is_patched_by_looking():
    before = {name: getattr(nn.Linear, name) for name in genuine.own_methods(nn.Linear)}
    vilt_fast.accelerate(build("trunk"))
    assert before == {name: getattr(nn.Linear, name) for name in before}

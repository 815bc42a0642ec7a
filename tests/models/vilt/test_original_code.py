"""Forks of the original: what has the original's code is computed packed, all else as it is, or refused by name."""

import copy
import importlib.util
import os
import types

import pytest
import torch
from support import checkout, original_vilt
from test_original import assert_same, build, make_batch
from torch import nn

import vilt_fast
from vilt_fast.alignment.align import align
from vilt_fast.models.vilt.published import fingerprint

# `VILT_CHECKOUT=/path/to/ViLT make test` runs the published code beside the stand-in.
ORIGINALS = ["stand-in", *filter(None, [os.environ.get("VILT_CHECKOUT")])]


def drawn_wide(model):
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.double().eval()


def infer(model, batch, **options):
    torch.manual_seed(3)
    return model.infer(batch, **options)


def assert_computed_packed(model, batch, **options):
    """As before in outputs and gradients, and zero where the original computes padding: so it went through us."""
    fast = vilt_fast.accelerate(copy.deepcopy(model), patch_order="reference")
    expected, actual = infer(model, batch, **options), infer(fast, batch, **options)
    assert_same(actual, expected, batch)
    for out in (expected, actual):
        (out["cls_feats"].sum() + (out["text_feats"] * batch["text_masks"][..., None]).square().sum()).backward()
    for (name, p), q in zip(model.named_parameters(), fast.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, msg=name)
    with torch.no_grad():
        assert_same(infer(fast, batch, **options), infer(model, batch, **options), batch)


@pytest.mark.parametrize("original", ORIGINALS)
@pytest.mark.parametrize("max_image_len", [-1, 6])
def test_the_original_is_known(original, max_image_len, monkeypatch):
    if original == "stand-in":
        model = build(max_image_len=max_image_len)
    else:
        model = drawn_wide(checkout.tiny(original, monkeypatch, max_image_len=max_image_len))
    assert_computed_packed(model, make_batch())


# --- methods that must be the original's ------------------------------------------------------------------------------


class Prompted(original_vilt.ViLTransformerSS):
    def infer(
        self, batch, mask_text=False, mask_image=False, image_token_type_idx=1, image_embeds=None, image_masks=None
    ):
        out = self.pooler(self.text_embeddings(batch["text_ids"]))
        return {"cls_feats": out}


class Afterwards(original_vilt.ViLTransformerSS):
    def infer(self, *args, **kwargs):
        out = super().infer(*args, **kwargs)
        out["cls_feats"] = out["cls_feats"] * 2
        return out


class Decorated(original_vilt.ViLTransformerSS):
    infer = torch.no_grad()(original_vilt.ViLTransformerSS.infer)


class PostNorm(original_vilt.Block):
    def forward(self, x, mask=None):
        attended, weights = self.attn(x, mask=mask)
        x = self.norm1(x + attended)
        return self.norm2(x + self.mlp(x)), weights


class Sharper(original_vilt.Attention):
    def forward(self, x, mask=None):
        out, weights = super().forward(x, mask)
        return out * 2, weights


class Gated(original_vilt.Mlp):
    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)) * 0.5)))


class MeanPooler(original_vilt.Pooler):
    def forward(self, hidden):
        return self.activation(self.dense(hidden.mean(1)))


class CalledOtherwise(original_vilt.Pooler):
    def __call__(self, hidden):
        return super().__call__(hidden) * 2


def with_block(kind, part=None):
    def change(model):
        block = model.transformer.blocks[1]
        (block if part is None else getattr(block, part)).__class__ = kind

    return change


def as_class(kind, path=""):
    def change(model):
        model.get_submodule(path).__class__ = kind

    return change


def on_a_pooler(model):
    def forward(self, hidden):
        return self.dense(hidden.mean(1))

    model.pooler.forward = types.MethodType(forward, model.pooler)


FORKS = {
    "Prompted.infer": as_class(Prompted),
    "Afterwards.infer": as_class(Afterwards),
    "Decorated.infer": as_class(Decorated),
    "PostNorm.forward .transformer.blocks.1": as_class(PostNorm, "transformer.blocks.1"),
    "Sharper.forward .transformer.blocks.1.attn": as_class(Sharper, "transformer.blocks.1.attn"),
    "Gated.forward .transformer.blocks.1.mlp": as_class(Gated, "transformer.blocks.1.mlp"),
    "MeanPooler.forward .pooler": as_class(MeanPooler, "pooler"),
    "Pooler.forward .pooler\\) is put in its place": on_a_pooler,
    "CalledOtherwise.forward .pooler": as_class(CalledOtherwise, "pooler"),
}


@pytest.mark.parametrize("name", FORKS)
def test_other_code_is_refused_by_name(name):
    model = build()
    FORKS[name](model)
    before = {path: dict(m.__dict__) for path, m in model.named_modules()}
    with pytest.raises(TypeError, match=name.replace(" .", " \\(") + ".*as it was published"):
        vilt_fast.accelerate(model)
    assert before == {path: dict(m.__dict__) for path, m in model.named_modules()}
    with pytest.raises(TypeError, match="as it was published"):
        align(model, {})


@pytest.mark.parametrize("name", FORKS)
def test_other_code_put_in_afterwards_runs_as_it_is(name):
    model, batch = build(), make_batch()
    fast = vilt_fast.accelerate(copy.deepcopy(model), patch_order="reference")
    infer(fast, batch)
    for m in (model, fast):
        FORKS[name](m)
    expected, actual = infer(model, batch), infer(fast, batch)
    assert torch.equal(actual["cls_feats"], expected["cls_feats"])


def test_a_method_patched_on_its_class_is_seen(monkeypatch):
    model, batch = build(), make_batch()
    fast = vilt_fast.accelerate(copy.deepcopy(model), patch_order="reference")
    own = original_vilt.Mlp.forward
    monkeypatch.setattr(original_vilt.Mlp, "forward", lambda self, x: own(self, x) * 2)
    assert torch.equal(infer(fast, batch)["cls_feats"], infer(model, batch)["cls_feats"])
    with pytest.raises(TypeError, match="Mlp.forward"):
        vilt_fast.accelerate(copy.deepcopy(model))


# --- embeddings may be of any make ------------------------------------------------------------------------------------


class Brighter(original_vilt.VisionTransformer):
    def visual_embed(self, pixels, max_image_len=200, mask_it=False):
        x, mask, index, _ = super().visual_embed(pixels, max_image_len)
        return x * 1.5, mask, index, "labels" if mask_it else None


class Distilled(original_vilt.VisionTransformer):
    """A second token before the patches."""

    def visual_embed(self, pixels, max_image_len=200, mask_it=False):
        x, mask, index, labels = super().visual_embed(pixels, max_image_len, mask_it)
        return torch.cat([x[:, :1] * 0.5, x], dim=1), torch.cat([mask[:, :1], mask], dim=1), index, labels


class Shifted(nn.Module):
    """Positions as RoBERTa counts them, and other names."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(50, 32), nn.Embedding(14, 32)

    def forward(self, ids):
        return self.words(ids) + self.places(torch.arange(2, 2 + ids.shape[1]))


class Squared(original_vilt.PatchEmbed):
    def forward(self, x):
        return super().forward(x).square()


def another_text_embedding(model):
    model.text_embeddings = Shifted()


def dimmer(self, pixels, max_image_len=200, mask_it=False):
    x, *others = type(self).visual_embed(self, pixels, max_image_len, mask_it)
    return x * 0.5, *others


def on_the_instance(model):
    model.transformer.visual_embed = types.MethodType(dimmer, model.transformer)


EMBEDDINGS = {
    "visual_embed": as_class(Brighter, "transformer"),
    "a token more": as_class(Distilled, "transformer"),
    "patch_embed": as_class(Squared, "transformer.patch_embed"),
    "text": another_text_embedding,
    "visual_embed of the instance": on_the_instance,
    "a subclass of BertEmbeddings": lambda model: as_class(
        type("Half", (type(model.text_embeddings),), {"forward": half_text}), "text_embeddings"
    )(model),
    "a hook": lambda model: model.text_embeddings.register_forward_hook(lambda m, i, out: out * 0.5),
}


def half_text(self, ids):
    return super(type(self), self).forward(ids) * 0.5


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_an_embedding_of_another_make_is_called_itself(name):
    model = build()
    EMBEDDINGS[name](model)
    assert_computed_packed(drawn_wide(model), make_batch())


def test_masked_patches_are_the_modules_own_business():
    model = build()
    as_class(Brighter, "transformer")(model)
    assert infer(vilt_fast.accelerate(model), make_batch(), mask_image=True)["image_labels"] == "labels"


def test_images_of_more_than_patches_are_not_aligned():
    model = build()
    as_class(Distilled, "transformer")(model)
    batch = make_batch()
    with pytest.raises(TypeError, match=r"Distilled.visual_embed gives 17 image tokens for 15 patches"):
        align(model.float(), batch | {"image": [batch["image"][0].float()]})


def test_a_position_table_of_another_size_is_an_error_as_before():
    model = build()
    model.transformer.pos_embed = nn.Parameter(torch.randn(1, 26, 32, dtype=torch.float64))
    with pytest.raises(RuntimeError):
        infer(model, make_batch())
    with pytest.raises(RuntimeError):
        infer(vilt_fast.accelerate(model), make_batch())


def test_a_block_called_itself_is_given_the_masks_as_the_original_gives_them():
    model, batch = build(), make_batch()
    seen = []
    model.transformer.blocks[1].register_forward_pre_hook(lambda m, a, k: seen.append(k["mask"]), with_kwargs=True)
    infer(model, batch)
    infer(vilt_fast.accelerate(model, patch_order="reference"), batch)
    assert seen[0].dtype == seen[1].dtype and torch.equal(*seen)


# --- what a fingerprint sees ------------------------------------------------------------------------------------------

SOURCE = """
from torch.nn import functional as F

def forward(self, x, mask=None):
    return F.gelu(self.fc1(x) + 1)
"""


def written(tmp_path, source, name="forward"):
    file = tmp_path / f"made_{len(list(tmp_path.iterdir()))}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name), file


def test_a_fingerprint_is_of_what_is_computed(tmp_path):
    found = fingerprint(written(tmp_path, SOURCE)[0])
    assert found
    same = [
        SOURCE.replace("self, x,", "self, x: 'Tensor',").replace("return", '"""Text."""\n    # why\n    return'),
        SOURCE.replace("F.gelu", "fn.gelu").replace("as F", "as fn"),
        SOURCE.replace("(self.fc1(x) + 1)", "(\n        self.fc1(x)  +  1,\n    )"),
        SOURCE.replace("def", "class Mine:\n    def").replace("    return", "        return")
        + "forward = Mine.forward",
    ]
    for source in same:
        assert fingerprint(written(tmp_path, source)[0]) == found
    other = [
        SOURCE.replace("+ 1", "- 1"),
        SOURCE.replace("+ 1", "+ 2"),
        SOURCE.replace("fc1", "fc2"),
        SOURCE.replace("mask=None", "mask=1"),
        SOURCE.replace("from torch.nn import functional as F", "from torch import special as F"),
        SOURCE.replace("def ", "import functools\n@functools.lru_cache\ndef "),
        SOURCE.replace("(x) + 1", "(x) + 1 * len(x)") + "\ndef len(x):\n    return 2\n",
    ]
    marks = [fingerprint(getattr(f, "__wrapped__", f)) for f, _ in (written(tmp_path, source) for source in other)]
    assert found not in marks and len(set(marks)) == len(marks)


def test_a_source_that_is_not_what_runs_is_not_believed(tmp_path):
    function, file = written(tmp_path, SOURCE)
    file.write_text(SOURCE.replace("+ 1", "+ 3"))
    assert fingerprint(function) == ""
    file.unlink()
    assert fingerprint(function) == ""
    names = {}
    exec(SOURCE, names)
    assert fingerprint(names["forward"]) == ""

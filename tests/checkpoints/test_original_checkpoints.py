"""Checkpoints of the original, read and written: outputs against its stand-in, bits against the file, hostile files."""

import os
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from support import original_heads as original
from torch import nn
from transformers import (
    ViltForImageAndTextRetrieval,
    ViltForImagesAndTextClassification,
    ViltForMaskedLM,
    ViltForQuestionAnswering,
    ViltModel,
)

import vilt_fast
from vilt_fast.checkpoints.lightning import Unknown, open_checkpoint
from vilt_fast.objectives import ViltForPreTraining, pretraining_loss

KINDS = {
    ("mlm_score", "itm_score"): ViltForPreTraining,
    ("mlm_score",): ViltForMaskedLM,
    ("vqa_classifier",): ViltForQuestionAnswering,
    ("nlvr2_classifier",): ViltForImagesAndTextClassification,
    ("itm_score", "rank_output"): ViltForImageAndTextRetrieval,
    (): ViltModel,
}


def written(tmp_path, *heads, hyper=None, legacy=False, **sizes):
    """(the original, a file of it)."""
    model = original.build(*heads, **sizes)
    path = original.lightning_file(tmp_path / "model.ckpt", original.state_of(model), hyper, legacy=legacy)
    return model, path


def inputs():
    """(the original's batch, HuggingFace's) of the same ragged samples, two images each."""
    torch.manual_seed(1)
    pixels, masks = [torch.zeros(3, 3, 48, 80, dtype=torch.float64) for _ in range(2)], []
    for image, grids in zip(pixels, ([(3, 5), (2, 4), (1, 1)], [(3, 5), (1, 2), (3, 3)]), strict=True):
        masks.append(torch.zeros(3, 48, 80, dtype=torch.long))
        for b, (h, w) in enumerate(grids):
            image[b, :, : h * 16, : w * 16] = torch.randn(3, h * 16, w * 16, dtype=torch.float64)
            masks[-1][b, : h * 16, : w * 16] = 1
    ids, attention = torch.randint(1, 50, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    attention[1, 5:] = 0
    labels = torch.full_like(ids, -100)
    theirs = {"text_ids": ids, "text_labels": labels, "text_masks": attention, "image_0": pixels[:1],
              "image_1": pixels[1:]}  # fmt: skip
    ours = {"input_ids": ids, "attention_mask": attention, "pixel_values": pixels[0], "pixel_mask": masks[0]}
    return theirs, ours, (torch.stack(pixels, 1), torch.stack(masks, 1))


@pytest.mark.parametrize("heads", KINDS, ids=lambda heads: "+".join(heads) or "no head")
def test_outputs_are_the_original_s(heads, tmp_path):
    theirs, path = written(tmp_path, *heads)
    model = vilt_fast.load_original(path)
    assert type(model) is KINDS[heads] and not model.training
    assert "accelerated by vilt_fast" in repr(model)
    batch, ours, images = inputs()
    expected = theirs.infer(batch)
    pooled, text = expected["cls_feats"], expected["text_feats"]
    with torch.no_grad():
        if heads == ("nlvr2_classifier",):
            second = theirs.infer(batch, image_token_type_idx=2)["cls_feats"]
            want = [(model(**ours | dict(zip(("pixel_values", "pixel_mask"), images, strict=True))).logits,
                     theirs.nlvr2_classifier(torch.cat([pooled, second], -1)))]  # fmt: skip
        elif "mlm_score" in heads:
            out = model(**ours)
            real = ours["attention_mask"].bool()
            logits = out.mlm_logits if "itm_score" in heads else out.logits
            want = [(logits[real], theirs.mlm_score(text)[real])]
            if "itm_score" in heads:
                want.append((out.itm_logits, theirs.itm_score(pooled)))
        elif heads:
            head = theirs.vqa_classifier if heads == ("vqa_classifier",) else theirs.rank_output
            want = [(model(**ours).logits, head(pooled))]
        else:
            want = [(model(**ours).pooler_output, pooled)]
    for got, exact in want:
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("heads", KINDS, ids=lambda heads: "+".join(heads) or "no head")
def test_there_and_back_is_bitwise(heads, legacy, tmp_path):
    theirs, path = written(tmp_path, *heads, legacy=legacy)
    model = vilt_fast.load_original(path)
    vilt_fast.save_original(model, tmp_path / "again.ckpt")
    again = torch.load(tmp_path / "again.ckpt", weights_only=True)
    want = original.state_of(theirs)
    assert again["state_dict"].keys() == want.keys()
    assert all(torch.equal(again["state_dict"][name], tensor) for name, tensor in want.items())
    theirs.load_state_dict({k: v for k, v in again["state_dict"].items() if k != "text_embeddings.position_ids"})
    config = again["hyper_parameters"]["config"]
    assert (config["num_heads"], config["max_text_len"], config["max_image_len"]) == (4, 12, -1)
    assert (config["drop_rate"], config["num_layers"], config["mlp_ratio"], config["patch_size"]) == (0.1, 3, 2, 16)
    named = {"itm_score": "itm", "mlm_score": "mlm", "vqa_classifier": "vqa", "nlvr2_classifier": "nlvr2",
             "rank_output": "irtr"}  # fmt: skip
    assert {task for task, weight in config["loss_names"].items() if weight} == {named[head] for head in heads}
    second = vilt_fast.load_original(tmp_path / "again.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(second.parameters(), model.parameters(), strict=True))


def test_eps_decoder_and_what_training_reads(tmp_path):
    _, path = written(tmp_path, "mlm_score", "itm_score", hyper=original.config(max_image_len=6))
    model = vilt_fast.load_original(path, config={"drop_rate": 0.25}, patch_order="reference")
    eps = {name: module.eps for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    assert {e for name, e in eps.items() if "encoder.layer" in name or name == "vilt.layernorm"} == {1e-6}
    assert eps["vilt.embeddings.text_embeddings.LayerNorm"] == eps["mlm_score.transform.LayerNorm"] == 1e-12
    words, decoder = model.vilt.embeddings.text_embeddings.word_embeddings.weight, model.mlm_score.decoder.weight
    assert words is not decoder and not torch.equal(words, decoder)
    assert model.config.max_image_length == 6 and model.config.hidden_dropout_prob == 0.25
    assert model.config.attention_probs_dropout_prob == 0 and model.vilt.forward.options.patch_order == "reference"
    model.save_pretrained(tmp_path / "hf")  # both matrices are kept
    again = ViltForPreTraining.from_pretrained(tmp_path / "hf")
    assert torch.equal(again.mlm_score.decoder.weight.double(), decoder.float().double())
    assert not torch.equal(again.vilt.embeddings.text_embeddings.word_embeddings.weight, again.mlm_score.decoder.weight)
    model.tie_weights()
    assert model.mlm_score.decoder.weight is not model.vilt.embeddings.text_embeddings.word_embeddings.weight


def test_a_model_of_huggingface_s_goes_there_too(tmp_path):
    from support.models import build

    model = vilt_fast.accelerate(build("masked_lm"))
    with pytest.warns(UserWarning, match="eps 1e-12; the original computes with 1e-06"):
        vilt_fast.save_original(model, tmp_path / "mine.ckpt", config={"seed": 3})
    saved = torch.load(tmp_path / "mine.ckpt", weights_only=True)
    state = saved["state_dict"]
    assert torch.equal(state["mlm_score.decoder.weight"], state["text_embeddings.word_embeddings.weight"])
    assert saved["hyper_parameters"]["config"]["seed"] == 3
    for other in (build("token_classification"), nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="no counterpart of a (ViltForTokenClassification|Linear)"):
            vilt_fast.save_original(other, tmp_path / "mine.ckpt")


def test_the_original_s_losses_at_its_own_eps(tmp_path):
    """Masked tokens and matching of the stand-in, written as the original has them, with every gradient."""
    theirs, path = written(tmp_path, "mlm_score", "itm_score", hyper=original.config(drop_rate=0.0))
    model = vilt_fast.load_original(path).train()
    batch, ours, images = inputs()
    labels, keeps = batch["text_labels"].clone(), torch.tensor([0, 1, 0])
    labels[0, 2], labels[1, 3] = 7, 9
    ours |= {"mlm_input_ids": ours["input_ids"].masked_fill(labels != -100, 3), "labels": labels,
             "false_pixel_values": images[0][:, 1], "false_pixel_mask": images[1][:, 1],
             "itm_labels": keeps}  # fmt: skip
    out = pretraining_loss(model, ours, weights={"wpa": 0})
    masked = batch | {"text_ids_mlm": ours["mlm_input_ids"], "text_labels_mlm": labels}
    logits = theirs.mlm_score(theirs.infer(masked, mask_text=True)["text_feats"])
    mlm = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    chosen = torch.where(keeps[:, None, None, None] == 1, batch["image_0"][0], batch["image_1"][0])
    itm = nn.functional.cross_entropy(theirs.itm_score(theirs.infer(batch | {"image_0": [chosen]})["cls_feats"]), keeps)
    torch.testing.assert_close((out.mlm_loss, out.itm_loss), (mlm, itm), rtol=1e-12, atol=0)
    (mlm + itm).backward()
    out.loss.backward()
    gradients = vilt_fast.checkpoints.original._table(model)
    want = {name: p.grad for name, p in theirs.named_parameters()}
    for name, source in gradients.items():
        exact = want[source] if isinstance(source, str) else want[source[0]].chunk(3)[source[1]]
        torch.testing.assert_close(model.get_parameter(name).grad, exact, rtol=1e-9, atol=1e-12, msg=name)


# --- files that are not what they should be ---------------------------------------------------------------------------


class Malicious:
    """Runs `name` of `module` when it is unpickled."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("where", ["callbacks", "state_dict", "hyper_parameters", "config"])
def test_nothing_that_is_pickled_runs(where, legacy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attacks = [
        Malicious(os.system, "touch ran"), Malicious(eval, "open('ran', 'w')"), Malicious(exec, "open('ran', 'w')"),
        Malicious(__import__, "this"), Malicious(open, "ran", "w"),
        Malicious(getattr, Malicious(__import__, "os"), "system"),
    ]  # fmt: skip
    model = original.build("mlm_score", "itm_score")
    state, hyper = original.state_of(model), original.config()
    found = {"state_dict": state, "hyper_parameters": {"config": hyper}, "callbacks": {}}
    sys.modules.pop("this", None)
    if where == "state_dict":
        state["transformer.norm.weight"] = attacks
    else:
        (hyper if where == "config" else found[where])["more"] = attacks
    torch.save(found, "bad.ckpt", _use_new_zipfile_serialization=not legacy)
    if where == "state_dict":
        with pytest.raises(ValueError, match="transformer.norm.weight in its state_dict is no tensor"):
            vilt_fast.load_original("bad.ckpt")
    else:
        vilt_fast.load_original("bad.ckpt")
    inside = open_checkpoint("bad.ckpt")
    assert where == "state_dict" or all(isinstance(x, Unknown) for x in _inside(inside, where))
    assert not os.path.exists("ran") and "this" not in sys.modules


def _inside(found, where):
    return (found["hyper_parameters"]["config"] if where == "config" else found[where])["more"]


def test_a_pickle_written_by_hand_changes_nobody_s_functions(tmp_path):
    """BUILD and REDUCE on the few names that are looked up reach nothing outside the file."""
    rebuild = torch._utils._rebuild_tensor_v2
    before = dict(vars(rebuild)), rebuild.__defaults__
    for name in ("torch._utils\n_rebuild_tensor_v2", "collections\nOrderedDict", "torch\nload"):
        attack = (
            b"\x80\x02c" + name.encode() + b"\n}X\x01\x00\x00\x00aK\x01sN}X\x0c\x00\x00\x00__defaults__K\x05\x85s\x86b."
        )
        path = tmp_path / "hand.ckpt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("hand/data.pkl", attack)
            archive.writestr("hand/version", "3\n")
        with pytest.raises(ValueError, match="hand.ckpt"):
            vilt_fast.load_original(path)
    assert (dict(vars(rebuild)), rebuild.__defaults__) == before


def test_files_that_are_no_checkpoints(tmp_path):
    path = tmp_path / "no.ckpt"
    with pytest.raises(OSError):
        vilt_fast.load_original(path)
    whole = written(tmp_path, "rank_output")[1].read_bytes()
    for content in (b"", b"<html>not found</html>", whole[: len(whole) // 2], pickle.dumps({"state_dict": 1})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="no.ckpt"):
            vilt_fast.load_original(path)
    for held, message in (([1], "no dictionary"), ({"model": {}}, "no state_dict: it holds model"),
                          ({"state_dict": {3: 4}}, "no state_dict")):  # fmt: skip
        torch.save(held, path)
        with pytest.raises(ValueError, match=message):
            vilt_fast.load_original(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("no/constants.pkl", pickle.dumps(()))
    with pytest.raises(ValueError, match="TorchScript program"):
        vilt_fast.load_original(path)


BAD = {
    "another architecture": (lambda s: OrderedDict(nn.TransformerEncoderLayer(8, 2).state_dict()), {}, "is no ViLT: it "
                             "has no pooler.dense.bias, .* it has self_attn.in_proj_weight"),
    "a part is missing": (lambda s: s.pop("transformer.blocks.1.attn.qkv.bias") is None or s, {},
                          "it has no transformer.blocks.1.attn.qkv.bias;"),
    "a block is missing": (lambda s: OrderedDict((k, v) for k, v in s.items() if "blocks.1." not in k), {},
                           "it has no transformer.blocks.1.attn"),
    "a head is missing": (lambda s: OrderedDict((k, v) for k, v in s.items() if "mlm_score" not in k), {},
                          "it has no mlm_score.bias, mlm_score.decoder.weight"),
    "a part too many": (lambda s: s | {"transformer.pre_norm.weight": torch.ones(32)}, {},
                        "no place for: transformer.pre_norm.weight"),
    "another size": (lambda s: s | {"mlm_score.bias": torch.ones(49)}, {},
                     r"mlm_score.bias is \[49\], expected \[50\]"),
    "a table that is no square": (lambda s: s | {"transformer.pos_embed": torch.ones(1, 16, 32)}, {}, "in a square"),
    "rows that are no thirds": (lambda s: s | {"transformer.blocks.0.attn.qkv.bias": torch.ones(95)}, {},
                                r"qkv.bias is \[95\], expected three times"),
    "DeiT": (lambda s: s, {"vit": "vit_deit_base_distilled_patch16_384"}, "a distillation token"),
    "no number of heads": (lambda s: s, {"num_heads": None}, r"pass config=dict\(num_heads=...\)"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_checkpoints_that_do_not_fit(what, tmp_path):
    change, hyper, message = BAD[what]
    state = change(original.state_of(original.build("mlm_score", "itm_score")))
    known = {k: v for k, v in (original.config() | hyper).items() if v is not None}
    path = original.lightning_file(tmp_path / "other.ckpt", state, known)
    with pytest.raises(ValueError, match=message) as error:
        vilt_fast.load_original(path)
    assert "other.ckpt" in str(error.value) and len(str(error.value)) < 1000


def test_another_table_and_heads_by_hand(tmp_path):
    theirs, path = written(tmp_path, "vqa_classifier", hyper={}, image=96)
    model = vilt_fast.load_original(path, config={"num_heads": 4})
    assert model.config.image_size == 96 and model.config.num_labels == original.ANSWERS
    batch, ours, _ = inputs()
    with torch.no_grad():
        torch.testing.assert_close(model(**ours).logits, theirs.vqa_classifier(theirs.infer(batch)["cls_feats"]))


def test_its_page(tmp_path, monkeypatch):
    """The lines of docs/original.md that need no repository, word for word; the others are Python."""
    page = (Path(__file__).parents[2] / "docs" / "original.md").read_text(encoding="utf-8")
    shims, lines = re.findall(r"```python\n(.*?)```", page, re.S)
    compile(shims, "shims.py", "exec")
    written(tmp_path, "mlm_score", "itm_score")[1].rename(tmp_path / "vilt_200k_mlm_itm.ckpt")
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    assert (tmp_path / "back.ckpt").is_file()

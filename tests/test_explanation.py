"""What `explain` and the log say, held against what was seen to be called from outside: by a profiler, which changes
nothing that the engine looks at, and by the launchers that the registry handed out."""

import contextlib
import copy
import logging
import re
import sys
import warnings

import pytest
import torch
from support import readme
from support.changes import LoRA
from support.models import batch, build, trunk_of
from support.original_vilt import ViLTransformerSS
from torch import nn
from transformers.models.vilt import modeling_vilt as hf

import vilt_fast
from vilt_fast import functional
from vilt_fast.engine import blocks
from vilt_fast.functional import LayerParameters
from vilt_fast.ops import registry

LAYERS = 4


class Seen:
    """What was called while this watched."""

    def __init__(self):
        self.forwards = []  # (module, first tensor) of each call of a module
        self.native = []  # what each block of the fused encoder computed with
        self.launched = set()

    def of(self, module):
        return [given for other, given in self.forwards if other is module]

    def linears_of(self, module):
        return any(self.of(inner) for inner in module.modules() if isinstance(inner, nn.Linear))


@contextlib.contextmanager
def watched(monkeypatch):
    seen, launcher, encoder = Seen(), registry.launcher, functional.encoder

    def profile(frame, event, _):
        module = frame.f_locals.get("self") if event == "call" and frame.f_code.co_name == "forward" else None
        if isinstance(module, nn.Module):
            given = [v for name, v in frame.f_locals.items() if name != "self" and isinstance(v, torch.Tensor)]
            seen.forwards.append((module, given[0].shape if given else None))

    def launched(op, backend):
        seen.launched.add((op, backend))
        return launcher(op, backend)

    def counted(rows, parameters, *args, **kwargs):
        seen.native.extend([kwargs["compute"]] * len(LayerParameters.layers(parameters)))
        return encoder(rows, parameters, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(registry, "launcher", launched)
        patch.setattr(functional, "encoder", counted)
        sys.setprofile(profile)
        try:
            yield seen
        finally:
            sys.setprofile(None)


def assert_true(explanation, model, seen):
    """Each row, of what was seen; and every launcher that was called is in some row, by its name."""
    modules, blocks = dict(model.named_modules()), []
    for row in explanation.rows:
        module = modules[row.module]
        if row.part.startswith("block "):
            blocks.append(row)
            assert bool(seen.of(module)) == (row.way == "padded"), row
            assert (seen.linears_of(module) or "linear" in row.ops) == (row.way in ("padded", "packed")), row
            assert ("encoder" in row.ops) == row.way.startswith("native"), row
            assert ("linear_fp8" in row.ops) == (row.way == "packed fp8"), row
        elif row.part in ("embedding", "head", "whole trunk"):
            own = isinstance(module, hf.ViltPreTrainedModel) or row.part == "embedding"
            assert bool(seen.of(module)) == (row.way in ("padded", "own")) or not own, row
        elif row.part in ("text embedding", "image embedding"):
            assert not seen.of(module), row
        else:  # final norm: rows [N, D]; pooler: [B, 1, D]
            padded = any(len(shape) == 3 and shape[1] > 1 for shape in seen.of(module))
            assert padded == (row.way == "padded"), row
    natively = [row.way for row in blocks if row.way.startswith("native")]
    assert natively == ["native int8" if compute == "int8" else "native" for compute in seen.native]
    named = {(op, one) for row in explanation.rows for op, which in row.ops.items() for one in which.split(" and ")}
    assert named == {(op, backend) for op, backend in seen.launched if not op.startswith(("quantize", "fingerprint"))}


def layer(model, i):
    return trunk_of(model).encoder.layer[i]


def listener(*_):
    pass


def hooked(model):
    layer(model, 1).attention.output.register_forward_hook(listener)


def pre_hooked(model):
    layer(model, 1).register_forward_pre_hook(listener)


def wrapped(model):
    layer(model, 1).output.dense = LoRA(layer(model, 1).output.dense)


def replaced(model):
    layer(model, 1).output.forward = lambda *args: hf.ViltOutput.forward(layer(model, 1).output, *args)


def other_activation(model):
    for i in (1, 2):
        layer(model, i).intermediate.intermediate_act_fn = nn.ReLU()


def embedding_hooked(model):
    trunk_of(model).embeddings.patch_embeddings.register_forward_hook(listener)


def encoder_hooked(model):
    trunk_of(model).encoder.register_forward_hook(listener)


def trunk_hooked(model):
    trunk_of(model).register_forward_hook(listener)


def ends_hooked(model):
    trunk_of(model).layernorm.register_forward_hook(listener)
    trunk_of(model).pooler.dense.register_forward_hook(listener)


def head_hooked(model):
    model.mlm_score.transform.register_forward_hook(listener)


def with_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    model.train()


def nothing(model):
    pass


CASES = {
    "plain": (nothing, {}, {}, {}),
    "bfloat16": (nothing, {}, {}, {"dtype": torch.bfloat16}),
    "float16": (nothing, {}, {"block 0": "float16, not float32 or bfloat16"}, {"dtype": torch.float16}),
    "int8": (nothing, {"quantize": "int8"}, {}, {}),
    "fp8": (nothing, {"quantize": "fp8"}, {"block 2": "emulated here, with no gain: the tensors are on cpu"}, {}),
    "int8 in float16": (nothing, {"quantize": "int8"}, {"block 3": "float16"}, {"dtype": torch.float16}),
    "a hook": (hooked, {}, {"block 1": r"a forward hook \(listener\) listens to calls of its attention.output"}, {}),
    "a pre-hook": (pre_hooked, {"quantize": "int8"}, {"block 1": r"a forward pre-hook \(listener\) listens"}, {}),
    "a wrapped linear": (wrapped, {}, {"block 1": r"a LoRA in place of a linear layer \(output.dense\)"}, {}),
    "a method on the instance": (replaced, {}, {"block 1": "forward of a ViltOutput is replaced on the instance"}, {}),
    "another activation": (other_activation, {}, {"block 2": "its activation is not the exact GELU"}, {}),
    "a hook on the embedding": (embedding_hooked, {}, {"embedding": "listens to calls of its patch_embeddings"}, {}),
    "a hook on the encoder": (encoder_hooked, {}, {"blocks": "a forward hook"}, {}),
    "a hook on the trunk": (trunk_hooked, {}, {"head": "of ViltModel: a forward hook"}, {"kind": "question_answering"}),
    "hooks after the blocks": (ends_hooked, {}, {"final norm": "a forward hook", "pooler": "calls of its dense"}, {}),
    "a hook on the head": (head_hooked, {}, {"head": "calls of its transform"}, {"kind": "masked_lm"}),
    "two images": (nothing, {}, {}, {"kind": "nlvr2"}),
    "two images, one by one": (hooked, {}, {"head": "of ViltEncoder: a forward hook"}, {"kind": "nlvr2"}),
    "attentions": (nothing, {}, {"block 0": "attention probabilities are wanted"}, {"output_attentions": True}),
    "training": (nn.Module.train, {}, {"block 0": "gradients are recorded|train"}, {"grad": True}),
    "dropout": (with_dropout, {}, {"block 0": "in training mode, with dropout"}, {}),
    "autocast": (nothing, {}, {"block 0": "autocast computes in torch.float16"}, {"autocast": torch.float16}),
}


def make(kind="question_answering", dtype=torch.float32, **options):
    return vilt_fast.accelerate(build(kind, dtype, num_hidden_layers=LAYERS), **options)


@pytest.mark.filterwarnings("ignore:vilt_fast")
@pytest.mark.parametrize("case", CASES)
def test_what_is_said_is_what_was_called(case, monkeypatch):
    change, options, reasons, more = CASES[case]
    more = {"kind": "trunk", "dtype": torch.float32, "grad": False, "autocast": None} | more
    kind, dtype, grad, autocast = (more.pop(name) for name in ("kind", "dtype", "grad", "autocast"))
    model = make(kind, dtype, **options)
    change(model)
    inputs = batch(kind, dtype) | more
    with torch.set_grad_enabled(grad), torch.autocast("cpu", autocast, enabled=autocast is not None):
        with watched(monkeypatch) as seen:
            explanation = vilt_fast.explain(model, **inputs)
        foretold = vilt_fast.explain(model)
    assert explanation.called and not foretold.called
    assert_true(explanation, model, seen)
    rows = {row.part: row for row in explanation.rows}
    for part, reason in reasons.items():
        assert re.search(reason, rows[part].why), rows[part]
    usual = {row.part for row in explanation.rows if row.way in ("native", "native int8")}
    assert not any(rows[part].why for part in usual)
    if not more:  # what is asked of a call is not known before
        ways = {row.part: (row.way, row.why) for row in explanation.rows if "embedding" not in row.part}
        assert ways == {row.part: (row.way, row.why) for row in foretold.rows if "embedding" not in row.part}


# --- what is not accelerated, or not seen -----------------------------------------------------------------------------


def test_a_model_that_is_not_accelerated_is_told_how():
    model = build("question_answering", torch.float32)
    before = [row.module for row in vilt_fast.explain(model, **batch("question_answering", torch.float32)).rows]
    assert before == ["vilt", ""]
    for row in vilt_fast.explain(model).rows:
        assert row.way == "own" and row.why == "it is not accelerated: call vilt_fast.accelerate(model)"
    vilt_fast.accelerate(model.vilt)
    assert {row.part: row.way for row in vilt_fast.explain(model).rows}["head"] == "own"


def test_what_contains_no_vilt_is_told_so():
    (row,) = vilt_fast.explain(nn.Linear(2, 2)).rows
    assert row.way == "own" and "contains no ViLT model" in row.why
    with pytest.raises(TypeError, match="takes a torch.nn.Module, got str"):
        vilt_fast.explain("a model")


def test_a_subclass_that_keeps_its_forward_is_named():
    class Mine(hf.ViltForMaskedLM):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model = vilt_fast.accelerate(Mine(build("masked_lm").config).eval())
    with torch.no_grad():
        *trunk, head = vilt_fast.explain(model, **batch("masked_lm", torch.float32)).rows
    assert head.part == "head" and head.way == "own" and "Mine overrides forward of ViltForMaskedLM" in head.why
    assert {row.way for row in trunk} == {"packed", "native"}


def test_what_is_not_seen_to_be_called_is_not_guessed_at():
    class Elsewhere(nn.Module):
        def __init__(self):
            super().__init__()
            self.vilt = make("trunk")

        def forward(self, x):
            return x

    (row,) = vilt_fast.explain(Elsewhere(), torch.ones(1)).rows
    assert row.way == "not called" and "torch.compile runs what it traced" in row.why


@pytest.mark.parametrize("taken, way, why", [
    ("blocks", "padded", "a forward hook"), ("infer", "own", "ViLTransformerSS.infer"), ("", "native", ""),
])  # fmt: skip
def test_the_original(taken, way, why, monkeypatch):
    model = vilt_fast.accelerate(ViLTransformerSS().eval())
    if taken == "blocks":
        model.transformer.blocks[0].register_forward_hook(listener)
    if taken == "infer":
        infer = ViLTransformerSS.infer
        monkeypatch.setattr(ViLTransformerSS, "infer", lambda self, *args: infer(self, *args))
    ids = torch.ones(2, 5, dtype=torch.long)
    given = {"text_ids": ids, "text_masks": ids, "text_labels": ids, "image": [torch.rand(2, 3, 48, 48)]}
    with torch.no_grad():
        explanation = vilt_fast.explain(model, given)
        foretold = vilt_fast.explain(model)
    rows = {row.part: row for row in explanation.rows}
    row = rows["infer" if taken == "infer" else "block 0"]
    assert row.way == way and why in row.why
    assert [(r.way, r.why) for r in explanation.rows] == [(r.way, r.why) for r in foretold.rows]
    if taken != "infer":
        assert [r.module for r in explanation.rows][-4:] == [
            "transformer.blocks.1", "transformer.blocks.2", "transformer.norm", "pooler"
        ]  # fmt: skip


# --- why --------------------------------------------------------------------------------------------------------------


def test_a_replaced_function_is_named(monkeypatch):
    model, linear = make("trunk"), torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: linear(*args))
    with torch.no_grad():
        rows = {row.part: row for row in vilt_fast.explain(model, **batch("trunk", torch.float32)).rows}
    assert rows["block 0"].way == "padded" and "torch.nn.functional.linear is not as torch" in rows["block 0"].why


def test_a_missing_native_library_is_named(monkeypatch):
    model = make("trunk")
    monkeypatch.setitem(sys.modules, "vilt_fast._C", None)
    monkeypatch.delattr(vilt_fast, "_C", raising=False)
    with torch.no_grad():
        rows = {row.part: row for row in vilt_fast.explain(model, **batch("trunk", torch.float32)).rows}
    for part in ("block 0", "image embedding"):
        assert rows[part].way == "packed" and "vilt_fast._C is not built; pip install . with a C++" in rows[part].why
    assert rows["block 0"].ops["attention"] == "torch" and "is not built" in rows["block 0"].why_ops["attention"]


def test_all_reasons_are_given_at_once():
    model = make("trunk").train()
    other_activation(model)
    rows = {row.part: row for row in vilt_fast.explain(model, **batch("trunk", torch.float32)).rows}
    assert re.search(r"(gradients|training).*; and its activation is not", rows["block 1"].why)


# --- as text ----------------------------------------------------------------------------------------------------------


def test_the_table_has_a_line_for_blocks_that_went_the_same_way():
    model = make()
    layer(model, 3).output.register_forward_hook(listener)
    with torch.no_grad():
        table = str(vilt_fast.explain(model, **batch("question_answering", torch.float32))).splitlines()
    assert [line.split("  ")[0] for line in table if not line.startswith(" ")] == [
        "part", "text embedding", "image embedding", "blocks 0-2", "block 3", "final norm", "pooler", "head"
    ]  # fmt: skip
    assert re.search(r"vilt\.encoder\.layer\.0-2 +native \(encoder: cpp\)$", table[3])
    assert re.fullmatch(r" +because a forward hook \(listener\) listens to calls of its output", table[5])
    assert "Nothing was run" in str(vilt_fast.explain(model))


def test_the_table_in_the_readme_is_what_is_said(monkeypatch):
    known = blocks.is_tokenwise  # of peft's LoRA, which has more parts than the one here, as of a linear layer
    monkeypatch.setattr(blocks, "is_tokenwise", lambda module: isinstance(module, LoRA) or known(module))
    model = vilt_fast.accelerate(build("question_answering", torch.float32, num_hidden_layers=12))
    for i in (10, 11):
        attention = layer(model, i).attention.attention
        attention.query = LoRA(attention.query)
    layer(model, 3).attention.register_forward_hook(listener)
    with torch.no_grad():
        found = str(vilt_fast.explain(model, **batch("question_answering", torch.float32)))
    (shown,) = re.findall(r"```\n(part .*?)```", (readme.ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    said, told = (
        [re.split(" {2,}", line)[::2] for line in table.splitlines() if line[0] != " "] for table in (found, shown)
    )
    assert said == told


def test_the_log_says_a_way_once(caplog):
    model, inputs = make(), batch("question_answering", torch.float32)
    with torch.no_grad():
        model(**inputs)
        assert not caplog.records
        with caplog.at_level(logging.DEBUG, logger="vilt_fast"):
            model(**inputs)
            first = caplog.messages
            assert "ViltForQuestionAnswering: blocks 0-3 (vilt.encoder.layer.0-3): native (encoder: cpp)" in first
            model(**inputs)
            copy.deepcopy(model)
            assert caplog.messages == first
            caplog.clear()
            handle = layer(model, 2).register_forward_hook(listener)
            for _ in range(2):
                model(**inputs)
            (only,) = caplog.messages
            assert re.search(r"block 2 \(vilt.encoder.layer.2\): padded, because a forward hook \(listener\)", only)
            caplog.clear()
            handle.remove()
            model(**inputs)
            (only,) = caplog.messages
            assert "block 2 (vilt.encoder.layer.2): native" in only


def test_the_log_takes_copies_of_weights_for_no_change(caplog):
    model = make("trunk", quantize="int8")
    with torch.no_grad(), caplog.at_level(logging.DEBUG, logger="vilt_fast"):
        model(**batch("trunk", torch.float32))
        first = caplog.messages
        model(**batch("trunk", torch.float32))
        assert caplog.messages == first


def test_explaining_changes_nothing():
    model, inputs = make(quantize="int8"), batch("question_answering", torch.float32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        before = model(**inputs).logits
        vilt_fast.explain(model, **inputs)
        assert torch.equal(model(**inputs).logits, before)

"""Which way a block takes: native runs on both sides of a block that cannot be, and what is said of lost options."""

import re
import warnings

import pytest
import torch
from support.changes import LoRA
from support.models import batch, build
from torch import nn

import vilt_fast
from vilt_fast.engine import blocks
from vilt_fast.engine import encode as engine
from vilt_fast.testing import assert_within_budget

LAYERS = 4


@pytest.mark.core
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("place", [0, 2, LAYERS - 1])
def test_native_runs_lie_on_both_sides_of_a_wrapped_layer(native_blocks, place, precision, hidden):
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    quantize = "int8" if precision == "int8" else None
    plain, ours = (build("trunk", dtype, num_hidden_layers=LAYERS) for _ in range(2))
    exact = build("trunk", num_hidden_layers=LAYERS)
    for model in (plain, ours, exact):
        output = model.encoder.layer[place].attention.output
        output.dense = LoRA(output.dense)
    vilt_fast.accelerate(ours, quantize=quantize, patch_order="reference")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = []
        for model in (ours, plain, exact):
            torch.manual_seed(3)
            inputs = batch("trunk", next(model.parameters()).dtype)
            results.append(model(**inputs, output_hidden_states=hidden))
    assert native_blocks == [precision] * (LAYERS - 1), "all blocks but the wrapped one"
    got, near, want = (r.pooler_output for r in results)
    if quantize:
        assert (got.double() - want).norm() < 0.1 * want.norm()
    else:
        assert_within_budget(got, near, want)
    if hidden:
        assert len(results[0].hidden_states) == LAYERS + 1


def test_what_was_asked_for_and_cannot_be_had_is_said_once():
    model = vilt_fast.accelerate(build("trunk", torch.float32), quantize="int8")
    output = model.encoder.layer[1].attention.output
    output.dense = LoRA(output.dense)
    inputs = batch("trunk", torch.float32)
    with torch.no_grad():
        with pytest.warns(UserWarning, match=r"int8 was asked for, but block 1 \(ViltLayer\).* a LoRA in place of"):
            model(**inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**inputs)


@pytest.mark.parametrize("kind, change, match", [
    ("int8", lambda m: m.encoder.layer[2].register_forward_hook(lambda *_: None), "block 2 .*a forward hook .*listens"),
    ("fp8", lambda m: setattr(m.encoder.layer[0].output, "dense", LoRA(m.encoder.layer[0].output.dense)), "LoRA"),
    ("fp8", lambda m: m.encoder.layer[0].register_forward_hook(lambda *_: None), "block 0 .*a forward hook .*listens"),
    ("int8", lambda m: m.double(), "float64"),
    ("int8", lambda m: m.half(), "float16, not float32 or bfloat16"),
    ("int8", lambda m: setattr(m.encoder.layer[1].intermediate, "intermediate_act_fn", nn.ReLU()), "block 1 .* GELU"),
    ("int8", lambda m: setattr(m.train().encoder.layer[0].output.dropout, "p", 0.1), "block 0 .*training .*dropout"),
])  # fmt: skip
def test_the_reason_is_named(kind, change, match, monkeypatch):
    monkeypatch.setattr(engine, "why_emulated", lambda rows: "")  # as on a GPU, where fp8 computes
    model = vilt_fast.accelerate(build("trunk", torch.float32), quantize=kind)
    change(model)
    with torch.no_grad(), pytest.warns(UserWarning, match=match):
        model(**batch("trunk", next(model.parameters()).dtype))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_gradients_are_named_as_the_reason(kind):
    inputs = batch("trunk", torch.float32)
    model = vilt_fast.accelerate(build("trunk", torch.float32), quantize=kind)
    with pytest.warns(UserWarning, match="gradients are recorded, and hidden states or attentions are to have them"):
        model(**inputs, output_hidden_states=True)
    model = vilt_fast.accelerate(build("trunk", torch.float32), quantize=kind).train()
    with pytest.warns(UserWarning, match="it is in training mode"):
        model(**inputs)


def test_a_model_that_gets_what_it_asked_for_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for quantize in (None, "int8"):
            model = vilt_fast.accelerate(build("trunk", torch.float32), quantize=quantize)
            with torch.no_grad():
                model(**batch("trunk", torch.float32))


@pytest.mark.parametrize("option, match", [
    ({"quantize": "fp8"}, "fp8 was asked for, but it is emulated here, with no gain: the tensors are on cpu"),
    ({"cuda_graphs": True}, "cuda_graphs was asked for, but .* CUDA graphs are for GPUs"),
])  # fmt: skip
def test_what_a_cpu_has_not_is_said_once(option, match):
    model = vilt_fast.accelerate(build("trunk", torch.float32), **option)
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            model(**batch("trunk", torch.float32))
    (one,) = said
    assert re.search(match, str(one.message))


@pytest.mark.parametrize("option", [{"quantize": "int8"}, {"cuda_graphs": True}])
def test_options_lost_with_the_whole_encoder_are_said_once(option):
    model = vilt_fast.accelerate(build("trunk", torch.float32), **option)
    model.encoder.register_forward_hook(lambda *_: None)
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            model(**batch("trunk", torch.float32))
    (one,) = said
    assert re.search("asked for, but ViltEncoder does without: a forward hook", str(one.message))


# --- other makes of block ---------------------------------------------------------------------------------------------


class NormLast(nn.Module):
    """A block of BERT's make: x = norm(x + f(x)), twice."""

    def __init__(self, width=32, heads=4):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.drop, self.heads = nn.Dropout(0.1), heads

    def forward(self, x, mask):
        q, k, v = (m(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.query, self.key, self.value))
        context = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = self.norm1(x + self.drop(self.out(context.transpose(1, 2).flatten(2))))
        return self.norm2(x + self.drop(self.fc2(nn.functional.gelu(self.fc1(x)))))


def described(module, source=None):
    attention = blocks.Attention(
        norm=module.norm1, projections=(module.query, module.key, module.value), num_heads=module.heads,
        scale=8**-0.5, dropout=nn.Identity(), out=module.out, out_dropout=module.drop, source=source,
    )  # fmt: skip
    feed_forward = blocks.FeedForward(
        norm=module.norm2, fc1=module.fc1, activation=nn.functional.gelu, activation_kind="gelu", fc2=module.fc2,
        fc2_dropout=module.drop,
    )  # fmt: skip

    def call_padded(x, packing, want_attention):
        mask = packing.key_mask()
        return module(x, mask[:, None, None, :]), None

    return blocks.Block(module, call_padded, (attention, feed_forward), norm_first=False)


def packing_of(ours):
    """That of some texts and images, which is a packing like any other."""
    return vilt_fast.sequence_plan(ours, **batch("trunk"))


@pytest.mark.parametrize("want_attention", [False, True])
def test_norm_last_blocks_run_packed(want_attention):
    packing = packing_of(vilt_fast.accelerate(build("trunk")))
    modules = [NormLast().double().eval() for _ in range(2)]
    rows = torch.randn(packing.total_rows, 32, dtype=torch.float64, requires_grad=True)
    got = engine.encode(modules, described, rows, packing, want_hidden=True, want_attention=want_attention)
    x = packing.unpack(rows, query_rows=True)
    for module in modules:
        x = module(x, packing.key_mask()[:, None, None, :])
    want = packing.pack(x)
    torch.testing.assert_close(got.rows, want, rtol=1e-11, atol=1e-12)
    assert len(got.hidden_states) == 3 and len(got.attentions) == 2 * want_attention
    grads = [torch.autograd.grad(y.square().sum(), rows)[0] for y in (got.rows, want)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-11)
    assert "behind its norm" in described(modules[0]).why_not_plain()


def test_a_block_that_attends_to_another_stream_is_called_as_it_is():
    block = described(NormLast(), source="image")
    assert not block.packable and "another stream (image)" in block.why_not_packable()

"""The packed forward as a GPU runs it: on a CUDA device where there is one, else on the CPU in Triton's interpreter."""

import copy

import pytest
import torch
from support.models import batch, build, call, labels, leaves, real_positions
from support.triton_case import round_as_torch
from torch import nn

import vilt_fast
from vilt_fast import order
from vilt_fast.engine import native
from vilt_fast.kernels import linear
from vilt_fast.ops import registry
from vilt_fast.testing import assert_within_budget

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "image_size": 48}  # heads of 16, the least that Triton multiplies
FUSED = {"text_embed", "patch_embed", "attention", "add_layer_norm", "linear_qkv", "linear_gelu"}
DROPLESS = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture
def device(monkeypatch):
    """Where the registry chooses as it does for CUDA tensors."""
    if torch.cuda.is_available():
        return "cuda"
    monkeypatch.setattr(registry, "_GPUS", {"cpu"})
    monkeypatch.setattr(native, "unavailable", lambda rows: "as on a GPU")
    return "cpu"


@pytest.fixture
def launched(monkeypatch):
    """{(op, backend)} of every launch."""
    seen, launcher = set(), registry.launcher

    def noted(op, backend):
        seen.add((op, backend))
        return launcher(op, backend)

    monkeypatch.setattr(registry, "launcher", noted)
    return seen


def moved(inputs, device, dtype=None):
    return {
        k: v.to(device, dtype if v.is_floating_point() else None) if torch.is_tensor(v) else v
        for k, v in inputs.items()
    }


def models(kind, device, dtype=torch.float32, options=(), **config):
    """(HuggingFace's in float64, the same in `dtype`, ours in `dtype`)."""
    exact = build(kind, **SMALL | config)
    plain = copy.deepcopy(exact).to(device, dtype)
    ours = vilt_fast.accelerate(copy.deepcopy(plain), patch_order="reference", **dict(options))
    return exact.to(dtype).double(), plain, ours


def compare(mine, plain, exact, masks=None):
    for (path, a), (_, b), (_, c) in zip(leaves(mine), leaves(plain), leaves(exact), strict=True):
        if path == "last_hidden_state" and masks:
            mask = masks[0][:, :, None]
            b, c = torch.where(mask.to(b.device), b, 0), torch.where(mask, c, 0)
        assert_within_budget(a, b, c, what=path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["trunk", "nlvr2"])
def test_inference_runs_on_the_fused_kernels(kind, dtype, device, launched):
    exact, plain, ours = models(kind, device, dtype)
    inputs = moved(batch(kind), device, dtype)
    with torch.no_grad():
        right = call(exact, moved(batch(kind), "cpu", dtype) | floats64(kind, dtype))
        mine = call(ours, inputs)
        other = call(plain, inputs)
    assert {(op, "triton") for op in FUSED} <= launched
    compare(mine, other, right, real_positions(exact, batch(kind)))


@torch.no_grad()
def test_padding_runs_on_them_too(device, launched):
    exact, plain, ours = models("trunk", device, options={"padding": "reference"})
    inputs = moved(batch("trunk"), device, torch.float32)
    right = call(exact, moved(batch("trunk"), "cpu", torch.float32) | floats64("trunk", torch.float32))
    compare(call(ours, inputs), call(plain, inputs), right)
    assert {(op, "triton") for op in FUSED} <= launched


@pytest.fixture
def adding(monkeypatch):
    """Where the table has linear layers add the residual stream; the kernels that add, as they are called."""
    entry = order.Entry(("triton", "reference"), "a test", {"RESIDUAL": True})
    monkeypatch.setitem(order.table(), (order.capability(), "linear", "any"), entry)
    order.entry.cache_clear()
    seen, launch = [], linear.launch

    def noted(x, weight, bias, residual, **options):
        seen.append(residual)
        return launch(x, weight, bias, residual, **options)

    monkeypatch.setattr(linear, "launch", noted)
    yield seen
    order.entry.cache_clear()


@pytest.mark.parametrize("kind, dtype, blocks", [("trunk", torch.float16, 1), ("question_answering", torch.float32, 2)])
def test_linear_layers_add_to_the_stream_where_the_table_says_so(kind, dtype, blocks, device, launched, adding):
    """All rows and chosen ones; not where dropout is alive, a gradient may be wanted or the stream is wider."""
    exact, plain, ours = models(kind, device, dtype, num_hidden_layers=blocks)
    inputs = moved(batch(kind), device, dtype)
    with torch.no_grad():
        right = call(exact, moved(batch(kind), "cpu", dtype) | floats64(kind, dtype))
        compare(call(ours, inputs), call(plain, inputs), right, real_positions(exact, batch(kind)))
    assert ("add_layer_norm", "triton") not in launched
    assert sum(residual is not None for residual in adding) == 2 * blocks
    adding.clear()
    call(ours, inputs)
    with torch.no_grad():
        for module in ours.encoder.modules() if kind == "trunk" else ():
            if isinstance(module, nn.Dropout):
                module.train().p = 0.1
        with torch.autocast(device, torch.float16, enabled=dtype == torch.float32):
            call(ours, inputs)
    assert ("add_layer_norm", "triton") in launched and not any(residual is not None for residual in adding)


def floats64(kind, dtype):
    """The floating inputs, rounded to `dtype`, in float64."""
    return {k: v.to(dtype).double() for k, v in batch(kind).items() if v.is_floating_point()}


def test_training_runs_on_the_fused_kernels_and_every_gradient_is_right(device, launched):
    kind = "question_answering"
    exact, plain, ours = models(kind, device, **DROPLESS)
    found = []
    for model, where, dtype in ((ours, device, torch.float32), (plain, device, torch.float32), (exact, "cpu", None)):
        inputs = moved(batch(kind), where, torch.float32)
        if dtype is None:
            inputs |= floats64(kind, torch.float32)
        target = labels(kind).float().to(where, dtype or torch.float64)
        call(model.train(), inputs, labels=target).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert {(op, "triton") for op in FUSED} <= launched
    assert {(f"{op}_bwd", "triton") for op in FUSED} <= launched
    mine, other, right = found
    rows = [[], [], []]
    for name, gradient in right.items():
        if gradient is None:
            assert mine[name] is None or not mine[name].any(), name
            continue
        # Of one small tensor, either error may be a lucky one; a term that is missing is wrong by much more.
        assert_within_budget(mine[name], other[name], gradient, factor=8, what=name)
        for row, g in zip(rows, (mine[name], other[name], gradient), strict=True):
            row.append(g.flatten())
    assert_within_budget(*map(torch.cat, rows))


@torch.no_grad()
def test_fp8_is_handed_on_or_made_in_a_pass(device, launched, monkeypatch):
    """The norms' rows are the same bits either way; of the GELU's, groups of columns have scales of their own."""
    round_as_torch(monkeypatch)
    plain = build("trunk", torch.float32, **SMALL).to(device)
    ours = vilt_fast.accelerate(copy.deepcopy(plain), quantize="fp8")
    inputs = moved({k: v[:2] for k, v in batch("trunk").items()}, device, torch.float32)
    found = {}
    for fused in ((True, True), (False, True), (True, False), (False, False)):
        launched.clear()
        for op, here in zip(("add_layer_norm_fp8", "linear_gelu_fp8"), fused, strict=True):
            monkeypatch.setitem(order.TRIED, op, {"FUSED": here})
        found[fused] = ours(**inputs).pooler_output
        assert (("add_layer_norm_fp8", "triton") in launched, ("linear_gelu_fp8", "triton") in launched) == fused
    full = vilt_fast.accelerate(plain)(**inputs).pooler_output
    assert torch.equal(found[True, True], found[False, True]) and torch.equal(found[True, False], found[False, False])
    assert not torch.equal(found[True, True], found[True, False])
    errors = [(found[True, way] - full).norm() / full.norm() for way in (True, False)]
    assert errors[0] < 1.5 * errors[1] and errors[1] < 0.2


@torch.no_grad()
def test_fp8_that_is_handed_on_compiles_to_one_graph(device, monkeypatch):
    torch._dynamo.reset()
    round_as_torch(monkeypatch)
    one = SMALL | {"num_hidden_layers": 1}
    ours = vilt_fast.accelerate(build("trunk", torch.float32, **one).to(device), quantize="fp8")
    inputs = moved(batch("trunk"), device, torch.float32)
    inputs["sequence_plan"] = vilt_fast.sequence_plan(ours, **inputs)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).pooler_output, ours(**inputs).pooler_output)


def test_the_stream_is_added_once_whatever_comes_between(device):
    """Hidden states, attentions, checkpointing and a hooked block all need the branch that the next norm would add."""
    kind = "trunk"
    exact, plain, ours = models(kind, device, num_hidden_layers=3)
    inputs = moved(batch(kind), device, torch.float32)
    hooked = copy.deepcopy(ours)
    hooked.encoder.layer[1].register_forward_hook(lambda *a: None)
    kept = copy.deepcopy(ours).train()
    kept.gradient_checkpointing_enable()
    for module in kept.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        right, other = (
            call(m, moved(batch(kind), w, torch.float32) | f)
            for m, w, f in ((exact, "cpu", floats64(kind, torch.float32)), (plain, device, {}))
        )
    masks = real_positions(exact, batch(kind))
    for model in (hooked, kept):
        compare(call(model, inputs), other, right, masks)
    with torch.no_grad():
        asked = call(ours, inputs, output_hidden_states=True, output_attentions=True)
        told = call(exact, moved(batch(kind), "cpu", torch.float32) | floats64(kind, torch.float32),
                    output_hidden_states=True)  # fmt: skip
        same = call(plain, inputs, output_hidden_states=True)
    mask = masks[0][:, :, None]
    for mine, theirs, truth in zip(asked.hidden_states, same.hidden_states, told.hidden_states, strict=True):
        real = mask.to(theirs.device)
        assert_within_budget(mine, torch.where(real, theirs, 0), torch.where(mask, truth, 0))


# --- compiled and exported -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "grad"), [("trunk", True), ("masked_lm", True), ("question_answering", False), ("nlvr2", False)]
)
def test_compiles_to_one_graph(kind, grad, device):
    torch._dynamo.reset()
    _, _, ours = models(kind, device, num_hidden_layers=1)
    inputs = moved(batch(kind), device, torch.float32)
    plan = vilt_fast.sequence_plan(ours, **inputs)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    results = []
    for model in (compiled, ours):
        ours.zero_grad()
        with torch.set_grad_enabled(grad):
            output = call(model, inputs, sequence_plan=plan)
            if grad:
                output[0].float().square().sum().backward()
        nothing = torch.zeros((), device=device)
        gradients = [nothing if p.grad is None else p.grad for p in ours.parameters()]
        results.append([t for _, t in leaves(output) if t is not None] + gradients)
    for mine, eager in zip(*results, strict=True):
        torch.testing.assert_close(mine, eager.expand_as(mine))


class Planned(nn.Module):
    """A model with the plan that its inputs follow."""

    def __init__(self, model, plan):
        super().__init__()
        self.model, self.plan = model, plan

    def forward(self, **inputs):
        return self.model(**inputs, sequence_plan=self.plan).pooler_output


@pytest.mark.parametrize(("native", "strict"), [(True, True), (True, False), (False, True)])
def test_exports(native, strict, request, tmp_path):
    device = "cpu" if native else request.getfixturevalue("device")
    _, _, ours = models("trunk", device, num_hidden_layers=1)
    inputs = moved(batch("trunk"), device, torch.float32)
    plan = vilt_fast.sequence_plan(ours, **inputs)
    with torch.no_grad():
        program = torch.export.export(Planned(ours, plan), (), inputs, strict=strict)
        torch.export.save(program, tmp_path / "trunk.pt2")
        loaded = torch.export.load(tmp_path / "trunk.pt2").module()
        torch.testing.assert_close(loaded(**inputs), call(ours, inputs, sequence_plan=plan).pooler_output)
    ops = {str(node.target).split(".")[1] for node in program.graph.nodes if str(node.target).startswith("vilt_fast.")}
    assert ops == ({"patch_embed", "encoder"} if native else FUSED)


@pytest.mark.parametrize("kind", ["trunk", "masked_lm", "question_answering", "retrieval", "nlvr2"])
def test_a_plan_made_ahead_is_the_plan_of_the_call(kind):
    ours = vilt_fast.accelerate(build(kind), patch_order="raster")
    inputs = batch(kind)
    plan = vilt_fast.sequence_plan(ours, **inputs)
    with torch.no_grad():
        for (path, a), (_, b) in zip(*(leaves(ours(**inputs, sequence_plan=p)) for p in (plan, None)), strict=True):
            assert torch.equal(a, b), path
    other = vilt_fast.sequence_plan(ours, **{k: v[:2] for k, v in inputs.items()})
    with pytest.raises(vilt_fast.InputError, match="sequence_plan was made for"):
        ours(**inputs, sequence_plan=other)


def test_no_plan_for_a_model_that_is_not_accelerated():
    with pytest.raises(TypeError, match="accelerate"):
        vilt_fast.sequence_plan(build("trunk"), **batch("trunk"))

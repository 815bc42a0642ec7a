"""torch.jit.trace, torch.export and ONNX: with a plan, or the module's own way; a plan can be saved."""

import io
import types

import pytest
import torch
import torch.nn.functional as F
from support.models import batch, build
from torch import nn

import vilt_fast

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
NAMES = ("input_ids", "attention_mask", "token_type_ids", "pixel_values", "pixel_mask")


class Pooled(nn.Module):
    """Inputs by place, one tensor out, as tracers want it."""

    def __init__(self, model, plan=None):
        super().__init__()
        self.model, self.plan = model, plan

    def forward(self, *tensors):
        plan = {} if self.plan is None else {"sequence_plan": self.plan}
        out = self.model(**dict(zip(NAMES, tensors, strict=True)), **plan)
        return out.pooler_output if hasattr(out, "pooler_output") else out.logits


def whole(kind="trunk"):
    """A batch without padding, whose patches are all there: nothing is drawn that a trace would fix."""
    inputs = batch(kind)
    return inputs | {name: torch.ones_like(inputs[name]) for name in ("attention_mask", "pixel_mask")}


def in_order(self, pixels, mask, max_image_length=200):
    """The public recipe for exporting ViLT: every patch, in raster order."""
    x = self.patch_embeddings(pixels)
    (samples, width, h, w), side = x.shape, self.config.image_size // self.config.patch_size
    table = self.position_embeddings[:, 1:].transpose(1, 2).reshape(1, width, side, side)
    places = F.interpolate(table, size=(h, w), mode="bilinear", align_corners=True).flatten(2).transpose(1, 2)
    cls = (self.cls_token + self.position_embeddings[:, :1]).expand(samples, -1, -1)
    cells = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1).view(1, -1, 2)
    rows = torch.cat([cls, x.flatten(2).transpose(1, 2) + places], 1)
    return rows, torch.ones(samples, 1 + h * w, dtype=torch.long), (cells.expand(samples, -1, -1), (h, w))


@pytest.mark.parametrize("kind", ["trunk", "question_answering"])
@torch.no_grad()
def test_a_trace_without_a_plan_is_that_of_the_module(kind):
    model, inputs = vilt_fast.accelerate(build(kind)), whole(kind)
    traced = torch.jit.trace(Pooled(model), tuple(inputs[name] for name in NAMES), check_trace=False)
    other = whole(kind) | {"pixel_values": torch.randn_like(inputs["pixel_values"])}
    want = Pooled(vilt_fast.restore(model))(*(other[name] for name in NAMES))
    torch.testing.assert_close(traced(*(other[name] for name in NAMES)), want, rtol=1e-9, atol=1e-9)


@pytest.mark.core
@torch.no_grad()
def test_a_trace_with_a_plan_is_saved_and_loaded():
    model, inputs = vilt_fast.accelerate(build("trunk", torch.float32)), batch("trunk", torch.float32)
    given = tuple(inputs[name] for name in NAMES)
    plan = vilt_fast.sequence_plan(model, **inputs)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(Pooled(model, plan), given, check_trace=False), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(*given), Pooled(model, plan)(*given))


@torch.no_grad()
def test_a_plan_is_saved_and_loaded():
    model, inputs = vilt_fast.accelerate(build("trunk")), batch("trunk")
    plan, file = vilt_fast.sequence_plan(model, **inputs), io.BytesIO()
    torch.save(plan, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded.layout == plan.layout and loaded.pos_weight.equal(plan.pos_weight)
    assert torch.equal(model(**inputs, sequence_plan=loaded)[0], model(**inputs, sequence_plan=plan)[0])


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_export_of_the_public_recipe(strict):
    model, inputs = build("trunk", torch.float32, num_hidden_layers=1), whole()
    model.embeddings.visual_embed = types.MethodType(in_order, model.embeddings)
    given = tuple(inputs[n].float() if inputs[n].is_floating_point() else inputs[n] for n in NAMES)
    want = Pooled(model)(*given)
    vilt_fast.accelerate(model)
    exported = torch.export.export(Pooled(model), given, strict=strict)
    torch.testing.assert_close(exported.module()(*given), want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_export_without_a_plan_says_what_to_do():
    model, inputs = vilt_fast.accelerate(build("trunk")), whole()
    with pytest.raises(RuntimeError, match="sequence_plan=vilt_fast.sequence_plan"):
        torch.export.export(Pooled(model), tuple(inputs[name] for name in NAMES), strict=False)


@torch.no_grad()
def test_onnx_with_a_plan_runs_elsewhere(tmp_path):
    import onnxruntime  # takes a while

    model = vilt_fast.accelerate(build("question_answering", torch.float32, num_hidden_layers=1))
    inputs = batch("question_answering", torch.float32)
    plan = vilt_fast.sequence_plan(model, **inputs)
    given = tuple(inputs[name] for name in NAMES)
    torch.onnx.export(Pooled(model, plan), given, tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    other = tuple(t.neg() if t.is_floating_point() else t for t in given)
    for tensors in (given, other):
        named = {i.name: t.numpy() for i, t in zip(session.get_inputs(), tensors, strict=True)}
        (found,) = session.run(None, named)
        torch.testing.assert_close(torch.from_numpy(found), Pooled(model, plan)(*tensors), rtol=1e-5, atol=1e-5)

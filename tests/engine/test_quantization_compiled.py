"""8-bit copies in a compiled graph, where nothing but an op can compare them with their weights."""

import pytest
import torch
from support.models import batch, build, leaves

import vilt_fast


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@torch.no_grad()
def test_one_graph_with_copies_that_follow_their_weights(kind, quantized):
    model = vilt_fast.accelerate(build("trunk", torch.float32, num_hidden_layers=1), quantize=kind)
    inputs = batch("trunk", torch.float32)
    inputs["sequence_plan"] = vilt_fast.sequence_plan(model, **inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    seen = []
    for _ in range(2):
        seen.append(compiled(**inputs, output_hidden_states=True))
        assert_as_not_compiled(seen[-1], model(**inputs, output_hidden_states=True))
        model.encoder.layer[0].output.dense.weight.mul_(1.5)
    assert not torch.equal(seen[0].pooler_output, seen[1].pooler_output)
    assert len(quantized) == (8 if kind == "int8" else 0)  # six and that of the patches, and one that has changed


def assert_as_not_compiled(ours, theirs):
    for (path, mine), (_, other) in zip(leaves(ours), leaves(theirs), strict=True):
        if other is not None:
            torch.testing.assert_close(mine, other, msg=lambda m, p=path: f"{p}: {m}")


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@torch.no_grad()
def test_an_export_of_copies_says_what_to_do(kind):
    model = vilt_fast.accelerate(build("trunk", torch.float32, num_hidden_layers=1), quantize=kind)
    inputs = batch("trunk", torch.float32)
    plan = vilt_fast.sequence_plan(model, **inputs)

    class Planned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, inputs):
            return self.model(**inputs, sequence_plan=plan).pooler_output

    with pytest.raises(RuntimeError, match="accelerate the model without quantize first"):
        torch.export.export(Planned(), (inputs,), strict=False)

"""What is timed: HuggingFace's own model, ours, and (with --peers) what a user could pick instead.

A provider is `build(model) -> call(inputs) -> pooled output`; `model` is HuggingFace's in float32 and is not modified.
"""

import copy
import importlib.util
from typing import NamedTuple

import torch

from vilt_fast.commands.report import accelerated, unavailable


class Provider(NamedTuple):
    """`padded`: does it compute padding? `weight_bytes`, `activation_bytes`: a value's size in memory."""

    name: str
    dtype: str
    padded: bool
    weight_bytes: int
    activation_bytes: int
    build: object


def _caller(model):
    def call(inputs):
        with torch.inference_mode():
            return model(**inputs).pooler_output

    return call


def _hf(dtype):
    return lambda model: _caller(model if dtype is torch.float32 else copy.deepcopy(model).to(dtype))


def _ours(precision):
    return lambda model: _caller(accelerated(model, precision))


def _compiled(dtype):
    def build(model):
        import torch._inductor.config as inductor

        inductor.freezing = True
        return _caller(torch.compile(copy.deepcopy(model).to(dtype)))

    return build


def _openvino(precision, unpadded=False):
    """HuggingFace's embeddings, then encoder, final norm and pooler in OpenVINO; padded like exports of this model, or
    `unpadded`: every sample on its own, cropped to what is real, two at a time on two one-thread streams."""

    def build(model):
        import openvino

        class Encoder(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.encoder, self.layernorm, self.pooler = model.encoder, model.layernorm, model.pooler

            def forward(self, hidden, mask):
                hidden = self.encoder(hidden, attention_mask=mask, return_dict=False)[0]
                return self.pooler(self.layernorm(hidden))

        hidden = torch.zeros(1, 185, model.config.hidden_size)
        converted = openvino.convert_model(Encoder(), example_input=(hidden, torch.zeros(1, 1, 1, 185)))
        options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        options["NUM_STREAMS"] = torch.get_num_threads() if unpadded else 1
        compiled = openvino.Core().compile_model(converted, "CPU", options)

        def embed(inputs):
            names = ("input_ids", "attention_mask", None, "pixel_values", "pixel_mask", None, None)
            embedded, mask = model.embeddings(*(inputs.get(name) for name in names))
            return embedded.numpy(), ((1.0 - mask[:, None, None, :].float()) * -1e9).numpy()

        def call(inputs):
            with torch.inference_mode():
                if not unpadded:
                    return torch.from_numpy(compiled(embed(inputs))[0])
                pooled = [None] * len(inputs["input_ids"])
                queue = openvino.AsyncInferQueue(compiled, torch.get_num_threads())
                queue.set_callback(lambda request, i: pooled.__setitem__(i, request.get_output_tensor(0).data.copy()))
                for i, sample in enumerate(_samples(inputs)):
                    queue.start_async(embed(sample), i)
                queue.wait_all()
                return torch.cat([torch.from_numpy(p) for p in pooled])

        return call

    return build


def _samples(inputs):
    """The samples of a batch, each a batch of one cropped to its real text and pixels."""
    for ids, mask, pixels, real in zip(*(inputs[k] for k in inputs), strict=True):
        text, height, width = int(mask.sum()), int(real[:, 0].sum()), int(real[0].sum())
        cropped = (ids[:text], mask[:text], pixels[:, :height, :width], real[:height, :width])
        yield {name: value[None] for name, value in zip(inputs, cropped, strict=True)}


PROVIDERS = {
    p.name: p
    for p in (
        Provider("hf_eager", "float32", True, 4, 4, _hf(torch.float32)),
        Provider("hf_bf16", "bfloat16", True, 2, 2, _hf(torch.bfloat16)),
        Provider("ours_float32", "float32", False, 4, 4, _ours("float32")),
        Provider("ours_bfloat16", "bfloat16", False, 2, 2, _ours("bfloat16")),
        Provider("ours_int8", "int8", False, 1, 4, _ours("int8")),
    )
}
PEERS = {
    p.name: p
    for p in (
        Provider("compile_float32", "float32", True, 4, 4, _compiled(torch.float32)),
        Provider("compile_bf16", "bfloat16", True, 2, 2, _compiled(torch.bfloat16)),
        Provider("openvino_f32", "float32", True, 4, 4, _openvino("f32")),
        Provider("openvino_bf16", "bfloat16", True, 2, 2, _openvino("bf16")),
        Provider("openvino_unpadded_f32", "float32", False, 4, 4, _openvino("f32", unpadded=True)),
        Provider("openvino_unpadded_bf16", "bfloat16", False, 2, 2, _openvino("bf16", unpadded=True)),
    )
}


def chosen(dtypes, peers):
    """The providers to run for these precisions, hf_eager always first: every ratio is against it.

    What this machine cannot run is left out.
    """
    dtypes = [d for d in dtypes if not unavailable(d)]
    found = [p for p in PROVIDERS.values() if p.name == "hf_eager" or p.dtype in dtypes]
    if peers:
        absent = () if importlib.util.find_spec("openvino") else ("openvino",)
        found += [p for p in PEERS.values() if p.dtype in dtypes and p.name.split("_")[0] not in absent]
    return found

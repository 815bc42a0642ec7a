"""What is timed: HuggingFace's own model, ours, and (with --peers) what a user could pick instead.

A provider is `build(model) -> call(inputs) -> pooled output`, or the logits of a model with a head; `model` is
HuggingFace's in float32 and is not modified.
"""

import copy
import importlib.util
import tempfile
from typing import NamedTuple

import torch

from vilt_fast.commands.report import accelerated, unavailable


class Provider(NamedTuple):
    """`padded`: does it compute padding? `weight_bytes`, `activation_bytes`: a value's size in memory. `backend`: what
    computes, or "" for what our registry chooses; `needs`: packages that have to be there."""

    name: str
    dtype: str
    padded: bool
    weight_bytes: int
    activation_bytes: int
    build: object
    backend: str = ""
    needs: tuple = ()


def output(result):
    """What a forward was made for: logits, if it has a head."""
    return result.logits if "logits" in result else result.pooler_output


def _caller(model):
    def call(inputs):
        with torch.inference_mode():
            return output(model(**inputs))

    return call


def _hf(dtype):
    return lambda model: _caller(model if dtype is torch.float32 else copy.deepcopy(model).to(dtype))


def _ours(precision):
    return lambda model: _caller(accelerated(model, precision))


def _compiled(dtype):
    def build(model):
        import torch._inductor.config as inductor

        inductor.freezing = True
        return _caller(torch.compile(copy.deepcopy(model).to(dtype), dynamic=False))

    return build


def _torchao(model):
    """Activations quantised a token, weights a channel, as torchao does it for linear layers, then torch.compile."""
    import torch._inductor.config as inductor
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantized = copy.deepcopy(model)
    quantize_(quantized, Int8DynamicActivationInt8WeightConfig())
    inductor.freezing = True
    return _caller(torch.compile(quantized, dynamic=False))  # the second size would be compiled for any


def _exported(model):
    """(module, example): encoder, final norm and pooler as one module for an exporter, [1, 185, D] and its mask."""

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.layernorm, self.pooler = model.encoder, model.layernorm, model.pooler

        def forward(self, hidden, mask):
            hidden = self.encoder(hidden, attention_mask=mask, return_dict=False)[0]
            return self.pooler(self.layernorm(hidden))

    return Encoder().eval(), (torch.zeros(2, 185, model.config.hidden_size), torch.zeros(2, 1, 1, 185))


def _embedded(model, inputs):
    """HuggingFace's embeddings of a batch and the mask to add to scores, as arrays."""
    names = ("input_ids", "attention_mask", None, "pixel_values", "pixel_mask", None, None)
    with torch.inference_mode():
        embedded, mask = model.embeddings(*(inputs.get(name) for name in names))
    return embedded.numpy(), ((1.0 - mask[:, None, None, :].float()) * -1e9).numpy()


def _openvino(precision, unpadded=False):
    """HuggingFace's embeddings, then encoder, final norm and pooler in OpenVINO; padded like exports of this model, or
    `unpadded`: every sample on its own, cropped to what is real, as many at a time as threads, one thread each."""

    def build(model):
        import openvino

        module, example = _exported(model)
        converted = openvino.convert_model(module, example_input=example)
        options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        options["NUM_STREAMS"] = torch.get_num_threads() if unpadded else 1
        compiled = openvino.Core().compile_model(converted, "CPU", options)

        def call(inputs):
            if not unpadded:
                return torch.from_numpy(compiled(_embedded(model, inputs))[0])
            pooled = [None] * len(inputs["input_ids"])
            queue = openvino.AsyncInferQueue(compiled, torch.get_num_threads())
            queue.set_callback(lambda request, i: pooled.__setitem__(i, request.get_output_tensor(0).data.copy()))
            for i, sample in enumerate(_samples(inputs)):
                queue.start_async(_embedded(model, sample), i)
            queue.wait_all()
            return torch.cat([torch.from_numpy(p) for p in pooled])

        return call

    return build


def _onnxruntime(model):
    """HuggingFace's embeddings, then the rest exported to ONNX with int8 weights, dynamically quantised, padded."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    module, example = _exported(model)
    free = torch.export.Dim.DYNAMIC
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        exported, quantized = f"{folder}/float32.onnx", f"{folder}/int8.onnx"
        torch.onnx.export(
            module, example, dynamo=True, dynamic_shapes=({0: free, 1: free}, {0: free, 3: free}),
            input_names=["hidden", "mask"], verbose=False,
        ).save(exported)  # fmt: skip
        quantize_dynamic(exported, quantized, weight_type=QuantType.QInt8, per_channel=True)
        session = onnxruntime.InferenceSession(quantized, options, providers=["CPUExecutionProvider"])

    def call(inputs):
        hidden, mask = _embedded(model, inputs)
        return torch.from_numpy(session.run(None, {"hidden": hidden, "mask": mask})[0])

    return call


def _samples(inputs):
    """The samples of a batch, each a batch of one cropped to its real text and pixels."""
    for ids, mask, pixels, real in zip(*(inputs[k] for k in inputs), strict=True):
        text, height, width = int(mask.sum()), int(real[:, 0].sum()), int(real[0].sum())
        cropped = (ids[:text], mask[:text], pixels[:, :height, :width], real[:height, :width])
        yield {name: value[None] for name, value in zip(inputs, cropped, strict=True)}


PROVIDERS = {
    p.name: p
    for p in (
        Provider("hf_eager", "float32", True, 4, 4, _hf(torch.float32), "torch"),
        Provider("hf_bf16", "bfloat16", True, 2, 2, _hf(torch.bfloat16), "torch"),
        Provider("ours_float32", "float32", False, 4, 4, _ours("float32")),
        Provider("ours_bfloat16", "bfloat16", False, 2, 2, _ours("bfloat16")),
        Provider("ours_int8", "int8", False, 1, 4, _ours("int8")),
    )
}
_ORT = ("onnxruntime", "onnx", "onnxscript")
PEERS = {
    p.name: p
    for p in (
        Provider("compile_float32", "float32", True, 4, 4, _compiled(torch.float32), "inductor"),
        Provider("compile_bf16", "bfloat16", True, 2, 2, _compiled(torch.bfloat16), "inductor"),
        Provider("openvino_f32", "float32", True, 4, 4, _openvino("f32"), "openvino", ("openvino",)),
        Provider("openvino_bf16", "bfloat16", True, 2, 2, _openvino("bf16"), "openvino", ("openvino",)),
        Provider("openvino_unpadded_f32", "float32", False, 4, 4, _openvino("f32", True), "openvino", ("openvino",)),
        Provider("openvino_unpadded_bf16", "bfloat16", False, 2, 2, _openvino("bf16", True), "openvino", ("openvino",)),
        Provider("torchao_int8", "int8", True, 1, 4, _torchao, "inductor", ("torchao",)),
        Provider("onnxruntime_int8", "int8", True, 1, 4, _onnxruntime, "onnxruntime", _ORT),
    )
}


def chosen(dtypes, peers):
    """The providers to run for these precisions, hf_eager always first: every ratio is against it.

    What this machine cannot run is left out.
    """
    dtypes = [d for d in dtypes if not unavailable(d)]
    found = [p for p in PROVIDERS.values() if p.name == "hf_eager" or p.dtype in dtypes]
    return found + [p for p in PEERS.values() if peers and p.dtype in dtypes and not lacking(p)]


def lacking(provider):
    """The packages that a provider needs and that are not installed."""
    return [name for name in provider.needs if importlib.util.find_spec(name) is None]

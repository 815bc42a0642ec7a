"""From a JPEG to pixels, and with a question to its answer: HuggingFace's way, ours exact, ours with `decode="fast"`.

Photographs are drawn (`samples.photograph`), JPEGs of quality 90 in memory. `*_answer`: processor, tokenizer and
`ViltForQuestionAnswering`; the base of its ratios is HuggingFace's processor with its eager float32 model. `*_pixels`:
the image processor alone, against HuggingFace's. `error` is the pooled output's against HuggingFace's model in float64
on HuggingFace's pixels (relative), or the mean difference of pixels, which lie in -1 to 1.
"""

import copy
import io
from functools import partial

import torch
from PIL import Image

from vilt_fast import ImageProcessor
from vilt_fast.commands import report, samples
from vilt_fast.images.reference import Reference, target_size

from . import cases as shapes
from . import table

QUESTION = "How many people are there beside the red car in the street?"
PHOTOGRAPHS = {"12mp": ((3000, 4000),), "480p": ((480, 640),), "b8_2mp": ((1200, 1600), (1600, 1200)) * 4}
SHORTER = 384  #: the shorter side that a processor resizes to
ANSWERED = ("12mp", "480p")


def files(sizes):
    """The bytes of JPEGs of these (height, width)."""
    found = []
    for seed, (height, width) in enumerate(sizes):
        file = io.BytesIO()
        Image.fromarray(samples.photograph(seed, height, width)).save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


def rows(model, repeats, step=lambda what: None):
    """Rows without the columns of the machine; `model` is HuggingFace's `ViltForQuestionAnswering` in float32."""
    found = []
    for name, sizes in PHOTOGRAPHS.items():
        step(f"images: {name}")
        data = files(sizes)
        found += _timed(_pixels(data), f"{name}_pixels", sizes, data, repeats)
        if name in ANSWERED:
            found += _timed(_answers(model, data[0], step), f"{name}_answer", sizes, data, repeats, model.config)
    return found


def _timed(providers, case, sizes, data, repeats, config=None):
    """Rows of a case from `{(provider, dtype, backend): (call, error)}`, whose first is the base."""
    times = report.interleave({key: call for key, (call, _) in providers.items()}, repeats, warmup=1)
    quantiles = {key: report.quantiles(values) for key, values in times.items()}
    base = next(iter(quantiles.values()))[1]
    decoded = sum(height * width for height, width in sizes)
    for (provider, dtype, backend), (_, error) in providers.items():
        flops, moved = 0, sum(map(len, data)) + 2 * 4 * decoded  # Pillow keeps RGB in four bytes: written, then read
        if config is not None:
            (height, width), words = (
                target_size(*sizes[0], SHORTER, config.patch_size),
                len(samples.words(QUESTION)) + 2,
            )
            patches = height * width // config.patch_size**2
            flops = shapes.flops([words + 1 + patches], [patches], config)
            moved += shapes.traffic([words + 1 + patches], config, 1 if dtype == "int8" else 4, 4)
        yield {
            "subject": "images",
            "provider": provider,
            "backend": backend,
            "model": "random weights" if config else "",
            "case": case,
            "shape": f"b{len(sizes)} {'x'.join(map(str, sizes[0]))}",
            "dtype": dtype,
            **table.times(quantiles[provider, dtype, backend], base),
            "error": error,
            "flops": flops,
            "bytes": moved,
        }


def _opened(data):
    return [Image.open(io.BytesIO(one)) for one in data]


def _pixels(data):
    """The image processor alone. HuggingFace's takes PIL images, which it decodes."""
    plain, ours = Reference(), ImageProcessor()
    calls = {
        "hf": lambda: plain(_opened(data), return_tensors="pt"),
        "ours": lambda: ours(data, return_tensors="pt"),
        "ours_fast": lambda: ours(data, return_tensors="pt", decode="fast"),
    }
    exact = calls["hf"]()["pixel_values"]
    return {
        (name, "float32", "pillow"): (call, float((call()["pixel_values"] - exact).abs().mean()))
        for name, call in calls.items()
    }


def _answers(model, data, step):
    """From the JPEG and the question to the answer's number."""
    from transformers import ViltProcessor

    tokenizer = samples.word_tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *samples.words(QUESTION)])
    models = {"float32": model, "int8": report.accelerated(model, "int8")}
    processors = {
        "hf": ViltProcessor(Reference(), tokenizer),
        "ours": ViltProcessor(ImageProcessor(), tokenizer),
        "ours_fast": ViltProcessor(ImageProcessor(decode="fast"), tokenizer),
    }

    def inputs(name):
        return processors[name](_opened([data]), QUESTION, return_tensors="pt")

    def answer(name, dtype):
        with torch.inference_mode():
            return models[dtype](**inputs(name)).logits.argmax(-1)

    step("images: float64")
    with torch.inference_mode():
        truth = copy.deepcopy(model.vilt).double()(**inputs("hf")).pooler_output
        found = {}
        for name, dtype in (("hf", "float32"), ("hf", "int8"), ("ours", "int8"), ("ours_fast", "int8")):
            pooled = models[dtype].vilt(**inputs(name)).pooler_output
            label = name if (name, dtype) != ("hf", "int8") else "hf_processor_ours_int8"
            backend = "torch" if dtype == "float32" else "cpp"
            found[label, dtype, backend] = partial(answer, name, dtype), report.relative_error(pooled.double(), truth)
    return found

"""Scoring rows: a grid of texts and images, and photographs with questions from files to answers.

`grid`: the 8 images of the model's case b8 with 40 texts of its lengths, ViLT-B/32 with a head for retrieval, from
pixels and ids to scores. `small`: the same with 2 images and 8 texts. Bases: HuggingFace's own model on a batch a text,
with all images padded to the largest (`hf_padded`), and as its documentation has it, on one pair after the other
(`hf_loop`).

`jpegs`: photographs of 12 megapixels, a question each, from files to answers: HuggingFace's processor and model one
after the other, and ours in int8, decoding exactly and fast.

`error` is that of the scores (of jpegs: of the likeliest answers' probabilities) against HuggingFace's in float32,
relative. How many texts rank the images as HuggingFace does is printed.
"""

import copy
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import vilt_fast
from vilt_fast.commands import checkpoint, report, samples

from . import cases as shapes
from . import table

CASES = ("small", "grid", "jpegs")
_SIZES = {"grid": (8, 40), "small": (2, 8)}  # images, texts
_LENGTHS = (40, 12, 8, 16, 10, 22, 14, 10)
JPEGS, MEGAPIXELS = 8, (3000, 4000)


def rows(cases, dtypes, repeats, step=lambda what: None):
    """Rows without the columns of the machine."""
    found = []
    for case in cases:
        found += _jpegs(dtypes, repeats, step) if case == "jpegs" else _grid(case, dtypes, repeats, step)
    return found


def _grid(case, dtypes, repeats, step):
    from transformers import ViltForImageAndTextRetrieval

    torch.manual_seed(0)
    model = checkpoint.random_vqa()
    retrieval = ViltForImageAndTextRetrieval(model.config).eval()
    retrieval.vilt = model.vilt
    config, (images, texts) = model.config, _SIZES[case]
    inputs = shapes.inputs(shapes.CASES["b8"], config)
    pixels = [
        {"pixel_values": p[:, : int(m[:, 0].sum()), : int(m[0].sum())][None]}
        for p, m in zip(inputs["pixel_values"][:images], inputs["pixel_mask"][:images], strict=True)
    ]
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, config.vocab_size, (_LENGTHS[t % 8],), generator=draw) for t in range(texts)]
    canvas = {name: inputs[name][:images] for name in ("pixel_values", "pixel_mask")}

    @torch.inference_mode()
    def padded(model):
        batch = {**canvas, "pixel_values": canvas["pixel_values"].to(model.dtype)}
        return torch.stack(
            [model(input_ids=text.expand(images, -1), **batch).logits[:, 0].float() for text in ids]
        )  # fmt: skip

    @torch.inference_mode()
    def loop(model):
        values = [[model(input_ids=text[None], **image).logits[0, 0] for image in pixels] for text in ids]
        return torch.tensor(values)

    def ours(model):
        return torch.from_numpy(np.array(vilt_fast.score(model, ids, pixels, progress=False).scores)).float()

    calls = {"hf_padded": lambda: padded(retrieval), "hf_loop": lambda: loop(retrieval)}
    if "bfloat16" in dtypes:
        rounded = copy.deepcopy(retrieval).to(torch.bfloat16)
        calls["hf_padded_bf16"] = lambda: padded(rounded)
    for dtype in dtypes:
        fast = report.accelerated(retrieval, dtype)
        calls[f"ours_{dtype}"] = lambda fast=fast: ours(fast)
    step(f"{case}: what all of them give")
    given = {name: call() for name, call in calls.items()}  # also their warm-up
    expected = given["hf_loop"].double()
    order = expected.argsort(1)
    for name, scores in given.items():
        same = int((scores.argsort(1) == order).all(1).sum())
        print(f"{case}: {name} ranks the images as hf_loop for {same} of {texts} texts", file=sys.stderr)
    times = report.interleave(calls, repeats, warmup=0, step=lambda what: step(f"{case}: {what}"))
    real = shapes.CASES["b8"]
    patches = [(h // 32) * (w // 32) for h, w in real.sizes[:images]]
    lengths = [len(text) + 1 + p for text in ids for p in patches]
    most = max(patches)
    return [
        _row(
            name, case, f"{texts} texts x {images} images", values, times["hf_padded"],
            report.relative_error(given[name].double(), expected),
            lengths if name != "hf_padded" else [len(text) + 1 + most for text in ids for _ in patches],
            patches if name.startswith("ours") else patches * texts, config,
        )
        for name, values in times.items()
    ]  # fmt: skip


def _row(name, case, shape, values, base, error, lengths, patches, config):
    dtype = name.removeprefix("ours_").split("_")[0]
    dtype = dtype if dtype in report.PRECISIONS else "bfloat16" if name.endswith("bf16") else "float32"
    weight, activation = {"float32": (4, 4), "bfloat16": (2, 2), "int8": (1, 4)}[dtype]
    return {
        "subject": "score", "provider": name, "backend": "torch" if name.startswith("hf") else "cpp",
        "model": "random weights", "case": case, "shape": shape, "dtype": dtype,
        **table.times(report.quantiles(values), report.quantiles(base)[1]),
        "error": error, "flops": shapes.flops(lengths, patches, config),
        "bytes": shapes.traffic(lengths, config, weight, activation),
    }  # fmt: skip


def _jpegs(dtypes, repeats, step):
    model = checkpoint.random_vqa()
    if "int8" not in dtypes:
        return []
    fast = report.accelerated(model, "int8")
    pairs = [(n, n) for n in range(JPEGS)]
    with tempfile.TemporaryDirectory() as folder:
        step("jpegs: photographs")
        paths = photographs(Path(folder))
        draw = torch.Generator().manual_seed(1)
        ids = [torch.randint(1, model.config.vocab_size, (_LENGTHS[n % 8],), generator=draw) for n in range(JPEGS)]
        process = samples.image_processor(model.config)
        calls = {"hf_eager": lambda: _by_huggingface(model, process, ids, paths)}
        for decode in ("exact", "fast"):
            made = vilt_fast.ImageProcessor.from_dict({**process.to_dict(), "decode": decode})
            calls[f"ours_int8_{decode}"] = lambda made=made: _answered(fast, ids, paths, pairs, made)
        given = {name: call() for name, call in calls.items()}
        times = report.interleave(calls, repeats, warmup=0, step=lambda what: step(f"jpegs: {what}"))
        sizes = [process(_opened(path), return_tensors="pt")["pixel_values"].shape[2:] for path in paths]
    patches = [(h // 32) * (w // 32) for h, w in sizes]
    lengths = [len(text) + 1 + p for text, p in zip(ids, patches, strict=True)]
    shape = f"{JPEGS} JPEGs of {MEGAPIXELS[1]}x{MEGAPIXELS[0]}"
    return [
        _row(
            name, "jpegs", shape, values, times["hf_eager"],
            report.relative_error(given[name], given["hf_eager"]), lengths, patches, model.config,
        )
        for name, values in times.items()
    ]  # fmt: skip


def photographs(folder):
    """Paths of JPEGs of 12 megapixels: enlarged photographs with the noise of a camera, so that they are as large."""
    from PIL import Image

    paths, noise = [], np.random.default_rng(0)
    for number, (image, _) in enumerate(samples.scenes(JPEGS)):
        picture = Image.fromarray(image)
        size = MEGAPIXELS[::-1] if picture.width >= picture.height else MEGAPIXELS
        pixels = np.asarray(picture.resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
        pixels += noise.integers(-6, 7, pixels.shape, dtype=np.int16)
        paths.append(folder / f"{number}.jpg")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def _opened(path):
    from PIL import Image

    with Image.open(path) as picture:
        return picture.convert("RGB")


@torch.inference_mode()
def _by_huggingface(model, process, ids, paths):
    best = []
    for text, path in zip(ids, paths, strict=True):
        made = process(_opened(path), return_tensors="pt")
        best.append(model(input_ids=text[None], **made).logits.double().sigmoid().max())
    return torch.stack(best)


def _answered(model, ids, paths, pairs, process):
    found = vilt_fast.score(model, ids, paths, pairs=pairs, processor=process, progress=False)
    return torch.from_numpy(np.array(found.scores[:, 0], np.float64))

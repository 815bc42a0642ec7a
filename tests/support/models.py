"""Tiny ViLT models of every class, batches that are hard on purpose, and the comparison of two models' outputs.

Weights are drawn with standard deviation 0.3: zero-initialised positions and [CLS] would hide bugs. Everything is
float64 unless asked otherwise, so that a difference is a bug and not a rounding.
"""

import copy

import torch
from transformers import (
    ViltConfig,
    ViltForImageAndTextRetrieval,
    ViltForImagesAndTextClassification,
    ViltForMaskedLM,
    ViltForQuestionAnswering,
    ViltForTokenClassification,
    ViltModel,
)

import vilt_fast
from vilt_fast.testing import assert_within_budget, random_weights

KINDS = {
    "trunk": ViltModel,
    "trunk_without_pooler": lambda config: ViltModel(config, add_pooling_layer=False),
    "masked_lm": ViltForMaskedLM,
    "question_answering": ViltForQuestionAnswering,
    "retrieval": ViltForImageAndTextRetrieval,
    "nlvr2": ViltForImagesAndTextClassification,
    "token_classification": ViltForTokenClassification,
}
EXTRAS = {"output_hidden_states": True, "output_attentions": True}
PER_TOKEN = ("masked_lm", "token_classification")  #: kinds whose logits are one row a text token
PATCH, TEXT, CANVAS = 16, 9, (3, 5)
GRIDS = [(3, 5), (2, 4), (3, 5), (1, 1)]  #: patches of each image: two share the largest count, so two are permuted
OTHER_GRIDS = [(1, 2), (2, 5), (3, 3), (2, 5)]  #: of NLVR2's second image, whose largest count is another

#: float64 results agree to so many roundings of the largest value. The only number in the comparison of two float64
#: runs: the two sum in other orders, and a few hundred roundings grow through three blocks.
ROUNDINGS = 4096


def build(kind, dtype=torch.float64, *, seed=0, **config):
    """A tiny model in eval mode."""
    options = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 64,
        "patch_size": PATCH,
        "vocab_size": 50,
        "max_position_embeddings": 12,
        "num_labels": 5,
    }
    if kind == "nlvr2":
        options |= {"num_images": 2, "modality_type_vocab_size": 3}
    model = KINDS[kind](ViltConfig(**options | config))
    return random_weights(model, seed=seed).eval().to(dtype)


def pair(kind, dtype=torch.float64, *, options=None, **config):
    """(HuggingFace's model, the same one accelerated): equal weights, no parameter in common."""
    theirs = build(kind, dtype, **config)
    return theirs, vilt_fast.accelerate(copy.deepcopy(theirs), **{"patch_order": "reference"} | (options or {}))


def rectangles(grids, canvas=CANVAS, scale=PATCH, dtype=torch.long):
    """pixel_mask [B, H, W] with ones on each image."""
    mask = torch.zeros(len(grids), canvas[0] * scale, canvas[1] * scale, dtype=dtype)
    for b, (h, w) in enumerate(grids):
        mask[b, : h * scale, : w * scale] = 1
    return mask


def text_mask():
    """[4, 9]: full; right padded; fully padded; left padded with a hole."""
    mask = torch.ones(4, TEXT, dtype=torch.long)
    mask[1, 5:] = 0
    mask[2] = 0
    mask[3, [0, 1, 4]] = 0
    return mask


def batch(kind, dtype=torch.float64, *, text="ids", image="pixels", canvas=CANVAS, seed=0):
    """Ragged inputs for four samples. `text`: "ids" or "embeds"; `image`: "pixels" or "embeds" (with a keep-mask)."""
    draw = torch.Generator().manual_seed(seed)
    inputs = {
        "attention_mask": text_mask(),
        "token_type_ids": torch.randint(0, 2, (4, TEXT), generator=draw),
    }
    if text == "ids":
        inputs["input_ids"] = torch.randint(0, 50, (4, TEXT), generator=draw)
    else:
        inputs["inputs_embeds"] = torch.randn(4, TEXT, 32, generator=draw, dtype=torch.float64).to(dtype)
    images = (2,) if kind == "nlvr2" else ()
    if image == "pixels":
        size = (canvas[0] * PATCH, canvas[1] * PATCH)
        inputs["pixel_values"] = torch.randn(4, *images, 3, *size, generator=draw, dtype=torch.float64).to(dtype)
        masks = [rectangles(GRIDS, canvas), rectangles(OTHER_GRIDS, canvas)]
    else:
        inputs["image_embeds"] = torch.randn(4, *images, 8, 32, generator=draw, dtype=torch.float64).to(dtype)
        keep = torch.tensor([[1] * 8, [1, 0, 1, 1, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 1]])
        masks = [keep.view(4, 2, 4), keep.flip(1).view(4, 2, 4)]
    inputs["pixel_mask"] = torch.stack(masks, 1) if images else masks[0]
    return inputs


def labels(kind, dtype=torch.float64):
    """Labels for a `batch`; -100 on padded text."""
    draw = torch.Generator().manual_seed(5)
    if kind == "question_answering":
        return torch.rand(4, 5, generator=draw, dtype=torch.float64).to(dtype)
    if kind == "nlvr2":
        return torch.randint(0, 5, (4,), generator=draw)
    if kind in PER_TOKEN:
        return torch.randint(0, 5, (4, TEXT), generator=draw).masked_fill(text_mask() == 0, -100)
    return None


def as_dtype(inputs, dtype):
    """The same inputs with every floating tensor in `dtype`."""
    return {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}


def call(model, inputs, *, seed=3, **more):
    """The model's output under a fixed seed, which decides how the reference permutes patches."""
    torch.manual_seed(seed)
    return model(**inputs, **more)


def trunk_of(model):
    """The `ViltModel` of any kind."""
    return getattr(model, "vilt", model)


def real_positions(model, inputs, *, seed=3):
    """bool [B, L] of each image: where the padded reference holds a real token, by its own embedding module."""
    trunk = trunk_of(model)
    given = dict.fromkeys(("input_ids", "inputs_embeds", "token_type_ids", "attention_mask", "pixel_mask"))
    given |= dict.fromkeys(("pixel_values", "image_embeds")) | inputs
    several = next(
        (True for name, dims in (("pixel_values", 5), ("image_embeds", 4)) if _dims(given[name]) == dims), False
    )
    image = given["pixel_values"] if given["pixel_values"] is not None else given["image_embeds"]
    text = given["input_ids"] if given["input_ids"] is not None else given["inputs_embeds"]
    if given["attention_mask"] is None:
        given["attention_mask"] = torch.ones(text.shape[:2])
    torch.manual_seed(seed)
    masks = []
    for i in range(image.shape[1]) if several else [None]:
        own = {k: given[k] if i is None or given[k] is None else given[k][:, i] for k in _PER_IMAGE}
        if own["pixel_mask"] is None:
            own["pixel_mask"] = torch.ones(len(text), 64, 64)
        with torch.no_grad():
            _, mask = type(trunk.embeddings).forward(
                trunk.embeddings,
                given["input_ids"],
                given["attention_mask"],
                given["token_type_ids"],
                own["pixel_values"],
                own["pixel_mask"],
                given["inputs_embeds"],
                own["image_embeds"],
            )
        masks.append(mask != 0)
    return masks


_PER_IMAGE = ("pixel_values", "pixel_mask", "image_embeds")


def _dims(tensor):
    return None if tensor is None else tensor.dim()


def leaves(output, path=""):
    """(path, tensor) of everything in an output, in order; None stays."""
    if isinstance(output, dict):
        items = output.items()
    elif isinstance(output, list | tuple):
        items = enumerate(output)
    else:
        return [(path, output)]
    return [leaf for key, value in items for leaf in leaves(value, f"{path}.{key}" if path else str(key))]


def only_real(path, tensor, masks, kind):
    """`tensor` with zeros at padded positions, and the mask that says so (None: nothing is padded)."""
    parts = path.split(".")
    mask = masks[int(parts[1]) if kind == "nlvr2" and len(parts) > 2 else 0]
    if parts[0] == "attentions":
        mask = mask[:, None, :, None] & mask[:, None, None, :]
    elif parts[0] in ("last_hidden_state", "hidden_states"):
        mask = mask[:, :, None]
    elif parts[0] == "logits" and kind in PER_TOKEN:
        mask = mask[:, : tensor.shape[1], None]
    else:
        return tensor, None
    return torch.where(mask, tensor, 0), mask


def assert_close(ours, theirs, what=""):
    """Two float64 computations of the same thing, to `ROUNDINGS` of its largest value; NaN in the same places."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, (
        f"{what}: {list(ours.shape)} {ours.dtype} instead of {list(theirs.shape)} {theirs.dtype}"
    )
    if ours.numel() == 0:
        return
    biggest = theirs[theirs.isfinite()].abs().max().item() if theirs.isfinite().any() else 0.0
    allowed = ROUNDINGS * torch.finfo(torch.float64).eps * max(biggest, 1.0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=allowed, equal_nan=True, msg=lambda text: f"{what}: {text}")


def assert_same_structure(ours, theirs):
    """Equal types, keys, shapes and dtypes, all the way down."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert list(ours.keys()) == list(theirs.keys())
    mine, other = leaves(ours), leaves(theirs)
    assert [path for path, _ in mine] == [path for path, _ in other]
    for (path, a), (_, b) in zip(mine, other, strict=True):
        assert (a is None) == (b is None), path
        if a is not None:
            assert (a.shape, a.dtype) == (b.shape, b.dtype), path
    if isinstance(ours, dict):
        for key in ours:
            assert type(ours[key]) is type(theirs[key]), key


def assert_same_output(kind, ours, theirs, masks, *, exact=None):
    """Every tensor agrees on real positions, and ours is zero on padded ones.

    In float64 the two are compared with each other; in any other dtype both are held against `exact`, the reference's
    output in float64.
    """
    assert_same_structure(ours, theirs)
    truths = [None] * len(leaves(ours)) if exact is None else [tensor for _, tensor in leaves(exact)]
    for (path, mine), (_, other), truth in zip(leaves(ours), leaves(theirs), truths, strict=True):
        if mine is None:
            continue
        other, mask = only_real(path, other, masks, kind)
        if mask is not None:
            padded = mine.masked_select(~mask.expand_as(mine))
            assert not padded.any(), f"{path}: padded positions are not zero"
        if exact is None:
            assert_close(mine, other, path)
        else:
            assert_within_budget(mine, other, only_real(path, truth, masks, kind)[0], what=path)


def assert_same_where_real(kind, ours, theirs, masks):
    """Every tensor agrees on real positions; what is at padded ones is nobody's concern."""
    for (path, mine), (_, other) in zip(leaves(ours), leaves(theirs), strict=True):
        if mine is not None:
            assert_close(*(only_real(path, t, masks, kind)[0] for t in (mine, other)), path)


def gradients(model):
    """{name: gradient or None}."""
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(ours, theirs):
    """Every parameter's gradient, to `ROUNDINGS`; one that only one of the two computes must be zero."""
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        mine = ours[name]
        if gradient is None or mine is None:
            present = mine if gradient is None else gradient
            assert present is None or not present.any(), f"{name}: only one of the two has a gradient"
        else:
            assert_close(mine, gradient, name)


def compare(inputs, *, kind="trunk", config=None, change=None, flags=EXTRAS, **more):
    """Both models (each changed by `change(model)`), same inputs and seed, in float64, with and without autograd."""
    theirs, ours = pair(kind, **(config or {}))
    for model in (theirs, ours) if change else ():
        change(model)
    masks = real_positions(theirs, inputs)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            expected, actual = (call(model, inputs, **flags, **more) for model in (theirs, ours))
        assert_same_output(kind, actual, expected, masks)


def assert_follows(kind, models, inputs):
    """The second of two models computes on real positions what the first does, with and without autograd."""
    theirs, ours = models
    masks = real_positions(theirs, inputs)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            expected, actual = call(theirs, inputs), call(ours, inputs)
        assert_same_where_real(kind, actual, expected, masks)


def changed(**new):
    return {k: v for k, v in (batch("trunk") | new).items() if v is not None}

"""patch_embed: reference against HuggingFace's visual embedding, every backend under the error budget."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from transformers import ViltConfig
from transformers.models.vilt.modeling_vilt import ViltEmbeddings

from vilt_fast import functional
from vilt_fast.reference.encoder import quantized_channels, quantized_rows
from vilt_fast.testing import assert_within_budget, opcheck, packing_indices, random_weights, sliced, strided

PATCH, WIDTH, TABLE = 4, 12, (3, 3)
GRIDS = [(3, 3), (2, 5), (1, 1), (4, 1)]
CANVAS = (4, 5)
TEXTS = [2, 0, 1, 3]
INDICES = ("text_rows", "patch_source", "patch_rows", "patch_sample", "pos_index", "cls_rows", "modality_index")
FLOATS = ("pixels", "weight", "bias", "cls_token", "position", "modality", "text")


def _arguments(
    dtype=torch.float64, *, chosen=None, query_rows=0, canvas=CANVAS, grids=GRIDS, texts=TEXTS, spare=(0, 0)
):
    size = (canvas[0] * PATCH + spare[0], canvas[1] * PATCH + spare[1])
    shapes = dict(
        pixels=(len(grids), 3, *size), weight=(WIDTH, 3, PATCH, PATCH), bias=(WIDTH,), cls_token=(WIDTH,),
        position=(1 + TABLE[0] * TABLE[1], WIDTH), modality=(3, WIDTH), text=(sum(texts), WIDTH),
    )  # fmt: skip
    floats = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    indices = packing_indices(texts, grids, canvas=canvas, table=TABLE, chosen=chosen, query_rows=query_rows)
    indices["modality_index"][1::2] = 2  # as for the second image of NLVR2
    return floats | indices


def _cast(arguments, dtype):
    return {name: t.to(dtype) if name in FLOATS else t for name, t in arguments.items()}


def test_reference_is_huggingface():
    config = ViltConfig(
        hidden_size=WIDTH,
        num_attention_heads=2,
        image_size=PATCH * 3,
        patch_size=PATCH,
        max_image_length=-1,
        modality_type_vocab_size=3,
    )
    module = random_weights(ViltEmbeddings(config)).double().eval()
    arguments = _arguments()
    pixels = arguments["pixels"]
    mask = torch.zeros(4, pixels.shape[2], pixels.shape[3], dtype=torch.long)
    for b, (h, w) in enumerate(GRIDS):
        mask[b, : h * PATCH, : w * PATCH] = 1
    # HuggingFace returns patches in random order; visual_embed also returns which patch each row is.
    rows, keep, (cells, _) = module.visual_embed(pixels, mask, max_image_length=-1)
    modality = module.token_type_embeddings.weight
    arguments |= dict(
        weight=module.patch_embeddings.projection.weight, bias=module.patch_embeddings.projection.bias,
        cls_token=module.cls_token[0, 0], position=module.position_embeddings[0], modality=modality,
    )  # fmt: skip
    got = functional.patch_embed(**arguments, backend="reference")
    placed = 0
    for b, (_, w) in enumerate(GRIDS):
        start, kind = int(arguments["cls_rows"][b]), modality[1 + b % 2]
        torch.testing.assert_close(got[start], rows[b, 0] + kind, rtol=1e-12, atol=1e-12)
        for row, cell, real in zip(rows[b, 1:], cells[b], keep[b, 1:], strict=True):
            if real:
                at = start + 1 + int(cell[0]) * w + int(cell[1])
                # pos_weight is float32, the module interpolates in float64.
                torch.testing.assert_close(got[at], row + kind, rtol=0, atol=1e-6)
                placed += 1
    assert placed == sum(h * w for h, w in GRIDS)
    assert torch.equal(got[arguments["text_rows"]], arguments["text"])


def test_reference_is_a_convolution_plus_an_interpolation():
    arguments = _arguments(canvas=(4, 5), grids=[(4, 5)], texts=[0])
    arguments["pos_weight"] = arguments["pos_weight"].double()
    got = functional.patch_embed(**arguments)
    patches = F.conv2d(arguments["pixels"], arguments["weight"], arguments["bias"], stride=PATCH)
    table = arguments["position"][1:].T.reshape(1, WIDTH, *TABLE)
    place = F.interpolate(table, size=(4, 5), mode="bilinear", align_corners=True)
    want = (patches + place)[0].flatten(1).T + arguments["modality"][1]
    torch.testing.assert_close(got[1:], want, rtol=0, atol=1e-6)  # pos_weight holds float32 values


def test_gradients():
    arguments = _arguments(grids=[(1, 2), (2, 1)], texts=[1, 0], canvas=(2, 2), query_rows=1)
    rest = {name: t for name, t in arguments.items() if name not in FLOATS}
    inputs = [arguments[name].requires_grad_() for name in FLOATS]
    assert gradcheck(
        lambda *t: functional.patch_embed(**dict(zip(FLOATS, t, strict=True)), **rest), inputs, fast_mode=True
    )


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@torch.no_grad()
def test_pixels_outside_the_listed_patches_have_no_effect(backend):
    arguments = _arguments(torch.float32, chosen=2, spare=(3, 1))
    want = functional.patch_embed(**arguments, backend=backend)
    listed = torch.zeros(4 * CANVAS[0] * CANVAS[1], dtype=torch.bool)
    listed[arguments["patch_source"]] = True
    kept = listed.reshape(4, 1, *CANVAS).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    kept = F.pad(kept, (0, 1, 0, 3)).expand_as(arguments["pixels"])
    arguments["pixels"] = arguments["pixels"].masked_fill(~kept, float("nan"))
    got = functional.patch_embed(**arguments, backend=backend)
    assert torch.equal(got, want) and got.isfinite().all()


def test_gradient_of_unlisted_pixels_is_zero_even_when_they_are_nan():
    arguments = _arguments(chosen=1)
    arguments["pixels"][2, :, PATCH:] = float("nan")
    arguments["pixels"].requires_grad_()
    functional.patch_embed(**arguments).sum().backward()
    assert arguments["pixels"].grad.isfinite().all()


@pytest.mark.parametrize("layout", [lambda t: t, strided, sliced], ids=["dense", "strided", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chosen": 3, "query_rows": 1},
        {"spare": (3, 2)},
        {"grids": [(1, 1)], "texts": [0], "canvas": (1, 1)},
        {"grids": [(0, 0), (2, 2)], "texts": [2, 1], "canvas": (2, 2)},
    ],
    ids=["ragged", "sampled", "odd size", "one", "no patches"],
)
@torch.no_grad()
def test_cpp_within_budget(options, dtype, layout):
    arguments = _arguments(dtype, **options)
    plain = functional.patch_embed(**arguments, backend="reference")
    exact = functional.patch_embed(**_cast(arguments, torch.float64), backend="reference")
    hostile = {name: layout(t) if name in FLOATS else t for name, t in arguments.items()}
    got = functional.patch_embed(**hostile, backend="cpp")
    assert got.dtype == dtype
    assert_within_budget(got, plain, exact, what="patch_embed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"chosen": 3, "query_rows": 1}, {"spare": (3, 2)}], ids=["all", "some", "odd"])
def test_cpp_gradients_within_budget(options, dtype):
    arguments = _arguments(dtype, **options)
    arguments["patch_source"][1] = arguments["patch_source"][0]  # a patch that two rows show
    found = []
    for backend, compute in (("cpp", dtype), ("reference", dtype), ("reference", torch.float64)):
        given = arguments | {n: arguments[n].detach().to(compute).requires_grad_() for n in FLOATS}
        rows = functional.patch_embed(**given, backend=backend)
        weight = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)).to(rows.dtype)
        found.append(torch.autograd.grad((rows * weight).sum(), [given[n] for n in FLOATS]))
    for name, *three in zip(FLOATS, *found, strict=True):
        assert_within_budget(*three, what=name)


def test_cpp_gradients_of_what_is_there_and_wanted():
    arguments = _arguments(torch.float32) | ALONE | BARE | {"bias": None}
    found = []
    for backend in ("cpp", "reference"):
        given = arguments | {"weight": arguments["weight"].clone().requires_grad_()}
        functional.patch_embed(**given, backend=backend).square().sum().backward()
        found.append(given["weight"].grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


ALONE = dict(text=None, text_rows=None)
BARE = dict(modality=None, modality_index=None)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_images_without_text_or_modality(backend, dtype):
    arguments = _arguments(dtype, chosen=3)
    whole = functional.patch_embed(**arguments, backend=backend)
    alone = functional.patch_embed(**arguments | ALONE, backend=backend)
    image = torch.cat([arguments["patch_rows"], arguments["cls_rows"]])
    assert torch.equal(alone[image], whole[image]) and not alone[arguments["text_rows"]].any()
    zeros = arguments | {"modality": torch.zeros_like(arguments["modality"])}
    bare = functional.patch_embed(**arguments | BARE, backend=backend)
    assert torch.equal(bare, functional.patch_embed(**zeros, backend=backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_weight_of_8_bits_rounds_patches_and_channels_to_levels(dtype):
    arguments = _arguments(dtype, chosen=3, query_rows=1, spare=(3, 2))
    exact = functional.patch_embed(**_cast(arguments, torch.float64), backend="reference")
    # The same arithmetic in plain PyTorch: each patch and each channel rounded, multiplied as they are then.
    patches = _cast(arguments, torch.float64) | {"weight": quantized_channels(arguments["weight"].double().flatten(1))}
    cells = F.unfold(arguments["pixels"].double(), PATCH, stride=PATCH).transpose(1, 2)
    rounded = F.fold(quantized_rows(cells).transpose(1, 2), [n // PATCH * PATCH for n in arguments["pixels"].shape[2:]],
                     PATCH, stride=PATCH)  # fmt: skip
    patches |= {"weight": patches["weight"].view(arguments["weight"].shape), "pixels": rounded}
    emulated = functional.patch_embed(**patches, backend="reference")
    blob = arguments | {"weight": functional.quantize_linear(arguments["weight"].flatten(1))}
    got = functional.patch_embed(**blob)
    assert got.dtype == dtype
    assert_within_budget(got, emulated, exact)
    assert not torch.allclose(got, functional.patch_embed(**arguments), rtol=1e-5)  # it really is 8 bits
    with pytest.raises(RuntimeError, match="belong to the cpp backend"):
        functional.patch_embed(**blob, backend="reference")
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no gradient"):
        functional.patch_embed(**blob | {"text": arguments["text"].clone().requires_grad_()}, backend="cpp")
    for weight, message in (
        (blob["weight"][:-1], "no blob"),
        (functional.quantize_linear(torch.randn(12, 50)), "matrix"),
    ):
        with pytest.raises(ValueError, match=message):
            functional.patch_embed(**blob | {"weight": weight})


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("chosen", [None, 2])
def test_patches_that_are_cut_out_are_those_of_the_images(backend, chosen):
    arguments = _arguments(torch.float32, chosen=chosen)
    pixels, source = arguments["pixels"], arguments["patch_source"]
    cells = pixels.unflatten(3, (CANVAS[1], PATCH)).unflatten(2, (CANVAS[0], PATCH)).permute(0, 2, 4, 1, 3, 5)
    cut_out = cells.flatten(0, 2)[source]
    spare = torch.full((3, *cut_out.shape[1:]), float("nan"))  # which nobody lists
    whole = functional.patch_embed(**arguments, backend=backend)
    arguments |= {"pixels": torch.cat([cut_out, spare]), "patch_source": torch.arange(len(source))}
    found = functional.patch_embed(**arguments, backend=backend)
    torch.testing.assert_close(found, whole, rtol=0, atol=0)
    arguments["pixels"] = F.pad(arguments["pixels"], (0, PATCH))
    with pytest.raises(ValueError, match=f"there are {len(source) + 3} images and {len(GRIDS)} cls_rows"):
        functional.patch_embed(**arguments, backend=backend)


def test_text_and_modality_come_in_pairs():
    arguments = _arguments(torch.float32)
    for name in (*ALONE, *BARE):
        with pytest.raises(ValueError, match="belong together; give both or neither"):
            functional.patch_embed(**arguments | {name: None})


@torch.no_grad()
def test_second_image_and_output_dtype():
    arguments = _arguments(torch.float32)
    arguments["modality"][2] += 100
    for backend in ("reference", "cpp"):
        x = functional.patch_embed(**arguments, out_dtype=torch.bfloat16, backend=backend)
        assert x.dtype == torch.bfloat16
        assert (x[arguments["cls_rows"]].mean(1) > 50).tolist() == [False, True, False, True]


def test_dropout_is_before_the_modality_row():
    arguments = _arguments(grids=[(4, 5)], texts=[0])
    kept = functional.patch_embed(**arguments) - arguments["modality"][1]
    drawn = functional.patch_embed(**arguments, dropout_p=0.5) - arguments["modality"][1]
    dropped = drawn.abs() < 1e-12
    torch.testing.assert_close(drawn[~dropped], 2 * kept[~dropped])
    assert 0.3 < dropped.double().mean() < 0.7


@torch.no_grad()
def test_registered_op():
    arguments = _arguments(torch.float32, query_rows=1)
    opcheck("patch_embed", "cpp", **arguments, dropout_p=0.0, out_dtype=torch.float32)
    trained = arguments | {n: arguments[n].clone().requires_grad_() for n in FLOATS}
    with torch.enable_grad():
        opcheck("patch_embed", "cpp", keep=True, **trained, dropout_p=0.0, out_dtype=torch.float32)
    compiled = torch.compile(lambda a: functional.patch_embed(**a) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(arguments), functional.patch_embed(**arguments, backend="cpp") * 2)


def test_bad_input():
    arguments = _arguments(torch.float32)
    for name, wrong, message in (
        ("pixels", arguments["pixels"][:, :2], "pixels has shape"),
        ("position", arguments["position"][:, :3], "position has shape"),
        ("pos_index", arguments["pos_index"][:, :3], "pos_index has shape"),
        ("total_rows", 5, "total_rows is 5"),
    ):
        with pytest.raises(ValueError, match=message):
            functional.patch_embed(**(arguments | {name: wrong}))
    with pytest.raises(TypeError, match="patch_rows is torch.int32"):
        functional.patch_embed(**(arguments | {"patch_rows": arguments["patch_rows"].int()}))
    with torch.no_grad():
        for name in INDICES:
            with pytest.raises(IndexError, match=name):
                functional.patch_embed(**(arguments | {name: arguments[name] + 1000}), backend="cpp")
        with pytest.raises(RuntimeError, match="no dropout"):
            functional.patch_embed(**arguments, dropout_p=0.1, backend="cpp")

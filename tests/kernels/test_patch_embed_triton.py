"""patch_embed in Triton: interpreter on the CPU, the same tests on a GPU where there is one; bfloat16 only there."""

import pytest
import torch
import torch.nn.functional as F
from support.triton_case import compiles_ahead_of_time, names_every_argument

from vilt_fast import functional
from vilt_fast.kernels import _device
from vilt_fast.kernels import patch_embed as kernels
from vilt_fast.kernels import patch_embed_bwd as backward
from vilt_fast.testing import assert_within_budget, opcheck, packing_indices, sliced, strided

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TABLE = (3, 3)
FLOATS = ("pixels", "weight", "bias", "cls_token", "position", "modality", "text")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
CASES = {
    "ragged": {},
    "sampled": {"chosen": 3, "query_rows": 1},
    "odd size": {"spare": (3, 2)},
    "not square": {"patch": (4, 2)},
    "one": {"grids": [(1, 1)], "texts": [0], "canvas": (1, 1)},
    "no patches": {"grids": [(0, 0), (0, 0)], "texts": [2, 1], "canvas": (2, 2)},
    "no bias": {"bias": False},
    "many": {"grids": [(4, 5)] * 4, "width": 33},
}


@pytest.fixture(params=["shipped", "one split", "three splits"])
def tiles(request, monkeypatch):
    """The shipped tiles hold these small shapes in one; small ones have several of everything, and ragged ends."""
    if request.param != "shipped":
        splits = 1 if request.param == "one split" else 3
        small = dict(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, SPLITS=splits, num_warps=1, num_stages=1)
        rows = dict(BLOCK_M=2, BLOCK_N=8, num_warps=1)
        monkeypatch.setattr(kernels, "fwd_config", lambda *_: small)
        monkeypatch.setattr(kernels, "ROWS", rows)
        monkeypatch.setattr(backward, "weight_config", lambda *_: small)
        monkeypatch.setattr(backward, "ROWS", rows)
        table = dict(BLOCK_T=16, BLOCK_M=16, BLOCK_N=16, num_warps=1, num_stages=1)
        monkeypatch.setattr(backward, "TABLE", table)


def _arguments(
    dtype, *, grids=((3, 3), (2, 5), (1, 1), (4, 1)), texts=(2, 0, 1, 3), canvas=(4, 5), patch=(4, 4), spare=(0, 0),
    width=12, chosen=None, query_rows=0, bias=True,
):  # fmt: skip
    size = (canvas[0] * patch[0] + spare[0], canvas[1] * patch[1] + spare[1])
    texts = texts[: len(grids)]
    shapes = dict(
        pixels=(len(grids), 3, *size), weight=(width, 3, *patch), bias=(width,), cls_token=(width,),
        position=(1 + TABLE[0] * TABLE[1], width), modality=(3, width), text=(sum(texts), width),
    )  # fmt: skip
    floats = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    if not bias:
        floats["bias"] = None
    indices = packing_indices(texts, grids, canvas=canvas, table=TABLE, chosen=chosen, query_rows=query_rows)
    indices["modality_index"][1::2] = 2
    return {name: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for name, t in (floats | indices).items()}


def _run(arguments, backend, dtype=None, **options):
    """Output and gradients by name; the gradient that comes in is the same for every backend and dtype."""
    given = dict(arguments)
    for name in FLOATS:
        if given[name] is not None:
            given[name] = given[name].detach().to(dtype or given[name].dtype)
            if given[name].is_floating_point():
                given[name].requires_grad_()
    for name in ("pixel_scale", "pixel_shift"):
        if options.get(name) is not None and dtype is not None:
            options[name] = options[name].to(dtype)
    out = functional.patch_embed(**given, **options, backend=backend)
    incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(torch.float16).to(DEVICE)
    out.backward(incoming.to(out.dtype))
    grads = {name: given[name].grad for name in FLOATS if given[name] is not None}
    return {"out": out} | {f"gradient of {name}": grad for name, grad in grads.items() if grad is not None}


def _check(arguments, **options):
    exact_options = options | ({"out_dtype": torch.float64} if "out_dtype" in options else {})
    exact = dict(arguments)
    if arguments["pixels"].dtype == torch.uint8:  # stays uint8: only the tables are cast
        exact = {n: t.double() if n in FLOATS[1:] and t is not None else t for n, t in arguments.items()}
        exact_options |= {n: options[n].double() for n in ("pixel_scale", "pixel_shift")}
        right = _run(exact, "reference", **exact_options)
    else:
        right = _run(exact, "reference", torch.float64, **exact_options)
    got, plain = _run(arguments, "triton", **options), _run(arguments, "reference", **options)
    assert got.keys() == plain.keys() == right.keys()
    for name in got:
        assert got[name].dtype == plain[name].dtype, name
        assert_within_budget(got[name], plain[name], right[name], what=name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_within_budget(tiles, dtype, case):
    _check(_arguments(dtype, **CASES[case]))


@pytest.mark.parametrize("absent", [("text", "text_rows"), ("modality", "modality_index")])
def test_without_text_or_modality(tiles, absent):
    _check(_arguments(torch.float32, chosen=3) | dict.fromkeys(absent))


@pytest.mark.parametrize("layout", [strided, sliced])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype, layout):
    arguments = _arguments(dtype, chosen=3)
    hostile = {name: layout(t.cpu()).to(DEVICE) if name in FLOATS else t for name, t in arguments.items()}
    hostile["pixels"] = hostile["pixels"].transpose(2, 3).contiguous().transpose(2, 3)
    dense, other = _run(arguments, "triton"), _run(hostile, "triton")
    for name in dense:
        assert torch.equal(dense[name], other[name]), name


def test_mixed_dtypes():
    arguments = _arguments(torch.float16, query_rows=1)
    for name in ("pixels", "cls_token", "modality", "text"):
        arguments[name] = arguments[name].float() * 1.001
    _check(arguments, out_dtype=torch.float32)


def test_uint8_pixels_are_normalised_on_the_way_in():
    arguments = _arguments(torch.float32, spare=(1, 3))
    arguments["pixels"] = torch.randint(256, arguments["pixels"].shape, dtype=torch.uint8).to(DEVICE)
    scale, shift = (torch.tensor(v, device=DEVICE) for v in ([0.01, 0.02, 0.005], [-1.0, 0.5, 0.0]))
    _check(arguments, pixel_scale=scale, pixel_shift=shift)
    want = arguments["pixels"].float() * scale[:, None, None] + shift[:, None, None]
    want = functional.patch_embed(**(arguments | {"pixels": want}), backend="reference")
    got = functional.patch_embed(**arguments, pixel_scale=scale, pixel_shift=shift, backend="reference")
    torch.testing.assert_close(got, want)


def test_what_is_not_listed_has_no_effect(tiles):
    arguments = _arguments(torch.float32, chosen=2, spare=(3, 1), query_rows=2)
    want = _run(arguments, "triton")
    listed = torch.zeros(4 * 4 * 5, dtype=torch.bool, device=DEVICE)
    listed[arguments["patch_source"]] = True
    kept = listed.reshape(4, 1, 4, 5).repeat_interleave(4, 2).repeat_interleave(4, 3)
    kept = F.pad(kept, (0, 1, 0, 3)).expand_as(arguments["pixels"])
    arguments["pixels"] = arguments["pixels"].masked_fill(~kept, float("nan"))
    got = _run(arguments, "triton")
    for name in want:
        assert torch.equal(got[name], want[name]) and got[name].isfinite().all(), name
    rows = torch.cat([arguments[name] for name in ("text_rows", "patch_rows", "cls_rows")])
    nobody = torch.ones(len(got["out"]), dtype=torch.bool, device=DEVICE).index_fill(0, rows, False)
    assert nobody.sum() == 8 and not got["out"][nobody].any()

    given = {name: t.requires_grad_() if name in FLOATS else t for name, t in arguments.items()}
    out = functional.patch_embed(**given, backend="triton")
    out.backward(torch.where(nobody[:, None], float("nan"), torch.ones_like(out)))
    assert all(given[name].grad.isfinite().all() for name in FLOATS)


def test_dropout(tiles):
    arguments = _arguments(torch.float32, grids=[(3, 3)] * 4, width=20)
    arguments["modality_index"][:] = 1
    for name in FLOATS:
        arguments[name].requires_grad_()
    drawn, again = (functional.patch_embed(**arguments, dropout_p=0.25, backend="triton") for _ in range(2))
    assert not torch.equal(drawn, again)
    image = torch.cat([arguments["patch_rows"], arguments["cls_rows"]])
    dropped = torch.zeros_like(drawn, dtype=torch.bool)
    dropped[image] = drawn[image] == arguments["modality"][1]
    assert 0.2 < dropped[image].double().mean() < 0.3
    incoming = torch.randn_like(drawn)

    def written_out(dtype):
        """The same elements dropped, forward and every gradient."""
        given = arguments | {name: arguments[name].detach().to(dtype).requires_grad_() for name in FLOATS}
        plain = functional.patch_embed(**given, backend="reference")
        kind = torch.zeros_like(plain).index_add(0, image, given["modality"][1].expand(len(image), -1))
        factors = torch.ones_like(plain)
        factors[image] = (~dropped[image]).to(dtype) / 0.75
        out = (plain - kind) * factors + kind
        return out, *torch.autograd.grad(out, [given[name] for name in FLOATS], incoming.to(dtype))

    got = (drawn, *torch.autograd.grad(drawn, [arguments[name] for name in FLOATS], incoming))
    checks = zip(("out", *FLOATS), got, written_out(torch.float32), written_out(torch.float64), strict=True)
    for name, actual, plain, exact in checks:
        assert_within_budget(actual, plain, exact, what=name)


def test_equal_seeds_drop_the_same_whatever_the_tiles(monkeypatch):
    arguments, dropped = _arguments(torch.float32), []
    arguments["modality"].zero_()
    for splits, block in ((1, 16), (2, 16), (1, 32)):
        config = dict(BLOCK_M=block, BLOCK_N=block, BLOCK_K=16, SPLITS=splits, num_warps=1)
        monkeypatch.setattr(kernels, "fwd_config", lambda *_, config=config: config)
        torch.manual_seed(5)
        dropped.append(functional.patch_embed(**arguments, dropout_p=0.5, backend="triton") == 0)
    assert dropped[0].any() and all(torch.equal(other, dropped[0]) for other in dropped)


@pytest.mark.gpu
@torch.no_grad()
def test_cuda_graph():
    arguments = _arguments(torch.float16)
    functional.patch_embed(**arguments, backend="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = functional.patch_embed(**arguments, backend="triton")
    arguments["pixels"].normal_()
    graph.replay()
    assert torch.equal(out, functional.patch_embed(**arguments, backend="triton"))


def test_gradients_are_bitwise_repeatable():
    arguments = _arguments(torch.float16, grids=[(4, 5)] * 4)
    first, second = _run(arguments, "triton"), _run(arguments, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_what_is_needed_gets_a_gradient():
    arguments = _arguments(torch.float32)
    arguments["bias"].requires_grad_()
    functional.patch_embed(**arguments, backend="triton").square().sum().backward()
    assert arguments["bias"].grad.any() and all(arguments[n].grad is None for n in FLOATS if n != "bias")


def test_registered_op():
    arguments = _arguments(torch.float32, query_rows=1)
    for name in FLOATS:
        arguments[name].requires_grad_()
    seed = torch.tensor([7], device=DEVICE)
    more = dict(dropout_p=0.25, out_dtype=torch.float32, seed=seed)
    opcheck("patch_embed", "triton", keep=True, **arguments, **more)
    alone = dict(modality=None, modality_index=None, text=None, text_rows=None)
    opcheck("patch_embed", "triton", keep=True, **arguments | alone, **more)

    def loss(given):
        return functional.patch_embed(**given, backend="triton").square().mean()

    want, got = loss(arguments), torch.compile(loss, fullgraph=True, backend="aot_eager")(arguments)
    assert torch.equal(got, want)
    tables = [arguments[name] for name in FLOATS]
    for name, a, b in zip(FLOATS, torch.autograd.grad(got, tables), torch.autograd.grad(want, tables), strict=True):
        assert torch.equal(a, b), name


def test_bad_input(monkeypatch):
    arguments = _arguments(torch.float32)
    with pytest.raises(RuntimeError, match="float64, expected float32, float16 or bfloat16"):
        functional.patch_embed(**(arguments | {"position": arguments["position"].double()}), backend="triton")
    bytes_ = arguments | {"pixels": arguments["pixels"].to(torch.uint8)}
    scale = torch.ones(3, device=DEVICE)
    for wrong in (bytes_, bytes_ | {"pixel_scale": scale}, arguments | dict(pixel_scale=scale, pixel_shift=scale)):
        with pytest.raises(ValueError, match="belong to uint8 pixels"):
            functional.patch_embed(**wrong, backend="triton")
    monkeypatch.setattr(_device, "interpreted", lambda: False)
    arguments = {name: t.cpu() if isinstance(t, torch.Tensor) else t for name, t in arguments.items()}
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        functional.patch_embed(**arguments, backend="triton")


def test_ahead_of_time():
    for module in (kernels, backward):
        assert all(map(names_every_argument, module.aot_cases()))
    assert compiles_ahead_of_time("patch_embed") == 2
    assert compiles_ahead_of_time("patch_embed_bwd") == 3


def test_one_split_compiles_without_partial_sums():
    """As it is launched from 4097 patches on. The interpreter cannot tell: it never enters a branch not taken."""
    single = [case for case in kernels.aot_cases() if case["constexprs"]["SPLITS"] == 1]
    assert {case["kernel"] for case in single} == {kernels._patch_embed_fwd_kernel, kernels._patch_embed_rows_kernel}
    assert all(case["constexprs"]["partial"] is None for case in single)
    assert compiles_ahead_of_time("patch_embed", (90,), named="n=9216") == 2

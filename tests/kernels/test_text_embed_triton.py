"""text_embed in Triton: interpreter on the CPU, the same tests on a GPU where there is one; bfloat16 only there."""

import pytest
import torch
from support.triton_case import compiles_ahead_of_time, names_every_argument

from vilt_fast import functional
from vilt_fast.kernels import _device
from vilt_fast.kernels import text_embed as kernels
from vilt_fast.testing import assert_within_budget, opcheck, sliced, strided

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
TABLES = ("word", "position", "token_type", "ln_weight", "ln_bias", "modality")


def _arguments(dtype, *, rows=75, width=20, types=True, embeds=False, ids=torch.int64):
    """Ids 0 and 4 come often, one sorts last, so that runs of equal ids are long, short and at the end."""
    words = torch.randint(1, 30, (rows,))
    words[::3], words[1::5], words[2::31] = 4, 0, 29
    shapes = dict(word=(30, width), position=(9, width), token_type=(2, width), ln_weight=(width,), ln_bias=(width,))
    arguments = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    arguments["modality"] = torch.randn(3, width).to(dtype)
    arguments["input_ids"] = None if embeds else words.to(ids)
    arguments["inputs_embeds"] = torch.randn(rows, width).to(dtype) if embeds else None
    arguments["position_ids"] = (torch.arange(rows) % 9).to(ids)
    arguments["token_type_ids"] = torch.randint(2, (rows,)).to(ids) if types else None
    arguments = {name: t if t is None else t.to(DEVICE) for name, t in arguments.items()}
    return arguments | dict(eps=1e-12, padding_idx=0)


def _run(arguments, backend, dtype=None, **options):
    given = dict(arguments)
    leaves = [name for name, t in given.items() if isinstance(t, torch.Tensor) and t.is_floating_point()]
    for name in leaves:
        given[name] = given[name].detach().to(dtype or given[name].dtype).requires_grad_()
    out = functional.text_embed(**given, **options, backend=backend)
    incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(torch.float16).to(DEVICE)
    out.backward(incoming.to(out.dtype))
    return {"out": out} | {f"gradient of {name}": given[name].grad for name in leaves}


def _check(arguments, **options):
    right = _run(arguments, "reference", torch.float64)
    got, plain = _run(arguments, "triton", **options), _run(arguments, "reference")
    for name, exact in right.items():
        if exact is None:  # the word table, where embeddings are given
            assert got[name] is None
            continue
        assert got[name].dtype == plain[name].dtype, name
        assert_within_budget(got[name], plain[name], exact, what=name)
    return got


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"types": False, "ids": torch.int32}, {"embeds": True}, {"width": 33, "rows": 1}]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_within_budget(dtype, options, deterministic):
    got = _check(_arguments(dtype, **options), deterministic=deterministic)
    if not options.get("embeds"):
        assert not got["gradient of word"][0].any()  # the padding row


def test_without_modality():
    _check(_arguments(torch.float32) | {"modality": None})


def test_small_tiles(monkeypatch):
    # Several blocks of rows, of columns, of table rows and several splits, all ragged.
    monkeypatch.setattr(kernels, "WORD", dict(BLOCK_M=2, BLOCK_N=8, num_warps=1))
    monkeypatch.setattr(kernels, "TABLE", dict(BLOCK_T=16, BLOCK_M=16, BLOCK_N=16, num_warps=1, num_stages=1))
    arguments = _arguments(torch.float32, rows=515, width=9)
    arguments["position"] = torch.randn(40, 9).to(DEVICE)
    _check(arguments)


def test_given_embeddings_of_another_dtype():
    arguments = _arguments(torch.float32, embeds=True)
    arguments["inputs_embeds"] = arguments["inputs_embeds"].half()
    _check(arguments)


@pytest.mark.parametrize("layout", [strided, sliced])
def test_any_strides(layout):
    arguments = _arguments(torch.float32)
    hostile = {name: layout(t.cpu()).to(DEVICE) if name in TABLES else t for name, t in arguments.items()}
    hostile["input_ids"] = hostile["input_ids"].repeat_interleave(2)[::2]
    dense, other = _run(arguments, "triton"), _run(hostile, "triton")
    assert all(torch.equal(dense[name], other[name]) for name in dense)


def test_nan_stays_in_its_row():
    arguments = _arguments(torch.float32)
    want = _run(arguments, "triton")["out"]
    arguments["word"][4] = float("nan")
    got = _run(arguments, "triton")["out"]
    hit = arguments["input_ids"] == 4
    assert got[hit].isnan().all() and torch.equal(got[~hit], want[~hit])


@pytest.mark.parametrize("embeds", [False, True])
def test_dropout(embeds):
    arguments = _arguments(torch.float32, embeds=embeds, width=33)
    names = [name for name in (*TABLES, "inputs_embeds") if arguments[name] is not None]
    names = [name for name in names if not (embeds and name == "word")]
    for name in names:
        arguments[name].requires_grad_()
    drawn, again = (functional.text_embed(**arguments, dropout_p=0.25, backend="triton") for _ in range(2))
    assert not torch.equal(drawn, again)
    dropped = drawn == arguments["modality"][0]
    assert 0.2 < dropped.double().mean() < 0.3
    incoming = torch.randn_like(drawn)

    def written_out(dtype):
        """The same elements dropped, forward and every gradient."""
        given = arguments | {name: arguments[name].detach().to(dtype).requires_grad_() for name in names}
        if embeds:
            given["word"] = given["word"].to(dtype)
        kind = given["modality"][0]
        out = (functional.text_embed(**given, backend="reference") - kind) * (~dropped).to(dtype) / 0.75 + kind
        return out, *torch.autograd.grad(out, [given[name] for name in names], incoming.to(dtype))

    got = (drawn, *torch.autograd.grad(drawn, [arguments[name] for name in names], incoming))
    checks = zip(("out", *names), got, written_out(torch.float32), written_out(torch.float64), strict=True)
    for name, actual, plain, exact in checks:
        assert_within_budget(actual, plain, exact, what=name)


def test_equal_seeds_drop_the_same():
    arguments, outputs = _arguments(torch.float32), []
    for _ in range(2):
        torch.manual_seed(5)
        outputs.append(functional.text_embed(**arguments, dropout_p=0.5, backend="triton"))
    assert torch.equal(*outputs)


@pytest.mark.gpu
@torch.no_grad()
def test_cuda_graph():
    arguments = _arguments(torch.float16)
    functional.text_embed(**arguments, backend="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = functional.text_embed(**arguments, backend="triton")
    arguments["input_ids"].copy_(arguments["input_ids"].flip(0))
    graph.replay()
    assert torch.equal(out, functional.text_embed(**arguments, backend="triton"))


def test_gradients_are_bitwise_repeatable():
    arguments = _arguments(torch.float16)
    first, second = _run(arguments, "triton"), _run(arguments, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_text():
    got = _run(_arguments(torch.float32, rows=0), "triton")
    assert got.pop("out").shape == (0, 20)
    assert not any(grad.any() for grad in got.values())


def test_only_what_is_needed_gets_a_gradient():
    arguments = _arguments(torch.float32)
    arguments["ln_bias"].requires_grad_()
    functional.text_embed(**arguments, backend="triton").square().sum().backward()
    assert arguments["ln_bias"].grad.any() and all(arguments[n].grad is None for n in TABLES if n != "ln_bias")


def test_registered_op():
    arguments = _arguments(torch.float32, rows=3, width=8)
    for name in TABLES:
        arguments[name].requires_grad_()
    seed = torch.tensor([7], device=DEVICE)
    more = dict(out_dtype=torch.float32, eps=1e-5, padding_idx=0, dropout_p=0.25, deterministic=True, seed=seed)
    opcheck("text_embed", "triton", keep=True, **arguments | more)
    opcheck("text_embed", "triton", keep=True, **arguments | more | dict(modality=None))

    def loss(given):
        return functional.text_embed(**given, backend="triton").square().mean()

    want, got = loss(arguments), torch.compile(loss, fullgraph=True, backend="aot_eager")(arguments)
    assert torch.equal(got, want)
    tables = [arguments[name] for name in TABLES]
    for name, a, b in zip(TABLES, torch.autograd.grad(got, tables), torch.autograd.grad(want, tables), strict=True):
        assert torch.equal(a, b), name


def test_bad_input(monkeypatch):
    arguments = _arguments(torch.float32)
    with pytest.raises(RuntimeError, match="float64, expected float32, float16 or bfloat16"):
        functional.text_embed(**(arguments | {"ln_bias": arguments["ln_bias"].double()}), backend="triton")
    with pytest.raises(RuntimeError, match="20000 columns"):
        functional.text_embed(**_arguments(torch.float32, rows=1, width=20000), backend="triton")
    arguments = {name: t.cpu() if isinstance(t, torch.Tensor) else t for name, t in arguments.items()}
    with pytest.raises(IndexError, match="input_ids holds 30"):
        functional.text_embed(**(arguments | {"input_ids": arguments["input_ids"] + 1}), backend="triton")
    monkeypatch.setattr(_device, "interpreted", lambda: False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        functional.text_embed(**arguments, backend="triton")


def test_ahead_of_time():
    assert all(map(names_every_argument, kernels.aot_cases()))
    assert compiles_ahead_of_time("text_embed") == 4

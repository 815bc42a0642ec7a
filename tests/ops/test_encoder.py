"""encoder: reference against HuggingFace's layers, the native stack under the error budget in three precisions."""

import pytest
import torch
from transformers import ViltConfig
from transformers.models.vilt.modeling_vilt import ViltEncoder

from vilt_fast import functional
from vilt_fast.reference.encoder import MATRICES, LayerParameters, quantized_channels, quantized_rows
from vilt_fast.testing import (
    assert_within_budget,
    encoder_parameters,
    offsets,
    opcheck,
    random_weights,
    sliced,
    strided,
)

LAYERS, WIDTH, INNER, HEADS = 2, 64, 96, 2
EPS = [1e-6, 1e-12, 1e-5, 1e-6]
LENGTHS = {
    "ragged": ([11, 3, 1, 20], [11, 3, 1, 20]),
    "query only": ([9, 4], [8, 3]),
    "empty": ([5, 0, 2], [5, 0, 2]),
    "one row": ([1], [1]),
}


def _arguments(case="ragged", dtype=torch.float32, bias=True, layers=LAYERS):
    lengths, used = LENGTHS[case]
    return dict(
        x=torch.randn(sum(lengths), WIDTH, dtype=dtype),
        parameters=encoder_parameters(layers, WIDTH, INNER, bias=bias, dtype=dtype),
        cu_seqlens=offsets(lengths), seqused_k=torch.tensor(used, dtype=torch.int32), max_seqlen=max(lengths),
        num_heads=HEADS, eps=EPS[: 2 * layers],
    )  # fmt: skip


def _double(arguments):
    return arguments | {"x": arguments["x"].double(), "parameters": [p.double() for p in arguments["parameters"]]}


def _blobs(parameters):
    places = [name.removesuffix("_weight") in MATRICES for name in LayerParameters._fields]
    return [functional.quantize_linear(p) if places[i % len(places)] else p for i, p in enumerate(parameters)]


def hf_parameters(layer):
    own, out = layer.attention.attention, layer.attention.output.dense
    modules = (
        layer.layernorm_before, own.query, own.key, own.value, out,
        layer.layernorm_after, layer.intermediate.dense, layer.output.dense,
    )  # fmt: skip
    return [t for m in modules for t in (m.weight, torch.empty(0) if m.bias is None else m.bias)]


@pytest.mark.parametrize("qkv_bias", [True, False])
@torch.no_grad()
def test_reference_is_huggingface(qkv_bias):
    config = ViltConfig(
        hidden_size=24, num_attention_heads=3, intermediate_size=40, num_hidden_layers=2, qkv_bias=qkv_bias
    )
    module = random_weights(ViltEncoder(config)).double().eval()
    eps = [1e-3, 1e-12, 0.1, 1e-6]
    for layer, pair in zip(module.layer, (eps[:2], eps[2:]), strict=True):
        layer.layernorm_before.eps, layer.layernorm_after.eps = pair
    lengths = [5, 2, 7]
    padded = torch.randn(3, 7, 24, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor(lengths).unsqueeze(1)
    bias = torch.zeros(3, 1, 1, 7, dtype=torch.float64).masked_fill(~mask[:, None, None], float("-inf"))
    hidden = module(padded, bias, output_hidden_states=True).hidden_states
    parameters = [p for layer in module.layer for p in hf_parameters(layer)]
    got = functional.encoder(
        padded[mask], parameters, offsets(lengths), torch.tensor(lengths, dtype=torch.int32), 7,
        num_heads=3, eps=eps, return_hidden=True, backend="reference",
    )  # fmt: skip
    for layer, want in enumerate(hidden[1:]):
        torch.testing.assert_close(got[layer], want[mask], rtol=1e-11, atol=1e-12)


def test_int8_emulation():
    x = torch.randn(7, 33, dtype=torch.float64) * 5
    x[3] = 0
    step = (x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)) / 255
    assert ((quantized_rows(x) - x).abs().amax(1) <= step * 1.0001).all() and not quantized_rows(x)[3].any()
    for row in quantized_rows(x):
        assert len(row.unique()) <= 256
    error = (quantized_channels(x) - x).abs().amax(1)
    assert (error <= x.abs().amax(1) / 127 / 2 * 1.0001).all()
    exact = torch.arange(-127.0, 128).unsqueeze(0)
    assert torch.equal(quantized_channels(exact), exact)


def test_reference_is_differentiable_and_precisions_are_ordered():
    arguments = _arguments(dtype=torch.float64)
    exact = functional.encoder(**arguments)
    errors = [(functional.encoder(**arguments, compute=c) - exact).norm() / exact.norm() for c in ("bfloat16", "int8")]
    assert 1e-4 < errors[0] < errors[1] < 0.3
    arguments["x"].requires_grad_()
    assert torch.autograd.grad(functional.encoder(**arguments).sum(), arguments["x"])[0].isfinite().all()


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", LENGTHS)
@torch.no_grad()
def test_cpp_within_budget(case, bias, compute):
    arguments = _arguments(case, bias=bias)
    before = arguments["x"].clone()
    exact = functional.encoder(**_double(arguments), return_hidden=True, backend="reference")
    plain = functional.encoder(**arguments, compute=compute, return_hidden=True, backend="reference")
    if compute == "int8":
        arguments["parameters"] = _blobs(arguments["parameters"])
    got = functional.encoder(**arguments, compute=compute, return_hidden=True, backend="cpp")
    assert got.dtype == torch.float32 and torch.equal(arguments["x"], before)
    for layer in range(LAYERS):
        assert_within_budget(got[layer], plain[layer], exact[layer], what=f"{compute} layer {layer}")
    last = functional.encoder(**arguments, compute=compute, backend="cpp")
    assert torch.equal(last, got[-1])


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "int8"])
@torch.no_grad()
def test_every_instruction_set_within_budget(compute, monkeypatch):
    from vilt_fast import _C

    arguments = _arguments()
    exact = functional.encoder(**_double(arguments), backend="reference")
    plain = functional.encoder(**arguments, compute=compute, backend="reference")
    if compute == "int8":
        arguments["parameters"] = _blobs(arguments["parameters"])
    for isa in _C.cpu_features()["isas"]:
        monkeypatch.setenv("VILT_FAST_CPU_ISA", isa)
        got = functional.encoder(**arguments, compute=compute, backend="cpp")
        assert_within_budget(got, plain, exact, what=f"{compute} on {isa}")


WANTED = {  # rows of each sample that are wanted of the last layer
    "ragged": ([[0], [0, 2], [], [0, 1, 2, 19]], [[0], [0], [0], [0]], [[], [], [], []]),
    "query only": ([[8], [3]], [[0, 8], list(range(4))]),
    "empty": ([[4, 4], [], [0]],),
    "one row": ([[0]],),
}


def _wanted(arguments, chosen):
    starts = arguments["cu_seqlens"].tolist()
    rows = [start + i for start, own in zip(starts, chosen, strict=False) for i in own]
    return dict(wanted=torch.tensor(rows, dtype=torch.int64), cu_wanted=offsets(map(len, chosen)))


@pytest.mark.parametrize("layers", [1, LAYERS])
@pytest.mark.parametrize("compute", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("case, chosen", [(case, rows) for case, several in WANTED.items() for rows in several])
@torch.no_grad()
def test_wanted_rows_are_those_of_all(case, chosen, compute, layers, monkeypatch):
    from vilt_fast import _C

    arguments = _arguments(case, layers=layers)
    wanted = _wanted(arguments, chosen)
    exact = functional.encoder(**_double(arguments), **wanted, backend="reference")
    plain = functional.encoder(**arguments, **wanted, compute=compute, backend="reference")
    assert exact.shape == (len(wanted["wanted"]), WIDTH)
    if compute == "int8":
        arguments["parameters"] = _blobs(arguments["parameters"])
    for isa in _C.cpu_features()["isas"]:
        monkeypatch.setenv("VILT_FAST_CPU_ISA", isa)
        whole = functional.encoder(**arguments, compute=compute, backend="cpp")
        got = functional.encoder(**arguments, **wanted, compute=compute, backend="cpp")
        assert_within_budget(got, plain, exact, what=isa)
        assert torch.equal(got, whole[wanted["wanted"]])


@pytest.mark.parametrize("lengths", [[129, 0], [70, 1, 190], [910, 40]])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("rows", ["hidden", "wanted"])
@torch.no_grad()
def test_rows_that_threads_share_out_are_those_of_one_thread(rows, layers, lengths):
    """In int8 each takes its rows through several products before it waits for the others: the same bits."""
    width, inner, n = 68, 90, sum(lengths)
    given = dict(
        x=torch.randn(n, width), parameters=_blobs(encoder_parameters(layers, width, inner)),
        cu_seqlens=offsets(lengths), seqused_k=torch.tensor(lengths, dtype=torch.int32), max_seqlen=max(lengths),
        num_heads=2, eps=[1e-6] * 2 * layers, compute="int8", return_hidden=rows == "hidden",
    )  # fmt: skip
    if rows == "wanted":
        some = [n > 1 for n in lengths]  # the first and the last row of each that has them
        starts, ends = given["cu_seqlens"][:-1][some], given["cu_seqlens"][1:][some] - 1
        wanted = torch.stack([starts, ends], dim=1).flatten().long()
        given |= dict(wanted=wanted, cu_wanted=offsets([2 * one for one in some]))
    results = []
    for threads in (1, 2, 2, 3, 4, 5):
        torch.set_num_threads(threads)
        try:
            results.append(functional.encoder(**given))
        finally:
            torch.set_num_threads(2)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("threads", [1, 2, 3])
@torch.no_grad()
def test_wanted_rows_of_many_samples(threads):
    """More than one chunk, for one thread each and for all together."""
    lengths = [280] * 7 + [300, 3]
    parameters = encoder_parameters(2, WIDTH, INNER)
    arguments = dict(
        x=torch.randn(sum(lengths), WIDTH), parameters=parameters, cu_seqlens=offsets(lengths), max_seqlen=300,
        seqused_k=torch.tensor(lengths, dtype=torch.int32), num_heads=HEADS, eps=EPS,
    )  # fmt: skip
    chosen = [list(range(i % 3, n, 1 + 40 * (i % 2))) for i, n in enumerate(lengths)]
    wanted = _wanted(arguments, chosen)
    torch.set_num_threads(threads)
    try:
        whole = functional.encoder(**arguments, backend="cpp")
        got = functional.encoder(**arguments, **wanted, backend="cpp")
    finally:
        torch.set_num_threads(2)
    assert torch.equal(got, whole[wanted["wanted"]])


@torch.no_grad()
def test_int8_at_the_boundary_of_two_row_blocks():
    """1024 rows are two blocks of 512 or so, and an inner width of 1040 takes two blocks along K."""
    width, rows = 192, 1024
    parameters = encoder_parameters(1, width, 1040)
    arguments = dict(
        cu_seqlens=offsets([rows]), seqused_k=torch.tensor([900], dtype=torch.int32), max_seqlen=rows, num_heads=3,
        eps=EPS[:2],
    )  # fmt: skip
    x = torch.randn(rows, width)
    exact = functional.encoder(x.double(), [p.double() for p in parameters], **arguments, backend="reference")
    plain = functional.encoder(x, parameters, **arguments, compute="int8", backend="reference")
    for threads in (1, 2, 3, 16):
        torch.set_num_threads(threads)
        try:
            got = functional.encoder(x, _blobs(parameters), **arguments, compute="int8", backend="cpp")
        finally:
            torch.set_num_threads(2)
        assert_within_budget(got, plain, exact, what=f"{threads} threads")


@pytest.mark.parametrize("layout", [strided, sliced])
@torch.no_grad()
def test_cpp_takes_any_layout(layout):
    arguments = _arguments()
    want = functional.encoder(**arguments, backend="cpp")
    hostile = arguments | {
        "x": layout(arguments["x"]),
        "parameters": [layout(p) for p in arguments["parameters"]],
    }
    assert torch.equal(functional.encoder(**hostile, backend="cpp"), want)


@torch.no_grad()
def test_cpp_bfloat16_parameters():
    arguments = _arguments(layers=1)
    arguments["parameters"] = [p.to(torch.bfloat16) for p in arguments["parameters"]]
    exact = functional.encoder(**_double(arguments), backend="reference")
    plain = functional.encoder(**arguments, compute="bfloat16", backend="reference")
    assert_within_budget(functional.encoder(**arguments, compute="bfloat16", backend="cpp"), plain, exact)


@torch.no_grad()
def test_nan_stays_in_its_sample():
    arguments = _arguments()
    for backend in ("reference", "cpp"):
        want = functional.encoder(**arguments, backend=backend)
        x = arguments["x"].clone()
        x[12] = float("nan")
        got = functional.encoder(**(arguments | {"x": x}), backend=backend)
        assert torch.equal(got[:11], want[:11]) and torch.equal(got[14:], want[14:]) and got[11:14].isnan().all()


@torch.no_grad()
def test_a_query_only_row_changes_no_other():
    arguments = _arguments("query only")
    for backend in ("reference", "cpp"):
        want = functional.encoder(**arguments, backend=backend)
        x = arguments["x"].clone()
        x[8] += 3
        got = functional.encoder(**(arguments | {"x": x}), backend=backend)
        kept = [i for i in range(13) if i != 8]
        assert torch.equal(got[kept], want[kept]) and not torch.equal(got[8], want[8])


@torch.no_grad()
def test_registered_op():
    a = _arguments(layers=1)
    for hidden in (False, True):
        opcheck("encoder", "cpp", **a, compute="float32", return_hidden=hidden)
    opcheck("encoder", "cpp", **a, **_wanted(a, [[0], [], [0], [3, 4]]), compute="float32", return_hidden=False)
    compiled = torch.compile(lambda x: functional.encoder(**(a | {"x": x})) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a["x"]), functional.encoder(**a, backend="cpp") * 2)


@torch.no_grad()
def test_the_right_backend_is_chosen_for_int8():
    arguments = _arguments(layers=1)
    blobs = arguments | {"parameters": _blobs(arguments["parameters"])}
    emulated = functional.encoder(**arguments, compute="int8")
    assert torch.equal(emulated, functional.encoder(**arguments, compute="int8", backend="reference"))
    assert torch.equal(
        functional.encoder(**blobs, compute="int8"), functional.encoder(**blobs, compute="int8", backend="cpp")
    )
    with pytest.raises(RuntimeError, match="quantize_linear"):
        functional.encoder(**arguments, compute="int8", backend="cpp")
    with pytest.raises(RuntimeError, match="float weights"):
        functional.encoder(**blobs, compute="int8", backend="reference")
    with pytest.raises(ValueError, match="use compute='int8'"):
        functional.encoder(**blobs)


@pytest.mark.parametrize("compute", ["float32", "int8"])
@pytest.mark.parametrize("name", MATRICES)
@torch.no_grad()
def test_a_bias_is_as_long_as_its_weight(name, compute):
    arguments = _arguments()
    place = len(LayerParameters._fields) + LayerParameters._fields.index(f"{name}_bias")  # of the second layer
    length = len(arguments["parameters"][place])
    if compute == "int8":
        arguments["parameters"] = _blobs(arguments["parameters"])
    for wrong in (1, length - 1, length + 1, [length, 1]):
        changed = list(arguments["parameters"])
        changed[place] = torch.zeros(wrong)
        with pytest.raises(ValueError, match=rf"{name}_bias\)? has shape .*, expected \[{length}\], or \[0\] for none"):
            functional.encoder(**(arguments | {"parameters": changed}), compute=compute, backend="cpp")


def test_bad_input():
    arguments = _arguments(layers=1)
    parameters = arguments["parameters"]
    for change, message in (
        ({"parameters": parameters[:-1]}, "holds 15 tensors, expected 16 a layer"),
        (
            {"parameters": [*parameters[:2], parameters[2].T[:5], *parameters[3:]]},
            r"parameter 2 \(query_weight\) has shape \[5, 64\]",
        ),
        ({"parameters": [parameters[0][:3], *parameters[1:]]}, "norm1_weight. has shape"),
        ({"eps": [1e-6]}, "eps holds 1 numbers, expected 2 a layer"),
        ({"compute": "fp8"}, "compute is 'fp8'"),
        ({"num_heads": 3}, "not a multiple of num_heads 3"),
        ({"seqused_k": arguments["seqused_k"][:2]}, "seqused_k has shape"),
        ({"wanted": torch.tensor([0])}, "wanted and cu_wanted belong together"),
        (_wanted(arguments, [[0], [], [], []]) | {"return_hidden": True}, "give no wanted rows with it"),
        (_wanted(arguments, [[0], [], [], []]) | {"cu_wanted": offsets([0, 1, 0, 0])}, "a row of another sample"),
        (_wanted(arguments, [[-1], [], [], []]), "a row of another sample"),
        (_wanted(arguments, [[0], [], [], []]) | {"cu_wanted": offsets([0, 0, 0, 0])}, "cu_wanted is"),
    ):
        with pytest.raises(ValueError, match=message):
            functional.encoder(**(arguments | change))
    with pytest.raises(TypeError, match="x is torch.bfloat16"):
        functional.encoder(**(arguments | {"x": arguments["x"].bfloat16()}))
    with torch.no_grad(), pytest.raises(ValueError, match="cu_seqlens"):
        functional.encoder(**(arguments | {"cu_seqlens": offsets([11, 3, 1, 21])}), backend="cpp")

"""`torch.ops.vilt_fast.*` called directly: bad sizes are errors there too, not reads of memory past the end."""

import pytest
import torch

from vilt_fast import functional
from vilt_fast.functional import LayerParameters
from vilt_fast.ops import _define
from vilt_fast.testing import encoder_parameters, offsets, packing_indices

OPS = torch.ops.vilt_fast
INT = torch.int32


def transport(rows=3, columns=4, batch=2):
    return torch.rand(batch, rows, columns), torch.zeros(batch, rows).bool(), torch.zeros(batch, columns).bool()


@torch.no_grad()
def test_every_op_checks_behind_its_door():
    backend = "cpp"
    cost, text_pad, image_pad = transport()
    x, weight, bias = torch.randn(5, 8), torch.randn(6, 8), torch.randn(6)
    q = torch.randn(7, 2, 4)
    cu = offsets([4, 3])
    parameters = encoder_parameters(1, 8, 16)
    text, image = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    used = torch.tensor([4, 3], dtype=INT)
    encoder = (cu, used, 4, 2, [1e-6, 1e-6], "float32", False, None, None)
    calls = {
        "weight": lambda: OPS.linear_gelu(x, weight[:, :5], bias, backend),
        "bias": lambda: OPS.linear_gelu(x, weight, bias[:2], backend),
        "image_pad": lambda: OPS.ipot(cost, text_pad, image_pad[:, :2], 0.5, 5, 1, backend),
        "text_pad": lambda: OPS.sinkhorn(cost, text_pad[:1], image_pad, 0.5, 5, None, None, None, backend),
        "text_marginal": lambda: OPS.sinkhorn(
            cost, text_pad, image_pad, 0.5, 5, None, torch.ones(2, 2), None, backend
        ),
        "image": lambda: OPS.word_patch_distance(text, image[..., :5], text_pad, image_pad, 0.5, 5, 1, False, backend),
        "v has shape": lambda: OPS.attention(q, q, q[:5], cu, cu, 4, 4, None, None, 0.0, 0.5, None, backend),
        "cu_seqlens_k is": lambda: OPS.attention(
            q, q, q, cu, offsets([4, 300]), 4, 300, None, None, 0.0, 0.5, None, backend
        ),
        "seqused_k is 9": lambda: OPS.attention(
            q, q, q, cu, cu, 4, 4, torch.tensor([4, 9], dtype=INT), None, 0.0, 0.5, None, backend
        ),
        "parameter": lambda: OPS.encoder(torch.randn(7, 8), [parameters[0][:3], *parameters[1:]], *encoder, backend),
        "cu_seqlens is": lambda: OPS.encoder(
            torch.randn(7, 8), parameters, offsets([4, 9]), *encoder[1:], backend
        ),
    }  # fmt: skip
    for message, call in calls.items():
        with pytest.raises((ValueError, RuntimeError), match=message):
            call()


@torch.no_grad()
def test_what_a_backend_has_not_is_refused_behind_the_door():
    q, cu, start = torch.randn(7, 2, 4), offsets([4, 3]), torch.tensor([1, 1], dtype=INT)
    index = packing_indices([1], [(1, 1)], canvas=(1, 1), table=(2, 2))
    index |= {"modality_index": None, "text_rows": None}

    def attention(q=q, causal_start=None, dropout_p=0.0):
        return OPS.attention(q, q, q, cu, cu, 4, 4, None, causal_start, dropout_p, 0.5, None, "cpp")

    def patch_embed(weight, dropout_p=0.0):
        given = dict(
            pixels=torch.randn(1, 1, 4, 4), weight=weight, bias=None, cls_token=torch.randn(6),
            position=torch.randn(5, 6), modality=None, text=None, **index, dropout_p=dropout_p,
            out_dtype=torch.float32, pixel_scale=None, pixel_shift=None, seed=None,
        )  # fmt: skip
        return OPS.patch_embed(*(given[name] for name in _define.OPS["patch_embed"].arguments), "cpp")

    encoder = (cu, torch.tensor([4, 3], dtype=INT), 4, 2, [1e-6, 1e-6], "float32", False, None, None)
    calls = {
        "it has no causal attention": lambda: attention(causal_start=start),
        "it has no dropout": lambda: attention(dropout_p=0.1),
        "it has no dropout ": lambda: patch_embed(torch.randn(6, 1, 4, 4), dropout_p=0.1),
        "patches are not square": lambda: patch_embed(torch.randn(6, 1, 4, 2)),
        "dtype is torch.float64": lambda: attention(q.double()),
        "x is torch.float64": lambda: OPS.encoder(
            torch.randn(7, 8).double(), encoder_parameters(1, 8, 16, dtype=torch.float64), *encoder, "cpp"
        ),
    }  # fmt: skip
    assert attention()[0].shape == q.shape
    assert patch_embed(torch.randn(6, 1, 4, 4)).shape == (index["total_rows"], 6)
    for message, call in calls.items():
        with pytest.raises(RuntimeError, match=f"backend 'cpp' cannot run this call: .*{message.strip()}"):
            call()


def test_a_backward_checks_behind_its_door():
    text, image = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    pads = torch.zeros(2, 3).bool(), torch.zeros(2, 4).bool()
    grad, plan, nothing = torch.ones(2), torch.rand(2, 3, 4), torch.empty(0)

    def gradient(text=text, image=image, grad=grad, plan=plan, state=nothing):
        return OPS.word_patch_distance_bwd([True, True], grad, text, image, *pads, plan, state, 0.5, 5, "cpp")

    want = gradient()
    for given in (dict(plan=plan.mT.contiguous().mT), dict(plan=nothing, state=plan)):
        assert all(map(torch.equal, gradient(**given), want))
    for message, given in {
        "plan has shape": dict(plan=plan[:, :, :2]),
        "state has shape": dict(plan=nothing, state=torch.rand(2, 7, 2)),
        "grad_distance has shape": dict(grad=grad[:1]),
        "image has shape": dict(image=image[..., :5]),
    }.items():
        with pytest.raises(ValueError, match=message):
            gradient(**given)


def _asked(op, **given):
    """`torch.ops.vilt_fast.<op>_bwd` in the interpreter, arguments by name."""
    known = _define.OPS[op]
    names = (*known._wanted, *known._also)
    return getattr(OPS, f"{op}_bwd")(*(given[name] for name in names), "triton")


def _of_qkv():
    x, weight, grad = torch.randn(3, 16), torch.randn(8, 16), torch.randn(3, 8)
    given = dict.fromkeys(("query_weight", "key_weight", "value_weight"), weight)
    given |= dict.fromkeys(("query_bias", "key_bias", "value_bias"))
    given |= dict.fromkeys(("grad_query", "grad_key", "grad_value"), grad)
    return dict(given, x=x, needs=[True] * 4 + [False] * 3), {
        "grad_key has shape": dict(grad_key=grad[:2]),
        "grad_query is torch.float64": dict(grad_query=grad.double()),
        "value_weight has shape": dict(value_weight=weight[:, :5]),
        "query_bias has shape": dict(query_bias=torch.randn(7)),
    }


def _of_text_embed():
    ids, table = torch.tensor([1, 0, 3]), torch.randn(4, 16)
    given = dict(
        needs=[False] + [True] * 5 + [False], grad_rows=torch.randn(3, 16), input_ids=ids, inputs_embeds=None,
        position_ids=ids, token_type_ids=None, word=table, position=table, token_type=table, ln_weight=torch.ones(16),
        ln_bias=torch.zeros(16), modality=None, eps=1e-6, padding_idx=None, dropout_p=0.0, deterministic=True,
        seed=None, out_dtype=torch.float32,
    )  # fmt: skip
    return given, {
        "grad_rows has shape": dict(grad_rows=torch.randn(2, 16)),
        "input_ids holds 9": dict(input_ids=torch.tensor([1, 0, 9])),
        "word has shape": dict(word=table[:, :5]),
        "ln_bias has shape": dict(ln_bias=torch.zeros(5)),
        "dropout takes a seed": dict(dropout_p=0.5),
    }


def _of_patch_embed():
    index = packing_indices([2], [(1, 2)], canvas=(1, 2), table=(2, 2))
    index.pop("modality_index")
    rows = index.pop("total_rows")
    given = dict(
        index, needs=[False, True, False, True, True, False, True], grad_rows=torch.randn(rows, 16),
        pixels=torch.randn(1, 1, 4, 8), weight=torch.randn(16, 1, 4, 4), bias=None, cls_token=torch.randn(16),
        position=torch.randn(5, 16), modality=None, modality_index=None, text=torch.randn(2, 16), dropout_p=0.0,
        pixel_scale=None, pixel_shift=None, seed=None, out_dtype=torch.float32, total_rows=rows,
    )  # fmt: skip
    return given, {
        "grad_rows has shape": dict(grad_rows=torch.randn(rows, 5)),
        "total_rows is 3": dict(grad_rows=torch.randn(3, 16)),
        "patch_rows has shape": dict(patch_rows=torch.zeros(1, dtype=torch.int64)),
        "position has shape": dict(position=torch.randn(5, 7)),
        "text and text_rows belong together": dict(text=None),
        "dropout takes a seed": dict(dropout_p=0.5),
    }


def _of_linear_cross_entropy():
    x, weight, labels = torch.randn(3, 16), torch.randn(5, 16), torch.tensor([4, -100, 2])
    (_, count), (lse, rows) = _define.registry.launcher("linear_cross_entropy", "triton")(
        x=x, weight=weight, bias=None, labels=labels, ignore_index=-100, keep=True
    )
    given = dict(
        needs=[True, True, False], grad_losses=torch.ones(3), x=x, weight=weight, bias=None, labels=labels, lse=lse,
        rows=rows, count=count, ignore_index=-100,
    )  # fmt: skip
    return given, {
        "grad_losses has shape": dict(grad_losses=torch.ones(2)),
        "weight has shape": dict(weight=weight[:, :3]),
        "lse is torch.float64": dict(lse=lse.double()),
        "rows and count say": dict(count=torch.tensor([4], dtype=INT)),
        "rows and count say ": dict(rows=rows + 7),
        "label 9 is outside": dict(labels=torch.tensor([9, -100, 2])),
    }


@pytest.mark.parametrize(
    "op", [_of_qkv, _of_text_embed, _of_patch_embed, _of_linear_cross_entropy], ids=lambda f: f.__name__[4:]
)
@torch.no_grad()
def test_backwards_of_triton_alone_check_behind_their_door(op):
    pytest.importorskip("triton")
    given, bad = op()
    name = {"qkv": "linear_qkv"}.get(op.__name__[4:], op.__name__[4:])
    assert all(torch.is_tensor(gradient) for gradient in _asked(name, **given))
    for message, other in bad.items():
        with pytest.raises((ValueError, TypeError, IndexError), match=message.strip()):
            _asked(name, **given | other)


def test_a_forward_with_dropout_wants_a_seed_behind_its_door():
    x = torch.randn(2, 16)
    for seed in (None, torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)):
        with pytest.raises(ValueError, match="add_layer_norm: dropout takes a seed"):
            OPS.add_layer_norm(x, x, None, None, 1e-6, 0.5, seed, "cpp")


def test_ordinary_pytorch_is_not_behind_the_door():
    with pytest.raises(ValueError, match="call vilt_fast.functional.linear_gelu"):
        OPS.linear_gelu(torch.randn(5, 8), torch.randn(6, 8), None, "reference")


@pytest.mark.parametrize("backend", [None, "reference", "torch", "cpp"])
@torch.no_grad()
def test_offsets_are_looked_at_by_every_backend(backend):
    q = torch.randn(7, 2, 4)
    cu = offsets([4, 3])

    def call(cu_q=cu, cu_k=cu, used=None):
        return functional.attention(q, q, q, cu_q, cu_k, 4, 4, seqused_k=used, backend=backend)

    assert call().shape == q.shape
    for bad in (
        offsets([4, 4]),
        offsets([4, 2]),
        torch.tensor([1, 4, 7], dtype=INT),
        torch.tensor([0, 8, 7], dtype=INT),
    ):
        with pytest.raises(ValueError, match="expected to start at 0, not to decrease and to end at 7 rows"):
            call(cu_q=bad)
        with pytest.raises(ValueError, match="cu_seqlens_k is"):
            call(cu_k=bad)
    for keys in ([5, 3], [4, -1]):
        with pytest.raises(ValueError, match="seqused_k is"):
            call(used=torch.tensor(keys, dtype=INT))


@torch.no_grad()
def test_heads_wider_than_the_native_library_takes_go_another_way():
    x, parameters = torch.randn(5, 520), encoder_parameters(1, 520, 16)
    given = (x, parameters, offsets([5]), torch.tensor([5], dtype=INT), 5)
    wide = functional.encoder(*given, num_heads=1, eps=[1e-6, 1e-6])
    torch.testing.assert_close(wide, functional.encoder(*given, num_heads=1, eps=[1e-6, 1e-6], backend="reference"))
    with pytest.raises(RuntimeError, match="head dim is 520, at most 256"):
        functional.encoder(*given, num_heads=1, eps=[1e-6, 1e-6], backend="cpp")
    assert len(LayerParameters._fields) == len(parameters)

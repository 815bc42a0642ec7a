"""What a call was found fit for before says nothing of one of another form, or of other values."""

import pytest
import torch

from vilt_fast import functional, testing


def text(change=lambda given: None):
    table, ids = torch.randn(5, 4), torch.zeros(3, dtype=torch.int64)
    given = dict(
        input_ids=ids, inputs_embeds=None, position_ids=ids, token_type_ids=ids, word=table, position=table,
        token_type=table, ln_weight=torch.ones(4), ln_bias=torch.zeros(4), modality=table, eps=1e-6, dropout_p=0.0,
    )  # fmt: skip
    change(given)
    return functional.text_embed(**given)


def patches(change=lambda given: None):
    table = torch.randn(5, 4)
    given = dict(
        pixels=torch.randn(1, 3, 4, 4), weight=torch.randn(4, 3, 2, 2), bias=torch.zeros(4), cls_token=torch.zeros(4),
        position=table, modality=table, text=torch.randn(2, 4),
        **testing.packing_indices([2], [(2, 2)], canvas=(2, 2), table=(2, 2)),
    )  # fmt: skip
    change(given)
    return functional.patch_embed(**given)


def attending(change=lambda given: None):
    ends = torch.tensor([0, 2, 5], dtype=torch.int32)
    given = dict(
        q=torch.randn(5, 2, 4), k=torch.randn(5, 2, 4), v=torch.randn(5, 2, 4), cu_seqlens_q=ends, cu_seqlens_k=ends,
        max_seqlen_q=3, max_seqlen_k=3, seqused_k=torch.tensor([2, 3], dtype=torch.int32),
    )  # fmt: skip
    change(given)
    return functional.attention(**given)


def layers(op):
    def call(change=lambda given: None):
        given = dict(x=torch.randn(3, 4), weight=torch.randn(4, 4), bias=torch.zeros(4))
        if op is functional.add_layer_norm:
            given |= dict(weight=torch.ones(4), residual=torch.randn(3, 4), eps=1e-6)
        change(given)
        return op(**given)

    return call


LINEAR, GELU, NORM = map(layers, (functional.linear, functional.linear_gelu, functional.add_layer_norm))


def put(**new):
    return lambda given: given.update(new)


@pytest.mark.parametrize(
    "call, change, error",
    [
        (text, put(ln_weight=torch.ones(3)), ValueError),
        (text, put(ln_weight=torch.ones(4, dtype=torch.int64)), TypeError),
        (text, put(input_ids=torch.zeros(3)), TypeError),
        (text, put(ln_bias=torch.zeros(4, device="meta")), ValueError),
        (text, put(input_ids=None), ValueError),
        (text, put(dropout_p=1.0), ValueError),
        (text, put(ln_weight=[1.0] * 4), TypeError),
        (text, put(input_ids=torch.full((3,), 5)), IndexError),
        (text, put(position_ids=torch.full((3,), -1)), IndexError),
        (patches, put(bias=torch.zeros(3)), ValueError),
        (patches, put(bias=torch.zeros(4, dtype=torch.float64)), TypeError),
        (patches, put(cls_token=torch.zeros(4, device="meta")), ValueError),
        (patches, put(total_rows=3), ValueError),
        (patches, put(dropout_p=-0.5), ValueError),
        (patches, put(text=None), ValueError),
        (attending, put(v=torch.randn(4, 2, 4)), ValueError),
        (attending, put(k=torch.randn(5, 2, 4, dtype=torch.float64)), TypeError),
        (attending, put(v=torch.randn(5, 2, 4, device="meta")), ValueError),
        (attending, put(dropout_p=1.0), ValueError),
        (attending, put(cu_seqlens_q=torch.tensor([0, 2, 5])), TypeError),
        (attending, put(cu_seqlens_q=torch.tensor([0, 2, 4], dtype=torch.int32)), ValueError),
        (attending, put(cu_seqlens_k=torch.tensor([0, 6, 5], dtype=torch.int32)), ValueError),
        (attending, put(seqused_k=torch.tensor([2, 4], dtype=torch.int32)), ValueError),
        *((call, put(bias=torch.zeros(3)), ValueError) for call in (LINEAR, GELU, NORM)),
        *((call, put(bias=torch.zeros(4, device="meta")), ValueError) for call in (LINEAR, GELU, NORM)),
        *((call, put(x=torch.ones(3, 4, dtype=torch.int64)), TypeError) for call in (LINEAR, GELU, NORM)),
        *((call, put(x=[[1.0] * 4] * 3), TypeError) for call in (LINEAR, GELU, NORM)),
        *((call, put(x=torch.tensor(1.0)), ValueError) for call in (LINEAR, GELU, NORM)),
        (attending, put(q=[[[1.0] * 4] * 2] * 5), TypeError),
        (attending, put(q=torch.randn(5)), ValueError),
        (LINEAR, put(residual=torch.randn(2, 4)), ValueError),
        (GELU, put(weight=torch.randn(4, 4, dtype=torch.float64)), TypeError),
        (NORM, put(dropout_p=-1.0), ValueError),
    ],
)
def test_a_call_that_passed_lets_no_other_pass(call, change, error):
    call(), call()
    for _ in range(2):
        with pytest.raises(error):
            call(change)
    call()


def test_what_was_found_of_a_call_is_not_taken_for_what_another_asks():
    """The same tensors, and a gradient, another result or another dtype of it."""
    assert not text().requires_grad and text(lambda given: given["word"].requires_grad_()).requires_grad
    assert not text().requires_grad
    assert text(lambda given: given.update(modality=given["modality"].double())).dtype == torch.float64
    assert text().dtype == torch.float32
    assert patches(put(out_dtype=torch.bfloat16)).dtype == torch.bfloat16 and patches().dtype == torch.float32
    assert patches(lambda given: given["pixels"].requires_grad_()).requires_grad and not patches().requires_grad
    assert isinstance(attending(), torch.Tensor) and len(attending(put(return_lse=True))) == 2
    assert attending(put(dropout_p=0.5, generator=torch.Generator())).shape == attending().shape
    assert not attending().requires_grad and attending(lambda given: given["q"].requires_grad_()).requires_grad

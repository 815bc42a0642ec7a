"""text_embed: reference against HuggingFace's text embeddings, gradients, padding row, bad input."""

import pytest
import torch
from torch.autograd import gradcheck
from transformers import ViltConfig
from transformers.models.vilt.modeling_vilt import TextEmbeddings

from vilt_fast import functional
from vilt_fast.testing import random_weights

LENGTHS = [5, 0, 3]


@pytest.fixture
def module():
    config = ViltConfig(hidden_size=12, num_attention_heads=2, vocab_size=30, max_position_embeddings=9)
    return random_weights(TextEmbeddings(config)).double().eval()


def _tables(module):
    norm = module.LayerNorm
    modality = torch.randn(3, 12, dtype=torch.float64)
    return [
        module.word_embeddings.weight, module.position_embeddings.weight, module.token_type_embeddings.weight,
        norm.weight, norm.bias, modality,
    ]  # fmt: skip


@pytest.mark.parametrize("types", [False, True])
@pytest.mark.parametrize("embeds", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_reference_is_huggingface(module, types, embeds, dtype):
    mask = torch.arange(6) < torch.tensor(LENGTHS).unsqueeze(1)
    ids, segments = torch.randint(30, (3, 6)), torch.randint(2, (3, 6)) if types else None
    given = torch.randn(3, 6, 12, dtype=torch.float64) if embeds else None
    want = module(None if embeds else ids, segments, inputs_embeds=given)[mask]
    tables = _tables(module)
    got = functional.text_embed(
        None if embeds else ids[mask].to(dtype), given[mask] if embeds else None,
        torch.arange(6).expand(3, 6)[mask], segments[mask] if types else None, *tables, eps=module.LayerNorm.eps,
    )  # fmt: skip
    assert torch.equal(got, want + tables[-1][0])


def test_gradients(module):
    tables = [t.detach().requires_grad_() for t in _tables(module)]
    ids, places = torch.tensor([3, 3, 7]), torch.tensor([0, 1, 0])
    assert gradcheck(lambda *t: functional.text_embed(ids, None, places, ids % 2, *t, eps=1e-3), tables, fast_mode=True)
    given = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: functional.text_embed(None, x, places, None, *tables, eps=1e-3), [given])


def test_without_modality_nothing_is_added(module):
    *tables, modality = _tables(module)
    ids = torch.tensor([3, 3, 7])
    bare = functional.text_embed(ids, None, ids, None, *tables, None, eps=1e-6)
    assert torch.equal(bare + modality[0], functional.text_embed(ids, None, ids, None, *tables, modality, eps=1e-6))


def test_the_padding_row_gets_no_gradient(module):
    tables = _tables(module)
    ids = torch.tensor([0, 4, 0])
    functional.text_embed(ids, None, ids, None, *tables, eps=1e-6, padding_idx=0).square().sum().backward()
    grad = module.word_embeddings.weight.grad
    assert grad[4].any() and not grad[0].any()


def test_dropout_is_before_the_modality_row(module):
    tables = _tables(module)
    ids = torch.zeros(500, dtype=torch.int64)
    kept = functional.text_embed(ids, None, ids, None, *tables, eps=1e-6)
    drawn = functional.text_embed(ids, None, ids, None, *tables, eps=1e-6, dropout_p=0.5)
    dropped = drawn == tables[-1][0]
    torch.testing.assert_close((drawn - tables[-1][0])[~dropped], (2 * (kept - tables[-1][0]))[~dropped])
    assert 0.4 < dropped.double().mean() < 0.6


def test_no_text(module):
    none = torch.zeros(0, dtype=torch.int64)
    assert functional.text_embed(none, None, none, None, *_tables(module), eps=1e-6).shape == (0, 12)


def test_bad_input(module):
    tables, ids = _tables(module), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="one of them and not both"):
        functional.text_embed(None, None, ids, None, *tables, eps=1e-6)
    with pytest.raises(IndexError, match="input_ids holds 30"):
        functional.text_embed(ids + 28, None, ids, None, *tables, eps=1e-6)
    with pytest.raises(IndexError, match="input_ids holds -1"):
        functional.text_embed(ids - 2, None, ids, None, *tables, eps=1e-6)
    with pytest.raises(IndexError, match="position_ids holds 10"):
        functional.text_embed(ids, None, ids + 8, None, *tables, eps=1e-6)
    with pytest.raises(ValueError, match=r"position_ids has shape \[1\]"):
        functional.text_embed(ids, None, ids[:1], None, *tables, eps=1e-6)
    with pytest.raises(TypeError, match="input_ids is torch.float32"):
        functional.text_embed(ids.float(), None, ids, None, *tables, eps=1e-6)

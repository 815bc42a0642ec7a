"""The error-budget assertion accepts what it should and, above all, rejects what it should."""

import pytest
import torch

from vilt_fast.testing import (
    assert_within_budget,
    encoder_parameters,
    offsets,
    packing_indices,
    poisoned,
    sliced,
    strided,
)


@pytest.fixture
def exact():
    return torch.randn(40, 30, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_alone_passes(exact, dtype):
    assert_within_budget(exact.to(dtype), exact.to(dtype), exact)


def test_twice_the_reference_error_passes_and_three_times_does_not(exact):
    noise = torch.randn_like(exact) * 1e-3
    reference = exact + noise
    assert_within_budget(exact + 1.99 * noise, reference, exact)
    with pytest.raises(AssertionError, match="error budget exceeded"):
        assert_within_budget(exact + 3 * noise, reference, exact, what="noise")
    assert_within_budget(exact + 3 * noise, reference, exact, factor=4)


def test_a_single_wrong_element_is_found(exact):
    wrong = exact.float()
    wrong[17, 3] += 1e-4
    with pytest.raises(AssertionError, match=r"probe.*\(17, 3\)"):
        assert_within_budget(wrong, exact.float(), exact, what="probe")


def test_many_small_errors_are_found_by_the_relative_norm(exact):
    big = exact.clone()
    big[0, 0] = 1e6  # hides everything from the largest absolute error
    wrong = big.float() * (1 + 3e-7)
    wrong[0, 0] = 1e6
    tilted = torch.ones_like(big) * 1e3
    with pytest.raises(AssertionError, match="relative L2"):
        assert_within_budget((tilted * (1 + 3e-7)).float(), tilted.float(), tilted)
    assert_within_budget(wrong, big.float(), big)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_must_agree(exact, value):
    bad = exact.clone()
    bad[2, 2] = value
    with pytest.raises(AssertionError, match="NaN or infinite"):
        assert_within_budget(bad, exact, exact)
    with pytest.raises(AssertionError, match="NaN or infinite"):
        assert_within_budget(exact, bad, bad)
    assert_within_budget(bad, exact, bad)


def test_shapes_must_agree(exact):
    with pytest.raises(AssertionError, match="shape"):
        assert_within_budget(exact[:1], exact, exact)
    assert_within_budget(torch.empty(0, 3), torch.empty(0, 3), torch.empty(0, 3, dtype=torch.float64))


def test_hostile_inputs_keep_the_values():
    x = torch.randn(4, 5, 6)
    for hostile in (strided(x), sliced(x)):
        assert torch.equal(hostile, x) and not hostile.is_contiguous()
    pad = torch.tensor([[True, False]])
    assert poisoned(torch.zeros(1, 2, 3), pad).isnan().sum() == 3
    assert offsets([2, 0, 3]).tolist() == [0, 2, 2, 5]


def test_parameter_and_index_builders():
    parameters = encoder_parameters(2, 8, 16, bias=False)
    assert len(parameters) == 32 and parameters[12].shape == (16, 8) and parameters[3].numel() == 0
    indices = packing_indices([2, 0], [(2, 3), (1, 1)], canvas=(2, 3), query_rows=1)
    assert indices["total_rows"] == 2 + 1 + 6 + 1 + 0 + 1 + 1 + 1
    torch.testing.assert_close(indices["pos_weight"].sum(1), torch.ones(7))

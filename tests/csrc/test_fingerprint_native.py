"""_C.fingerprint: every bit of a whole span counts, every place that a sample promises, and nothing beside them."""

import pytest
import torch

from vilt_fast import _C
from vilt_fast.ops.fingerprint import fingerprint
from vilt_fast.testing import sliced

PART = 4096 * 64  # bytes that one thread hashes at a time


def memory(size, seed=0):
    return torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def hashed(tensor, rows=1, step=0, threads=2, stride=None):
    size = tensor.numel() // rows if stride is None else stride[0]
    apart = size if stride is None else stride[1]
    return _C.fingerprint([(tensor.data_ptr(), rows, size, apart, step)], threads)[0]


@pytest.mark.parametrize("size", [1, 7, 63, 64, 65, 1000, PART - 1, PART, PART + 1, 3 * PART + 77])
def test_every_bit_counts(size, isa):
    data = memory(size)
    want = hashed(data)
    assert {hashed(data.clone(), threads=threads) for threads in (1, 2, 3, 16)} == {want}
    for place in {0, size // 2, size - 1, *torch.randint(size, (20,)).tolist()}:
        for bit in (1, 128):
            data[place] ^= bit
            assert hashed(data) != want, place
            data[place] ^= bit
    assert hashed(data) == want
    assert hashed(torch.cat([data, torch.zeros(1, dtype=torch.uint8)])) != want


def test_order_counts_and_hashes_spread():
    data = memory(4096).view(torch.int64)
    swapped = [data.clone() for _ in range(len(data) - 1)]
    for i, other in enumerate(swapped):
        other[[i, i + 1]] = data[[i + 1, i]]
    numbers = torch.arange(3000).view(-1, 1).expand(-1, 8).contiguous()  # nearly the same, as weights are
    found = [hashed(t.view(torch.uint8)) for t in (data, *swapped, *numbers)]
    assert len(set(found)) == len(found)
    ones = sum(f"{f:b}".count("1") for f in found) / len(found)
    assert abs(ones - 32) < 0.5


def test_the_same_at_every_level():
    data, found = memory(3 * PART + 5), set()
    for level in _C.cpu_features()["isas"]:
        _C.set_isa(level)
        found.add((hashed(data), hashed(data, step=4 * 1021), hashed(data, rows=5)))
    _C.set_isa(None)
    assert len(found) == 1


@pytest.mark.parametrize("shape", [(7, 33), (5, 16), (300, 1021), (3, 5000), (64, 1), (1, 70), (9,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "layout", [torch.Tensor.contiguous, sliced, lambda t: t.mT.contiguous().mT if t.dim() > 1 else t]
)
def test_a_sample_looks_at_every_row_and_no_further_apart_than_a_row_is_long(shape, dtype, layout):
    tensor = layout(torch.randn(shape).to(dtype))
    step = max(1, min(1021, shape[-1] - 1))

    def both():
        return fingerprint([tensor, tensor], [False, True])

    want = both()
    assert both() == want
    places = list(range(0, tensor.numel(), step))
    for place in {*places[:3], *places[-3:], *places[:: max(1, len(places) // 20)]}:
        at = (place,) if tensor.dim() == 1 else divmod(place, shape[1])
        before = tensor[at].item()
        tensor[at] = before + 1
        assert both()[0] != want[0] and both()[1] != want[1], at
        tensor[at] = before
    for at in torch.randint(tensor.numel(), (10,)).tolist():
        at = (at,) if tensor.dim() == 1 else divmod(at, shape[1])
        before = tensor[at].item()
        tensor[at] = before + 1
        assert both()[1] != want[1], at
        tensor[at] = before
    assert both() == want


def test_what_lies_between_rows_does_not_count():
    wide = torch.randn(6, 40)
    part, want = wide[:, 8:30], fingerprint([wide[:, 8:30]] * 2, [False, True])
    wide[:, :8] = wide[:, 30:] = torch.nan
    assert fingerprint([part] * 2, [False, True]) == want


def test_nothing_and_bad_sizes():
    assert _C.fingerprint([], 2) == []
    assert len(fingerprint([torch.empty(0), torch.empty(3, 0), torch.tensor(2.0)], [True, False, False])) == 3
    with pytest.raises(ValueError, match="out of range"):
        _C.fingerprint([(64, -1, 4, 4, 0)], 1)
    with pytest.raises(ValueError, match="num_threads"):
        _C.fingerprint([], 0)

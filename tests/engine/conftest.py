import pytest
from support.graphs import GPU, played

from vilt_fast import functional


@pytest.fixture
def device(monkeypatch):
    """That of CUDA graphs: a GPU, or a CPU that plays one."""
    if GPU:
        return "cuda"
    played(monkeypatch)
    return "cpu"


@pytest.fixture
def quantized(monkeypatch):
    """A list that grows by one entry a matrix that is quantised."""
    made = []
    quantize_linear = functional.quantize_linear

    def counted(weight, **kwargs):
        made.append(tuple(weight.shape))
        return quantize_linear(weight, **kwargs)

    monkeypatch.setattr(functional, "quantize_linear", counted)
    return made

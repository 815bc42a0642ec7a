import pytest
from support.graphs import GPU, played


@pytest.fixture
def device(monkeypatch):
    """That of CUDA graphs: a GPU, or a CPU that plays one."""
    if GPU:
        return "cuda"
    played(monkeypatch)
    return "cpu"

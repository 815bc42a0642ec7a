"""Repository-wide: few threads, no network, fixed seeds; GPU tests are skipped (and say so) without a GPU."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on tiny tensors, threads that spin cost more than they save

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton: kernels run in its interpreter, on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # several processes share the cores


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; none is visible to torch")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_generate_tests(metafunc):
    if "isa" in metafunc.fixturenames:
        from vilt_fast import _C

        metafunc.parametrize("isa", _C.cpu_features()["isas"], indirect=True)


@pytest.fixture
def isa(request):
    """Each instruction-set level of this machine: the native library computes with that one."""
    from vilt_fast import _C

    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(None)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_remembered():
    """What a backend said of a call in another test, which may have played another machine, is forgotten."""
    from vilt_fast.ops import _check, registry

    def forget():
        registry._remembered.cache_clear()
        _check._found.clear()

    forget()
    yield
    forget()


@pytest.fixture
def native_blocks(monkeypatch):
    """A list that grows by one entry a block whenever the fused encoder runs."""
    from vilt_fast import functional

    ran, encoder = [], functional.encoder

    def counted(rows, parameters, *args, **kwargs):
        ran.extend([kwargs["compute"]] * len(functional.LayerParameters.layers(parameters)))
        return encoder(rows, parameters, *args, **kwargs)

    monkeypatch.setattr(functional, "encoder", counted)
    return ran

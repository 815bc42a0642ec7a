"""Open a checkpoint of PyTorch Lightning 1.x without Lightning, and without running what is pickled in it.

Such a file holds more than tensors: callbacks are filed under their classes, hyperparameters may be objects. Whatever
its pickle names by module and attribute is looked up in a short list; everything else becomes an empty class made on
the spot, which takes any arguments and does nothing. So nothing is imported, and nothing of the file's choosing called.
Sizes and bounds of tensors are checked by torch, which reads the storages.
"""

from __future__ import annotations

import collections
import os
import pickle
import types
import zipfile

import torch


class Unknown(dict):
    """In the place of an object whose class is not looked up; keeps the items that it is given, drops the rest."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass

    def __hash__(self):
        return id(self)

    def append(self, item):
        """Of a list that is not known: dropped."""

    def extend(self, items):
        """The same."""


def _rebuild_tensor(*args):
    return torch._utils._rebuild_tensor_v2(*args[:6])


def _rebuild_parameter(data, requires_grad, *hooks):
    return data


class _Unpickler(pickle.Unpickler):
    """Finds the few names that a state dict is made with, and an empty class for any other."""

    def find_class(self, module, name):
        # A function of its own for each file: what a pickle can write to must be nobody else's.
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *args: _rebuild_tensor(*args)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda *args: _rebuild_parameter(*args)
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        return type(name.rpartition(".")[2], (Unknown,), {"__module__": module})


def open_checkpoint(path: str | os.PathLike) -> dict:
    """What a checkpoint holds, with tensors on the CPU; of what is not plain data only the place is kept.

    Args:
        path: a file that `torch.save` wrote, in its present or its old format.

    Raises:
        OSError: there is no such file. ValueError: it is no such checkpoint, or damaged.
    """
    path = os.path.expanduser(os.fspath(path))
    with open(path, "rb"):
        pass
    zipped = zipfile.is_zipfile(path)
    if zipped:
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise ValueError(f"{path} is a TorchScript program, no checkpoint.")
    door = types.SimpleNamespace(
        __name__="vilt_fast.checkpoints.lightning", Unpickler=_Unpickler, load=lambda f, **k: _Unpickler(f, **k).load()
    )
    # Other people's files: whatever reading one raises, it cannot be used.
    try:
        found = torch.load(path, map_location="cpu", pickle_module=door, weights_only=False, mmap=zipped)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}: {error}): it is damaged, or not "
            "written by torch.save."
        ) from error
    if type(found) is not dict:
        raise ValueError(f"{path} holds no dictionary, which a checkpoint is.")
    return found

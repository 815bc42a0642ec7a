"""dandelin/ViLT itself, out of a checkout: the real code, tiny, with stubs for the packages that it imports and does
not compute with (PyTorch Lightning, timm, torchvision, tqdm)."""

import importlib
import sys
import types

from torch import nn


class _Stub(types.ModuleType):
    """A module that has every name, each a decorator and initialiser that changes nothing."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: args[0] if args else None


class _LightningModule(nn.Module):
    def save_hyperparameters(self):
        frame = sys._getframe(1)
        self.hparams = types.SimpleNamespace(config=frame.f_locals["config"])


_STUBS = [
    "pytorch_lightning", "timm", "timm.data", "timm.models", "timm.models.helpers", "timm.models.layers",
    "timm.models.resnet", "timm.models.resnetv2", "timm.models.registry", "torchvision", "torchvision.transforms",
    "tqdm", "vilt.modules.objectives", "vilt.modules.vilt_utils",
]  # fmt: skip


def tiny(checkout, monkeypatch, *, max_image_len=-1, drop=0.0):
    """`ViLTransformerSS` of the repository at `checkout`, of the stand-in's sizes."""
    for name in _STUBS:
        monkeypatch.setitem(sys.modules, name, _Stub(name))
        parent, _, last = name.rpartition(".")
        if parent in sys.modules:
            setattr(sys.modules[parent], last, sys.modules[name])
    sys.modules["pytorch_lightning"].LightningModule = _LightningModule
    sys.modules["timm.models.layers"].to_2tuple = lambda size: (size, size)
    monkeypatch.syspath_prepend(str(checkout))
    package = importlib.import_module("vilt.modules")
    vision = importlib.import_module("vilt.modules.vision_transformer")
    vision.tiny = lambda pretrained, config: vision.VisionTransformer(
        img_size=64, patch_size=16, embed_dim=32, depth=3, num_heads=4, mlp_ratio=2, config=config
    )
    return package.ViLTransformerSS({
        "vocab_size": 50, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "mlp_ratio": 2, "max_text_len": 12,
        "drop_rate": drop, "max_image_len": max_image_len, "vit": "tiny", "load_path": "", "test_only": False,
        "loss_names": dict.fromkeys(("mlm", "itm", "mpp", "vqa", "nlvr2", "irtr"), 0),
    })  # fmt: skip

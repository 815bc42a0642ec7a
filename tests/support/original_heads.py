"""The original's heads on its stand-in, and its checkpoints as Lightning 1.x writes them."""

import sys
import types
from collections import OrderedDict

import torch
from torch import nn
from transformers.models.bert.modeling_bert import BertConfig, BertPredictionHeadTransform

from .original_vilt import ViLTransformerSS

DIM, WORDS, ANSWERS = 32, 50, 7


class MLMHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.transform = BertPredictionHeadTransform(BertConfig(hidden_size=DIM))
        self.decoder = nn.Linear(DIM, WORDS, bias=False)
        self.bias = nn.Parameter(torch.zeros(WORDS))

    def forward(self, x):
        return self.decoder(self.transform(x)) + self.bias


class ITMHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(DIM, 2)

    def forward(self, x):
        return self.fc(x)


def _classifier(width, classes):
    return nn.Sequential(nn.Linear(width, 2 * DIM), nn.LayerNorm(2 * DIM), nn.GELU(), nn.Linear(2 * DIM, classes))


HEADS = {
    "mlm_score": MLMHead,
    "itm_score": ITMHead,
    "vqa_classifier": lambda: _classifier(DIM, ANSWERS),
    "nlvr2_classifier": lambda: _classifier(2 * DIM, 2),
    "rank_output": lambda: nn.Linear(DIM, 1),
}


def build(*heads, dtype=torch.float64, **sizes):
    """A stand-in with these heads, in eval mode, weights drawn wide."""
    torch.manual_seed(0)
    model = ViLTransformerSS(**sizes)
    if "nlvr2_classifier" not in heads:
        model.token_type_embeddings = nn.Embedding(2, DIM)
    for head in heads:
        model.add_module(head, HEADS[head]())
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.to(dtype).eval()


def config(**more):
    """What its config would say."""
    return {"num_heads": 4, "max_text_len": 12, "max_image_len": -1, "vit": "vit_tiny", "drop_rate": 0.1} | more


def state_of(model):
    """Its state dict, with the counter that transformers of 2021 saved too."""
    state = OrderedDict(model.state_dict())
    state["text_embeddings.position_ids"] = torch.arange(12)[None]
    return state


def lightning_file(path, state, hyper=None, *, legacy=False):
    """Write what Lightning 1.x writes: callbacks under their classes, hyperparameters of classes of its own."""
    lightning = types.ModuleType("pytorch_lightning_of_2021")
    checkpointing = type("ModelCheckpoint", (), {"__module__": lightning.__name__})
    attributes = type("AttributeDict", (dict,), {"__module__": lightning.__name__})
    lightning.ModelCheckpoint, lightning.AttributeDict = checkpointing, attributes
    sys.modules[lightning.__name__] = lightning
    try:
        device = checkpointing()
        device.monitor = "val/the_metric"
        torch.save(
            {
                "epoch": 3, "global_step": 100, "pytorch-lightning_version": "1.1.4", "state_dict": state,
                "callbacks": {checkpointing: {"best_model_score": torch.tensor(0.5), "of": device}},
                "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}],
                "hparams_name": "config", "hyper_parameters_type": attributes,
                "hyper_parameters": {"config": config() if hyper is None else hyper, "more": attributes(a=1)},
            },
            path, _use_new_zipfile_serialization=not legacy,
        )  # fmt: skip
    finally:
        del sys.modules[lightning.__name__]
    return path

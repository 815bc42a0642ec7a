"""Models and batches of the four tasks that ViLT is finetuned for, and their losses."""

import torch
import torch.nn.functional as F
from transformers import (
    ViltForImageAndTextRetrieval,
    ViltForImagesAndTextClassification,
    ViltForQuestionAnswering,
    ViltForTokenClassification,
)

from vilt_fast import objectives

from . import objectives as written

CLASSES = {
    "vqa": ViltForQuestionAnswering,
    "nlvr2": ViltForImagesAndTextClassification,
    "retrieval": ViltForImageAndTextRetrieval,
    "token": ViltForTokenClassification,
}
LOSSES = {
    "vqa": objectives.vqa_loss,
    "nlvr2": objectives.nlvr2_loss,
    "retrieval": objectives.retrieval_loss,
    "token": objectives.token_classification_loss,
}
FALSE_TEXTS = 3


def batch(task, dtype=torch.float64):
    given, draw = written.batch(dtype), torch.Generator().manual_seed(3)
    if task == "vqa":
        given["labels"] = torch.rand(5, 5, generator=draw, dtype=torch.float64).to(dtype)
    elif task == "nlvr2":
        given["labels"] = torch.tensor([0, 4, 2, 1, 0])
        height, width = 4 * written.PATCH, 5 * written.PATCH
        for name, other in (("pixel_values", "false_pixel_values"), ("pixel_mask", "false_pixel_mask")):
            sides = [F.pad(t, (0, width - t.shape[-1], 0, height - t.shape[-2])) for t in (given[name], given[other])]
            given[name] = torch.stack(sides, 1)
    elif task == "retrieval":
        given["false_input_ids"] = torch.randint(4, 50, (5, FALSE_TEXTS, written.TEXT), generator=draw)
        lengths = torch.randint(2, written.TEXT + 1, (5, FALSE_TEXTS, 1), generator=draw)
        given["false_attention_mask"] = (torch.arange(written.TEXT) < lengths).long()
        given["token_type_ids"] = torch.zeros_like(given["input_ids"])
    else:
        given["labels"] = given["labels"] % 5
        given["labels"][written.batch()["labels"] == -100] = -100
    return given


def build(task, dtype=torch.float64):
    more = {"num_images": 2, "modality_type_vocab_size": 3} if task == "nlvr2" else {}
    return written.build(CLASSES[task], dtype, **more)

"""Load a ViLT checkpoint from a folder or a hub id, or draw one at random."""

import torch

TASKS = {
    "model": "ViltModel",
    "mlm": "ViltForMaskedLM",
    "vqa": "ViltForQuestionAnswering",
    "retrieval": "ViltForImageAndTextRetrieval",
    "nlvr2": "ViltForImagesAndTextClassification",
    "token": "ViltForTokenClassification",
}


class BadCheckpoint(Exception):
    """A checkpoint that cannot be used; the message says why and what to do."""


def require_transformers():
    """The transformers package, or BadCheckpoint with the command that installs it."""
    try:
        import transformers
    except ImportError:
        raise BadCheckpoint('transformers is not installed; run: pip install "vilt_fast[demo]"') from None
    return transformers


def load(checkpoint, task=None):
    """The HuggingFace model at `checkpoint` in float32, eval mode.

    `task` is a key of `TASKS`; without it the class is the architecture named in the checkpoint's config.
    Raises BadCheckpoint if there is no such checkpoint, it is not ViLT, or it names no architecture.
    """
    transformers = require_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadCheckpoint(
            f"cannot read a configuration from {checkpoint!r}: {reason}\n"
            "Give a folder that holds config.json and weights, or a hub id such as dandelin/vilt-b32-finetuned-vqa."
        ) from error
    if config.model_type != "vilt":
        raise BadCheckpoint(f"{checkpoint!r} is a {config.model_type!r} model; vilt_fast accelerates ViLT only.")
    architectures = [name for name in config.architectures or () if name in TASKS.values()]
    if task is None and not architectures:
        raise BadCheckpoint(f"{checkpoint!r} names no ViLT architecture; pass --task ({', '.join(TASKS)}).")
    name = TASKS[task] if task else architectures[0]
    try:
        model = getattr(transformers, name).from_pretrained(checkpoint)
    except (OSError, ValueError, RuntimeError) as error:
        raise BadCheckpoint(f"cannot load {name} from {checkpoint!r}: {str(error).strip().splitlines()[0]}") from error
    return model.float().eval()


def random_vqa(seed=0, **sizes):
    """ViLT-B/32 with a question-answering head (3129 answers) and random weights, float32, eval mode.

    HuggingFace starts positions and [CLS] at zero, which would hide a misplaced row: here they are drawn like the rest.
    `sizes` override fields of the configuration.
    """
    transformers = require_transformers()
    torch.manual_seed(seed)
    model = transformers.ViltForQuestionAnswering(transformers.ViltConfig(num_labels=3129, **sizes))
    with torch.no_grad():
        for parameter in (model.vilt.embeddings.position_embeddings, model.vilt.embeddings.cls_token):
            parameter.normal_(0, model.config.initializer_range)
    return model.eval()

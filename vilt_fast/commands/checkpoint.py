"""Load a ViLT checkpoint from a folder or a hub id, or draw one at random."""

import pickle
import re
from pathlib import Path

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


#: The largest size that is believed of a configuration; a thousand layers would take minutes to make.
_MOST = {"num_hidden_layers": 1000, "num_images": 1000}
_SIZES = (
    "num_hidden_layers", "num_images", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size",
    "max_position_embeddings", "image_size", "patch_size", "num_channels",
)  # fmt: skip


def load(checkpoint, task=None):
    """The HuggingFace model at `checkpoint`, a folder or a hub id, in float32, eval mode.

    `task` is a key of `TASKS`; without it the class is the architecture named in the checkpoint's config.
    Raises BadCheckpoint if there is no such checkpoint, it is damaged or not ViLT, or it names no architecture.
    """
    transformers = require_transformers()
    checkpoint = _found(checkpoint)
    # Other people's files, read by other people's code: whatever that raises, the checkpoint cannot be used.
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint)
    except Exception as error:
        raise BadCheckpoint(
            f"cannot read a configuration from {checkpoint!r}: {_reason(error)}\n"
            "Give a folder that holds config.json and weights, or a hub id such as dandelin/vilt-b32-finetuned-vqa."
        ) from error
    if config.model_type != "vilt":
        raise BadCheckpoint(f"{checkpoint!r} is a {config.model_type!r} model; vilt_fast accelerates ViLT only.")
    for name in _SIZES:
        value, most = getattr(config, name), _MOST.get(name, 2**20)
        if name == "num_images" and value == -1 or not isinstance(value, int):
            continue  # the model takes no images in groups; a pair of sizes
        if not 1 <= value <= most:
            raise BadCheckpoint(f"config.json of {checkpoint!r} says {name} = {value}; expected 1 to {most}.")
    named = config.architectures if isinstance(config.architectures, list | tuple) else [config.architectures]
    architectures = [name for name in named if name in TASKS.values()]
    if task is None and not architectures:
        raise BadCheckpoint(f"{checkpoint!r} names no ViLT architecture; pass --task ({', '.join(TASKS)}).")
    name = TASKS[task] if task else architectures[0]
    try:
        model = getattr(transformers, name).from_pretrained(checkpoint)
    except Exception as error:
        raise BadCheckpoint(f"cannot load {name} from {checkpoint!r}: {_reason(error)}") from error
    return model.float().eval()


def _found(checkpoint):
    """`checkpoint` with ~ replaced; BadCheckpoint for what can be neither a folder that is there nor a hub id."""
    where = Path(checkpoint).expanduser()
    if where.is_dir():
        return str(where)
    if where.is_file():
        raise BadCheckpoint(f"{checkpoint!r} is a file; give the folder that holds config.json and the weights.")
    hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", checkpoint) and not (
        "/" in checkpoint and where.parent.is_dir()
    )
    if not hub_id:
        raise BadCheckpoint(f"there is no folder {checkpoint!r}, and it is no hub id (those are OWNER/NAME).")
    return checkpoint


def _reason(error):
    """What went wrong, in a line."""
    if isinstance(error, pickle.UnpicklingError):
        return (
            "its weights are a pickle that is damaged or holds more than tensors, and loading one can run any program. "
            "If you trust it, load it yourself with torch.load(..., weights_only=False) and save_pretrained it again."
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:2]) if lines and lines[0].endswith(":") else (lines or ["no reason given"])[0]
    if type(error).__name__ == "SafetensorError":
        said += " (a download that was cut off? fetch the weights again)"
    known = isinstance(error, OSError | ValueError | RuntimeError)
    return said if known else f"{type(error).__name__}: {said}"


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

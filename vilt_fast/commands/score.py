"""`vilt-fast score`: every text of a file with every image of a folder, as a table and a contact sheet."""

import os
import sys
import warnings
from pathlib import Path

from . import checkpoint as checkpoints
from . import report
from .arguments import add_model, add_threads, check_picture, set_threads, whole


def add(commands):
    """The subcommand and its arguments."""
    parser = commands.add_parser("score", help="every text of a file with every image of a folder: a table, a picture")
    parser.add_argument("--images", required=True, metavar="DIR", help="folder of images, with those below it")
    parser.add_argument("--texts", required=True, metavar="FILE", help="a text a line, UTF-8; blank lines are left out")
    parser.add_argument("-o", "--out", required=True, help="table to write: .csv, .parquet, or .npy for all scores")
    parser.add_argument("--top-k", type=whole(1, 2**31 - 1), help="best images a text (of questions: answers a pair)")
    parser.add_argument("--sheet", metavar="PICTURE", help="also a picture of each text with its best images")
    add_model(parser, otherwise="")
    parser.add_argument("--task", choices=("retrieval", "vqa"), help="class to load, as for check")
    parser.add_argument("--dtype", choices=report.PRECISIONS, default="float32", help="default: float32")
    parser.add_argument("--device", help="default: a GPU where torch has one, but for int8; else cpu")
    parser.add_argument("--scores", metavar="FILE.npy", help="stream all scores there (-o FILE.npy does so by itself)")
    parser.add_argument("--resume", action="store_true", help="go on with what was streamed before it was interrupted")
    parser.add_argument("--token-budget", type=whole(1, 2**31 - 1), help="rows of a batch")
    parser.add_argument("--truncate", action="store_true", help="cut texts that are too long")
    add_threads(parser)
    parser.set_defaults(run=_run)


def _run(arguments, rest):
    set_threads(arguments.threads)
    given = vars(arguments)
    names = "images texts out top_k sheet model task dtype device scores resume token_budget truncate".split()
    try:
        run(**{name: given[name] for name in names})
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        said = str(error).removeprefix("score: ").replace("resume=True", "--resume").replace("out=", "-o")
        print(f"vilt-fast score: {said}", file=sys.stderr)
        return 2
    return 0


def run(
    images, texts, out, *, top_k=None, sheet=None, model=None, task=None, dtype="float32", device=None, scores=None,
    resume=False, token_budget=None, truncate=False,
):  # fmt: skip
    """Score, write the table `out` and the picture `sheet`, and say what was done.

    Started by `torchrun -m vilt_fast score ...`, each process computes its part and the first one writes.

    Returns:
        The :class:`~vilt_fast.scoring.matrix.ScoreMatrix`.

    Raises:
        ValueError, OSError: files that are missing, empty or cannot be written, and what `vilt_fast.score` raises.
        ImportError: a package that the picture needs is missing. BadCheckpoint: see `checkpoint.load`.
    """
    import torch

    from ..scoring import ranks, table
    from ..scoring.score import score
    from ..swap import accelerate

    if problem := table.why_not(out):
        raise ValueError(str(problem)) from problem
    if sheet is not None:
        check_picture(sheet)
        if not Path(sheet).parent.is_dir():
            raise ValueError(f"{sheet} cannot be written: there is no folder {Path(sheet).parent}.")
    streamed = out if Path(out).suffix == ".npy" else scores
    if scores is not None and streamed is not scores:
        raise ValueError(f"-o {out} holds all scores already: leave --scores out.")
    if resume and streamed is None:
        raise ValueError("--resume needs what was streamed before: --scores FILE.npy, or -o FILE.npy.")
    if model is None:
        raise ValueError("--model is missing, a folder or hub id such as dandelin/vilt-b32-finetuned-coco.")
    lines, paths = _lines(texts), _images(images)
    if reason := report.unavailable(dtype):
        raise ValueError(f"--dtype {dtype}: {reason}")
    device = device or ("cuda" if torch.cuda.is_available() and dtype != "int8" else "cpu")
    with ranks.started(device) as (rank, world):
        loaded = checkpoints.load(model, task).to(device)
        if dtype == "bfloat16":
            loaded = loaded.to(torch.bfloat16)
        accelerate(loaded, quantize="int8" if dtype == "int8" else None)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = score(
                loaded, lines, paths, top_k=top_k, out=streamed, resume=resume, token_budget=token_budget,
                truncate=truncate,
            )  # fmt: skip
    if rank:
        return found
    for warning in dict.fromkeys(str(warning.message) for warning in said):
        print(f"vilt-fast score: {warning.removeprefix('vilt_fast.score: ')}", file=sys.stderr)
    if streamed is not out:
        found.save(out)
    if sheet is not None:
        note = f"{model}, {dtype}; {len(lines)} texts, {len(paths)} images"
        found.sheet(sheet, top_k=None if found.answers is not None else top_k, note=note)
    wrote = " and ".join(str(path) for path in (out, scores, sheet) if path is not None)
    print(f"Wrote {wrote}: {len(lines)} texts, {len(paths)} images, {found.scores.shape[0] * len(paths)} pairs")
    return found


def _lines(path) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no texts: write one a line.")
    return lines


def _images(folder) -> list[str]:
    """Paths of all files in a folder, and below it, whose names end as those of images do, by name."""
    from PIL import Image

    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is no folder; --images takes one.")
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = [
        os.path.join(where, name)
        for where, _, names in os.walk(folder)
        for name in names
        if os.path.splitext(name)[1].lower() in known
    ]
    if not found:
        raise ValueError(f"{folder} holds no file that is named like an image (.jpg, .png, ...).")
    return sorted(found)

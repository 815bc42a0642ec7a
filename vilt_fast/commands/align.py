"""`vilt-fast align`: which patches of an image file each word of a text belongs to, as a picture."""

import sys
from pathlib import Path

from . import checkpoint as checkpoints
from . import report
from .arguments import above_zero, add_model, add_threads, check_picture, set_threads, whole


def add(commands):
    """The subcommand and its arguments."""
    parser = commands.add_parser("align", help="which patches of an image each word of a text belongs to: a picture")
    parser.add_argument("image", metavar="IMAGE", help="file: JPEG, PNG, ...")
    parser.add_argument("text", metavar="TEXT", help="in quotes")
    parser.add_argument("-o", "--out", default="alignment.png", help="picture to write: .png, .pdf, .svg, .jpg")
    add_model(parser)
    parser.add_argument("--task", choices=sorted(checkpoints.TASKS), help="class to load, as for check")
    parser.add_argument("--words", action="store_true", help="a panel a word, not a word piece")
    parser.add_argument("--beta", type=above_zero, default=0.1, help="proximal step of IPOT (default: 0.1)")
    parser.add_argument("--iterations", type=whole(1, 1_000_000), default=1000, help="of IPOT (default: 1000)")
    add_threads(parser)
    parser.set_defaults(run=_run)


def _run(arguments, rest):
    set_threads(arguments.threads)
    try:
        run(
            arguments.image,
            arguments.text,
            arguments.out,
            checkpoint=arguments.model,
            task=arguments.task,
            whole_words=arguments.words,
            beta=arguments.beta,
            iterations=arguments.iterations,
        )
    except (OSError, ValueError) as error:
        print(f"vilt-fast align: {str(error).removeprefix('align: ')}", file=sys.stderr)
        return 2
    return 0


def run(
    image,
    text,
    out="alignment.png",
    *,
    checkpoint=None,
    task=None,
    whole_words=False,
    beta=0.1,
    iterations=1000,
    console=None,
    model=None,
):
    """Align the words of `text` with the image file `image` and write the picture `out`; says what it does.

    `checkpoint` is a folder or hub id, `task` as for `checkpoint.load`; None draws ViLT-B/32 at random (`model`
    supplies a ready one instead, which gets made-up token ids) and says so on the screen and in the picture.

    Returns:
        The :class:`~vilt_fast.alignment.align.Alignment`.

    Raises:
        FileNotFoundError, ValueError: a file that is missing, no image, or cannot be written; a text without words or
            too long for the model. BadCheckpoint: see `checkpoint.load`.
    """
    import matplotlib  # noqa: F401  missing packages are to be named before minutes of work, not after
    from rich.console import Console
    from rich.markup import escape

    from ..alignment.align import align
    from ..alignment.draw import draw

    console = console or Console()
    check_picture(out)
    photograph = _opened(image)
    with report.progress(console) as bar:
        what = "Making random weights" if checkpoint is None else f"Loading {escape(checkpoint)}"
        stage = bar.add_task(what, total=3)
        processor = None
        if checkpoint is not None:
            model = checkpoints.load(checkpoint, task)
        else:
            model = checkpoints.random_vqa() if model is None else model
            processor = _numbered(model.config, text)
        bar.update(stage, description="Aligning words with patches", advance=1)
        aligned = align(
            model, photograph, text, processor=processor, beta=beta, iterations=iterations, whole_words=whole_words
        )
        bar.update(stage, advance=1, total=2 + len(aligned.tokens))
        h, w = aligned.grid
        counted = f"{len(aligned.tokens)} {'words' if whole_words else 'tokens'}, {h} x {w} patches"
        found = f"{counted}, distance {aligned.distance:.3f}"
        note = f"{found}; {checkpoint or 'random weights: how an alignment looks, not what ViLT has learnt'}"
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        draw(
            aligned, photograph, out, text=text, note=note,
            step=lambda word: bar.update(stage, description=f"Drawing: {escape(word)}", advance=1),
        )  # fmt: skip
    if checkpoint is None:
        console.print(
            "[bold yellow]The weights are random[/]: the picture shows how an alignment looks, not what ViLT has "
            "learnt. --model takes a checkpoint, such as dandelin/vilt-b32-mlm.",
            soft_wrap=True,
        )
    console.print(f"Wrote {out}: {found}", soft_wrap=True, highlight=False, markup=False)
    return aligned


def _opened(path):
    """The image file as RGB, turned as its camera says."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    from ..alignment.picture import rgb
    from ..errors import InputError

    try:
        with Image.open(path) as picture:
            return rgb(ImageOps.exif_transpose(picture))
    except InputError as error:
        raise ValueError(f"{path}: {str(error).removeprefix('align: ')}") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; give the path of an image.") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path} is no image that Pillow can read: convert it to JPEG or PNG.") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error


def _numbered(config, text):
    """A processor for weights that never saw a tokenizer: the words of `text`, split as by BERT, are its vocabulary."""
    from transformers import ViltProcessor

    from .samples import image_processor, word_tokenizer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    bare = word_tokenizer(special).backend_tokenizer
    words = [word for word, _ in bare.pre_tokenizer.pre_tokenize_str(bare.normalizer.normalize_str(text))]
    return ViltProcessor(image_processor(config), word_tokenizer(dict.fromkeys([*special, *words])))

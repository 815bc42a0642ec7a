"""`vilt-fast serve`: a model over HTTP, and a page in the browser to try it on."""

import contextlib
import ctypes
import os
import sys

from ..serving.limits import Limits
from . import checkpoint as checkpoints
from . import report
from .arguments import above_zero, add_threads, set_threads, whole

_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "h11", "pydantic", "starlette")
_PUBLIC = (
    "vilt-fast serve: whoever reaches this machine can use the model: --api-key, or $VILT_FAST_API_KEY, asks for a key."
)


def add(commands):
    """The subcommand and its arguments."""
    parser = commands.add_parser("serve", help="a model over HTTP: questions, ranking, and a page to try them on")
    default = os.environ.get("VILT_FAST_MODEL") or None
    parser.add_argument(
        "model", nargs="?", default=default, metavar="MODEL", help="folder or hub id (default: $VILT_FAST_MODEL)"
    )
    parser.add_argument("--task", choices=("retrieval", "vqa"), help="class to load, as for check")
    parser.add_argument("--dtype", choices=report.PRECISIONS, default="float32", help="default: float32")
    parser.add_argument("--device", help="default: a GPU where torch has one, but for int8; else cpu")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=whole(0, 65535), default=8080, help="0: any free one (default: 8080)")
    parser.add_argument("--api-key", help="that clients send, Authorization: Bearer KEY (default: $VILT_FAST_API_KEY)")
    add_threads(parser)
    parser.add_argument("--workers", type=whole(1, 1024), help="that share the threads (default: one for each)")
    parser.add_argument("--token-budget", type=whole(1, 2**31 - 1), help="rows of a batch")
    add = parser.add_argument_group("what is taken").add_argument
    for name, most, metavar, what in (
        ("body", 2**40, "BYTES", "a request"), ("bodies", 2**50, "BYTES", "all requests in hand"),
        ("pixels", 2**40, "N", "an image"), ("text", 2**30, "N", "characters of a text"),
        ("pairs", 2**30, "N", "of text and image, a request"), ("queue", 2**30, "N", "pairs in hand, then 429"),
    ):  # fmt: skip
        default = getattr(Limits, name)
        add(f"--max-{name}", type=whole(1, most), default=default, metavar=metavar, help=f"{what} ({default:,})")
    for flag, default, what in (
        ("--read-timeout", Limits.read_seconds, "for a body to come in"),
        ("--timeout", Limits.seconds, "from there to the answer"),
    ):
        add(flag, type=above_zero, default=default, metavar="S", help=f"{what} ({default:g} seconds)")
    parser.set_defaults(run=_run)


def _run(arguments, rest):
    _one_heap()
    set_threads(arguments.threads)
    try:
        run(arguments)
    except ImportError as error:
        if (error.name or "").split(".")[0] not in _NEEDED:
            raise
        print(f'vilt-fast serve: {error}; run: pip install "vilt_fast[serve]"', file=sys.stderr)
        return 2
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        print(f"vilt-fast serve: {str(error).removeprefix('serve: ')}", file=sys.stderr)
        return 2
    return 0


def _one_heap():
    """One heap for all threads, where the allocator is glibc's: of one each, in which one thread keeps what another
    frees, the memory grows for as long as the service runs (benchmarks/NOTES.md)."""
    m_arena_max = -8  # of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(m_arena_max, 1)


def run(arguments):
    """Load the model and serve it until SIGTERM or SIGINT; says where.

    Raises:
        ImportError: a package of the extra `serve` is missing. BadCheckpoint: see `checkpoint.load`.
        OSError, ValueError, TypeError: the address is taken; what was asked for cannot be had.
    """
    import torch

    from ..serving import server
    from ..serving.app import build
    from ..serving.metrics import Metrics
    from ..serving.service import Service
    from ..swap import accelerate

    if arguments.model is None:
        raise ValueError("MODEL is missing, a folder or hub id such as dandelin/vilt-b32-finetuned-vqa.")
    if reason := report.unavailable(arguments.dtype):
        raise ValueError(f"--dtype {arguments.dtype}: {reason}")
    key = arguments.api_key if arguments.api_key is not None else os.environ.get("VILT_FAST_API_KEY") or None
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key and key):
        raise ValueError("--api-key must be printable ASCII without spaces around it: it is sent in a header.")
    limits = Limits(
        body=min(arguments.max_body, arguments.max_bodies), bodies=arguments.max_bodies, pixels=arguments.max_pixels,
        text=arguments.max_text, pairs=min(arguments.max_pairs, arguments.max_queue), queue=arguments.max_queue,
        read_seconds=arguments.read_timeout, seconds=arguments.timeout,
    )  # fmt: skip
    try:
        listening = server.bound(arguments.host, arguments.port)
    except OSError as error:
        raise OSError(f"cannot listen at {arguments.host} port {arguments.port}: {error.strerror or error}") from error
    with listening:
        device = arguments.device or ("cuda" if torch.cuda.is_available() and arguments.dtype != "int8" else "cpu")
        model = checkpoints.load(arguments.model, arguments.task).to(device)
        if arguments.dtype == "bfloat16":
            model = model.to(torch.bfloat16)
        accelerate(model, quantize="int8" if arguments.dtype == "int8" else None)
        told = Metrics()
        service = Service(
            model, limits=limits, workers=arguments.workers, token_budget=arguments.token_budget, seen=told.seen
        )
        with contextlib.closing(service):
            app = build(service, told, name=arguments.model, dtype=arguments.dtype, key=key)
            host, port = listening.getsockname()[:2]
            if key is None and not server.is_loopback(arguments.host):
                print(_PUBLIC, file=sys.stderr, flush=True)
            listening.listen()  # who comes from here on waits for the server, and is not turned away
            shown = f"[{host}]" if ":" in host else host
            print(f"Serving {arguments.model} at http://{shown}:{port} (/docs says how to ask)", flush=True)
            server.run(app, listening, limits)
    print("Stopped: what was taken has been answered.", flush=True)

"""The routes: `/rerank` or `/vqa`, `/align`, `/info`, `/health`, `/metrics`, the schema, and a page to try them on."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from importlib import resources

import fastapi
from fastapi import Request, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from .. import __version__
from ..scoring.workers import Unreadable
from . import asked, metrics
from .batching import Full
from .door import Bodies, Door
from .limits import Refusal, invalid
from .service import Service

_PAGES = {  # what a browser gets without a key: nothing of it tells about the model
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
    "/docs": ("docs.html", "text/html"),
    "/docs.js": ("docs.js", "text/javascript"),
}


class Ranked(BaseModel):
    index: int
    score: float
    text: str | None = None


class Answer(BaseModel):
    answer: str
    score: float


class Aligned(BaseModel):
    """`heatmaps` has a list for each token: the heat of each patch of `grid` (rows, columns), row by row, 0 to 1."""

    tokens: list[str]
    grid: tuple[int, int]
    distance: float
    heatmaps: list[list[float]]


class Failure(BaseModel):
    error: str
    error_type: str


def build(service: Service, told: metrics.Metrics, *, name: str, dtype: str, key: str | None = None) -> fastapi.FastAPI:
    """The application; its lifespan ends with what the service has taken.

    Args:
        service: told.seen is what it tells of its batches.
        name, dtype: of the model, for `/info`. key: what clients have to know, if anything.
    """
    limits, bodies = service.limits, Bodies(service.limits)
    told.watch(lambda: service.queue.taken, lambda: bodies.held)
    readers = ThreadPoolExecutor(2, "vilt_fast door")  # JSON, base64 and headers of images, beside the loop

    @contextlib.asynccontextmanager
    async def lifespan(app):
        yield
        await asyncio.get_running_loop().run_in_executor(None, service.close)
        readers.shutdown()

    app = fastapi.FastAPI(
        title="vilt_fast", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        description="Questions about images, or the rank of texts for an image and of images for a text.",
        openapi_tags=[{"name": "model"}, {"name": "service"}],
    )  # fmt: skip

    async def computed(request: Request, kind, take, made) -> Response:
        """`take` gives the future of the results of what is asked, `made` the answer of both."""
        service.queue.room()  # before a body is read that nobody has time for
        async with bodies.read(request) as body:
            wanted, taken = await asyncio.get_running_loop().run_in_executor(readers, _taken, kind, body, take)
            results = await _results(request, asyncio.wrap_future(taken), limits.seconds)
        return JSONResponse(made(wanted, results))

    schemas = {}

    def route(path, kind, take, made, answer):
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update({**schema.pop("$defs", {}), kind.__name__: schema})
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}

        async def endpoint(request: Request):
            return await computed(request, kind, take, made)

        app.add_api_route(
            path, endpoint, methods=["POST"], name=path[1:], summary=kind.__doc__, tags=["model"],
            response_model=answer, responses={status: {"model": Failure, "description": why} for status, why in _WHY},
            openapi_extra={"requestBody": {"required": True, "content": content}},
        )  # fmt: skip

    if service.task.answers:
        route("/vqa", asked.Vqa, service.take_vqa, service.vqa, list[Answer])
    else:
        route("/rerank", asked.Rerank, service.take_rerank, service.rerank, list[Ranked])
    route("/align", asked.Align, service.take_align, service.align, Aligned)

    @app.get("/info", summary="The model, and what is taken", tags=["service"])
    def info() -> dict:
        return {
            "model": name, "task": "vqa" if service.task.answers else "rerank", "dtype": dtype, "version": __version__,
            "device": str(service.task.device), "workers": service.workers, "limits": dataclasses.asdict(limits),
        }  # fmt: skip

    @app.get("/health", summary="Whether it is there", tags=["service"])
    async def health() -> dict:
        return {"status": "ok"}

    @app.get("/metrics", summary="What Prometheus reads", tags=["service"], response_class=Response)
    def measured() -> Response:
        return Response(told.text(), media_type=metrics.CONTENT_TYPE)

    for path, (file, kind) in _PAGES.items():
        content = resources.files(__package__).joinpath("page", file).read_bytes()
        app.add_route(path, _page(content, kind), include_in_schema=False)
    own_schema = app.openapi

    def openapi():
        made = own_schema()
        made.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
        return made

    app.openapi = openapi
    paths = [route.path for route in app.routes]
    for kind in (Refusal, HTTPException, Full, Unreadable, ClientDisconnect, Exception):
        app.add_exception_handler(kind, lambda request, error: _answer(error, paths))
    app.add_middleware(
        Door, key=key, open_paths=frozenset({*_PAGES, "/health", "/openapi.json"}), paths=frozenset(paths), metrics=told
    )
    return app


_WHY = (
    (400, "No JSON"), (401, "Without the key"), (408, "A body that came too slowly"), (413, "Too large"),
    (415, "Not sent as JSON"), (422, "Not what is described here; no image; a text that is too long"),
    (429, "No room for it: try again after so many seconds as Retry-After says"), (503, "It took too long"),
)  # fmt: skip


def _taken(kind, body, take):
    wanted = asked.parsed(kind, body)
    return wanted, take(wanted)


async def _results(request, future, seconds):
    """Of a future, which is cancelled where the client has gone or too much time has passed."""
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({future, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if future.done():
            return future.result()
        if gone.done():
            raise ClientDisconnect
        raise Refusal(503, "Timeout", f"there was no result within {seconds:g} s", 1)
    finally:
        gone.cancel()
        future.cancel()


async def _gone(request):
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _page(content, kind):
    async def page(request):
        return Response(content, media_type=kind)

    return page


def _answer(error, paths):
    """Any failure as JSON of the same form."""
    headers = {}
    if isinstance(error, Full):
        error = Refusal(429, "Overloaded", str(error), error.seconds)
    elif isinstance(error, Unreadable):
        error = invalid(str(error))
    elif isinstance(error, ClientDisconnect):
        error = Refusal(499, "Gone", "the client has gone")
    elif isinstance(error, HTTPException):
        there = "; this service has " + ", ".join(paths) if error.status_code == 404 else ""
        headers, error = error.headers or {}, Refusal(error.status_code, "Request", f"{error.detail}{there}")
    elif not isinstance(error, Refusal):  # its traceback is in the log
        error = Refusal(500, "Backend", f"{type(error).__name__} while computing; the log of the service has more")
    return JSONResponse(error.body(), error.status, {**headers, **error.headers()})

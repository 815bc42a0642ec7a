"""What a request asks for: JSON to checked texts and images, nothing of which has been decoded yet."""

from __future__ import annotations

import base64
import io
import json
import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .limits import Limits, invalid

#: Formats that are opened: none of them runs another program or reads another file.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MOST_ANSWERS = 100

_URI = re.compile(r"data:image/[\w.+-]+;base64,")
_NO_IMAGE = "an image is sent as base64 or as a data URI (data:image/jpeg;base64,...); no URL and no path is read"

Encoded = Annotated[str, Field(description="A JPEG, PNG, WebP, GIF or BMP file as base64 or data URI")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Text(_Strict):
    text: str


class Photograph(_Strict):
    image: Encoded


Document = Annotated[
    str | Text | Photograph, Field(description='A text, {"text": ...}, or {"image": ...}; a data URI is an image too')
]


class Rerank(_Strict):
    """Texts for an image, or images for a text."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"query": {"image": "iVBORw0KGgo..."}, "texts": ["a cat", "two dogs"]}}
    )
    query: Document
    texts: Annotated[list[Document], Field(description="Documents: images for a text, texts for an image")]
    raw_scores: Annotated[bool, Field(description="The scores that rank, in place of their sigmoid")] = False
    return_text: bool = False
    truncate: Annotated[bool, Field(description="Cut texts that are too long, in place of refusing them")] = False
    truncation_direction: Literal["Right"] = "Right"


class VqaInputs(Photograph):
    question: str


class VqaParameters(_Strict):
    top_k: Annotated[int, Field(ge=1, le=MOST_ANSWERS, description="So many answers")] = 5
    truncate: bool = False


class Vqa(_Strict):
    """A question about an image."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "inputs": {"image": "iVBORw0KGgo...", "question": "How many cats are there?"},
                "parameters": {"top_k": 5},
            }
        }
    )
    inputs: VqaInputs
    parameters: VqaParameters = VqaParameters()

    @model_validator(mode="before")
    @classmethod
    def _of_the_client(cls, given):
        """What `huggingface_hub.InferenceClient` sends: question and image beside the inputs, which are the image."""
        if isinstance(given, dict) and {*given} - {"parameters"} == {"inputs", "question", "image"}:
            inputs, image, question = (given[name] for name in ("inputs", "image", "question"))
            if isinstance(inputs, str) and inputs == image:
                rest = {name: given[name] for name in ("parameters",) if name in given}
                return {"inputs": {"image": image, "question": question}, **rest}
        return given


class AlignInputs(Photograph):
    text: str


class AlignParameters(_Strict):
    whole_words: Annotated[bool, Field(description="Words in place of word pieces")] = True


class Align(_Strict):
    """An image and a text: which patches belong to which word."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"inputs": {"image": "iVBORw0KGgo...", "text": "a cat on a red sofa"}}}
    )
    inputs: AlignInputs
    parameters: AlignParameters = AlignParameters()


def parsed(kind: type[BaseModel], body: bytes) -> BaseModel:
    """A body as `kind`.

    Raises:
        Refusal: 400 for what is no JSON, holds NaN or says a key twice; 422 for JSON of another form.
    """
    try:
        given = json.loads(body.decode("utf-8"), parse_constant=_no_number, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        said = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise invalid(f"the body is no JSON that can be read: {said[:200]}", 400) from None
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)
        deepest = max(first, key=lambda e: len(e["loc"]))  # of the kinds of a union, the one that came furthest
        where = ".".join(str(part) for part in deepest["loc"] if not str(part).istitle())[:100]
        raise invalid(f"{where or 'the body'}: {deepest['msg'][:200]}") from None


def _no_number(name):
    raise ValueError(f"{name} is no JSON")


def _once(pairs):
    found = dict(pairs)
    if len(found) != len(pairs):
        seen = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice[:40]!r} is there twice")
    return found


def checked_text(text: str, where: str, limits: Limits) -> str:
    """A text that can be tokenised.

    Raises:
        Refusal: it is empty, too long or no Unicode.
    """
    if not text.strip():
        raise invalid(f"{where} is empty")
    if len(text) > limits.text:
        raise invalid(f"{where} has {len(text)} characters; at most {limits.text} are taken", 413)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise invalid(f"{where} holds half of a surrogate pair, which is no character") from None
    return text


def checked_image(encoded: str, where: str, limits: Limits) -> bytes:
    """The bytes of an image file, whose header says that it may be decoded.

    Raises:
        Refusal: it is no base64, no image of a known format, or too large.
    """
    from PIL import Image

    uri = _URI.match(encoded)
    if encoded.startswith("data:") and not uri:
        raise invalid(f"{where}: {_NO_IMAGE}")
    try:
        data = base64.b64decode(encoded[uri.end() :] if uri else encoded, validate=True)
    except ValueError:  # of binascii, or characters that are no ASCII
        raise invalid(f"{where} is no base64: {_NO_IMAGE}") from None
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as header:
            width, height = header.size
    except Image.DecompressionBombError:
        raise invalid(f"{where} has too many pixels; at most {limits.pixels} are taken", 413) from None
    except MemoryError:
        raise
    except Exception:  # other people's bytes, read by other people's code
        raise invalid(f"{where} is no {', '.join(FORMATS)} that can be read: {_NO_IMAGE}") from None
    if width * height > limits.pixels:
        raise invalid(f"{where} has {width} x {height} pixels; at most {limits.pixels} are taken", 413)
    return data


def is_image(document) -> bool:
    return isinstance(document, Photograph) or isinstance(document, str) and document.startswith("data:image/")


def content(document) -> str:
    """The text of a document, or the encoded image."""
    return document if isinstance(document, str) else getattr(document, "image", None) or getattr(document, "text", "")


def of_rerank(asked: Rerank, limits: Limits) -> tuple[list[str], list[bytes]]:
    """(texts, images) of a request to rank: one of these, and all of those.

    Raises:
        Refusal: there are none, too many, both kinds, or the kind of the query.
    """
    if not asked.texts:
        raise invalid("texts is empty")
    if len(asked.texts) > limits.pairs:
        raise invalid(f"texts has {len(asked.texts)} documents; at most {limits.pairs} are taken", 413)
    of_text = not is_image(asked.query)
    for place, document in enumerate(asked.texts):
        if is_image(document) != of_text:
            kinds = ("text", "image") if of_text else ("image", "text")
            raise invalid(f"query is a {kinds[0]}, so texts[{place}] must be a {kinds[1]}: ViLT scores one with one")
    if asked.return_text and of_text:
        raise invalid("return_text gives texts back; these documents are images")
    texts, images = ([asked.query], asked.texts) if of_text else (asked.texts, [asked.query])
    names = ("query", "texts[{}]") if of_text else ("texts[{}]", "query")
    return (
        [checked_text(content(text), names[0].format(n), limits) for n, text in enumerate(texts)],
        [checked_image(content(image), names[1].format(n), limits) for n, image in enumerate(images)],
    )

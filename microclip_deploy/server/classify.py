"""POST /v1/classify: a photo in, its classes and where the model looked out."""

import asyncio
import re
from collections.abc import AsyncGenerator
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from microclip_deploy.calibration import is_unknown
from microclip_deploy.head import LOGIT_SCALE
from microclip_deploy.server.intake import View
from microclip_deploy.server.refusal import Refusal
from microclip_deploy.server.saliency import FORMS, saliency
from microclip_deploy.server.seat import Facts
from microclip_deploy.serving.classification import guesses
from microclip_deploy.serving.session import Prediction

MOST_CLASSES = 100_000
"""Of `top_k`."""

_PART = 65_536
"""Bytes of a form that are read in one go."""

_FLAGS = {"true": True, "1": True, "false": False, "0": False}


class Question(NamedTuple):
    """What the address asks for."""

    model: str | None
    version: str | None
    top_k: int
    saliency: str
    heads: bool

    @classmethod
    def of(cls, request: Request) -> Self:
        """Read the parameters.

        Raises:
            Refusal: 400, one is unknown or has another value.
        """
        given = request.query_params
        unknown = set(given) - set(cls._fields)
        if unknown or len(given) != len(given.multi_items()):
            raise _refused(f"expected the parameters {', '.join(cls._fields)}, each once")
        top_k, form, heads = given.get("top_k", "5"), given.get("saliency", "none"), "heads"
        if not re.fullmatch("[0-9]{1,6}", top_k) or not 1 <= int(top_k) <= MOST_CLASSES:
            raise _refused(f"expected top_k from 1 to {MOST_CLASSES}")
        if form not in FORMS:
            raise _refused(f"expected saliency as one of {', '.join(FORMS)}")
        if given.get(heads, "false") not in _FLAGS:
            raise _refused("expected heads as true or false")
        both = _FLAGS[given.get(heads, "false")]
        return cls(given.get("model"), given.get("version"), int(top_k), form, both)


async def photo_of(headers: Headers, body: bytes) -> bytes:
    """Return the bytes of the photo in a body.

    Raises:
        Refusal: 400, there is not just one; 415, a body of another kind.
    """
    kind = headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _uploaded(headers, body)
    if kind.startswith("image/") or kind in (
        "application/octet-stream",
        "application/x-www-form-urlencoded",
    ):
        return body  # the last one is what curl says of --data-binary
    raise Refusal(
        415,
        "expected Content-Type image/*, application/octet-stream or multipart/form-data",
        "body",
    )


class _Parser(MultiPartParser):
    """Keeps uploads in memory: the body is there already, and its size is bounded."""

    spool_max_size = 1 << 40


async def _uploaded(headers: Headers, body: bytes) -> bytes:
    async def stream() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(body), _PART):
            yield body[start : start + _PART]
            await asyncio.sleep(0)  # others have their turn

    try:
        form = await _Parser(headers, stream(), max_files=1, max_fields=8).parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise _refused("expected multipart/form-data with one file") from error
    files = [part for part in form.values() if isinstance(part, UploadFile)]
    if len(files) != 1:
        raise _refused("expected one file in the form, as the field photo")
    return await files[0].read()


def answer_to(
    question: Question, facts: Facts, view: View, prediction: Prediction
) -> dict[str, Any]:
    """Return what is said about a photo as JSON values.

    Args:
        question: what was asked for.
        facts: of the model.
        view: the photo.
        prediction: of one image.
    """
    width, height = view.size
    told: dict[str, Any] = {
        "photo": {"width": width, "height": height},
        "classes": best(facts, prediction.logits[0], question.top_k),
    }
    told["unknown"] = is_unknown(told["classes"][0]["probability"], facts.calibration)
    if question.heads:
        told["heads"] = {
            name: best(facts, LOGIT_SCALE * (facts.classifier @ embedding[0]), question.top_k)
            for name, embedding in (("cls", prediction.cls), ("fg", prediction.fg))
        }
    if question.saliency != "none":
        mask, attention, complete = (
            field[0] for field in (prediction.mask, prediction.attention, prediction.complete)
        )
        told["saliency"] = saliency(
            question.saliency, view, facts.preprocess, mask, attention, bool(complete)
        )
    return told


def best(facts: Facts, logits: NDArray[np.float32], top_k: int) -> list[dict[str, Any]]:
    """Return the most probable classes, the first one first."""
    [top] = guesses(facts, logits[None], top_k)
    return [guess._asdict() for guess in top]


def _refused(message: str) -> Refusal:
    return Refusal(400, f"{message}; see /openapi.json", "question")

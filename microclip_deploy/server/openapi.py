"""The description of the interface, as OpenAPI 3.1."""

from functools import cache
from importlib.metadata import version
from typing import Any

from microclip_deploy.server.classify import MOST_CLASSES
from microclip_deploy.server.inference_protocol import InferRequest
from microclip_deploy.server.saliency import FORMS

Json = dict[str, Any]

_NUMBER, _TEXT, _FLAG = {"type": "number"}, {"type": "string"}, {"type": "boolean"}


def _object(**properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(items: Json) -> Json:
    return {"type": "array", "items": items}


_GUESS = _object(name=_TEXT, probability=_NUMBER, logit=_NUMBER, adapted=_FLAG)
_ANSWER = _object(
    model=_TEXT,
    version=_TEXT,
    id=_TEXT,
    photo=_object(width={"type": "integer"}, height={"type": "integer"}),
    classes=_list(_GUESS),
    unknown=_FLAG,
    timing_ms={"type": "object", "additionalProperties": _NUMBER},
)
_ANSWER["properties"] |= {
    "heads": _object(cls=_list(_GUESS), fg=_list(_GUESS)),
    "saliency": {"type": "object"},
}
_ERRORS = {
    "400": "The request is wrong; the message says how.",
    "401": "The API key is missing or wrong.",
    "404": "No such model, version or address.",
    "405": "Another method is expected.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "415": "The body is of another kind.",
    "429": "Too much waits; Retry-After says when to send again.",
    "503": "No worker can answer now; Retry-After says when to send again.",
    "504": "There was no answer within the time limit.",
}


def _responses(schema: Json, *, ready: bool = False) -> Json:
    """Return the answers of an operation; every error has the same form."""
    error = {"application/json": {"schema": _object(error=_TEXT)}}
    told: Json = {
        "200": {"description": "The answer.", "content": {"application/json": {"schema": schema}}}
    }
    told |= {code: {"description": text, "content": error} for code, text in _ERRORS.items()}
    if ready:
        told["503"] = {
            "description": "It is not ready.",
            "content": {"application/json": {"schema": schema}},
        }
    return told


def _parameter(name: str, where: str, schema: Json, *, required: bool = False) -> Json:
    return {"name": name, "in": where, "schema": schema, "required": required}


def _get(summary: str, schema: Json, *parameters: Json, ready: bool = False) -> Json:
    told: Json = {"summary": summary, "responses": _responses(schema, ready=ready)}
    return {"get": {**told, "parameters": list(parameters)}}


def _classify() -> Json:
    parameters = [
        _parameter("model", "query", _TEXT),
        _parameter("version", "query", _TEXT),
        _parameter(
            "top_k",
            "query",
            {"type": "integer", "minimum": 1, "maximum": MOST_CLASSES, "default": 5},
        ),
        _parameter("saliency", "query", {"enum": list(FORMS), "default": "none"}),
        _parameter("heads", "query", {**_FLAG, "default": False}),
    ]
    photo = {"schema": {"type": "string", "contentMediaType": "application/octet-stream"}}
    form = {"schema": _object(photo={"type": "string", "format": "binary"})}
    content = {"application/octet-stream": photo, "image/*": photo, "multipart/form-data": form}
    return {
        "post": {
            "summary": "Classify one photo.",
            "parameters": parameters,
            "requestBody": {"required": True, "content": content},
            "responses": _responses(_ANSWER),
        }
    }


def _model_paths() -> Json:
    name = _parameter("model", "path", _TEXT, required=True)
    version = _parameter("version", "path", _TEXT, required=True)
    infer = {
        "summary": "Open Inference Protocol: inference; tensors may follow the JSON as bytes.",
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": {"$ref": "#/components/schemas/InferRequest"}}
            },
        },
        "responses": _responses({"type": "object"}),
    }
    told: Json = {}
    for path, parameters in (
        ("/v2/models/{model}", [name]),
        ("/v2/models/{model}/versions/{version}", [name, version]),
    ):
        told[path] = _get("Inputs and outputs of a model.", {"type": "object"}, *parameters)
        told[f"{path}/config"] = _get("Its configuration.", {"type": "object"}, *parameters)
        told[f"{path}/ready"] = _get(
            "Whether it can answer.", _object(name=_TEXT, ready=_FLAG), *parameters, ready=True
        )
        told[f"{path}/infer"] = {"post": {**infer, "parameters": parameters}}
    return told


@cache
def document() -> Json:
    """Return the whole description."""
    template = "#/components/schemas/{model}"
    schema = InferRequest.model_json_schema(ref_template=template)
    parts = schema.pop("$defs")
    index = _get("Models as Triton's clients list them.", _list({"type": "object"}))["get"]
    return {
        "openapi": "3.1.0",
        "info": {"title": "microclip-deploy", "version": version("microclip-deploy")},
        "paths": {
            "/v1/classify": _classify(),
            "/v1/models": _get("What is served.", _object(models=_list({"type": "object"}))),
            "/v2": _get("Open Inference Protocol: the server.", {"type": "object"}),
            "/v2/health/live": _get("Whether the server answers.", _object(live=_FLAG)),
            "/v2/health/ready": _get(
                "Whether every model can answer.", _object(ready=_FLAG), ready=True
            ),
            "/v2/repository/index": {"post": index},
            **_model_paths(),
        },
        "components": {
            "schemas": {"InferRequest": schema, **parts},
            "securitySchemes": {"key": {"type": "apiKey", "in": "header", "name": "X-API-Key"}},
        },
        "security": [{}, {"key": []}],
    }

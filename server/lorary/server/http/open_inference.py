"""/v2: the Open Inference Protocol's HTTP form; a body becomes the message that gRPC would have brought."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse
from starlette.routing import Route

from lorary.oip import open_inference_pb2 as oip
from lorary.server.http.body import Fields, unicode_text
from lorary.server.http.call import Endpoint

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from starlette.requests import Request
    from starlette.responses import Response

    from lorary.server.access.guard import Guard
    from lorary.server.http.call import Handler, HttpCall
    from lorary.server.http.problems import Problem
    from lorary.server.interceptors import CallMetrics
    from lorary.server.open_inference.service import OpenInference
    from lorary.server.tracing.calls import Tracing

_MODEL = ("/v2/models/{name:path}/versions/{version}", "/v2/models/{name:path}")


def open_inference_routes(
    service: OpenInference,
    metrics: CallMetrics,
    *,
    max_body: int,
    guard: Guard | None,
    tracing: Tracing | None,
) -> list[Route]:
    """Return the routes of /v2; health is open to anybody, all else is behind ``guard`` and has spans."""
    door = _Door(service)

    def route(path: str, name: str, handler: Handler, *, body: int = 0) -> Route:
        endpoint = Endpoint(
            name,
            handler,
            metrics,
            max_body=body,
            guard=guard,
            tracing=tracing,
            path=path,
            error_body=_error_body,
        )
        return Route(path, endpoint, methods=["POST" if body else "GET"])

    return [
        Route("/v2/health/live", door.live),
        Route("/v2/health/ready", door.ready),
        route("/v2", "HttpServerMetadata", door.server),
        *(route(f"{path}/infer", "HttpModelInfer", door.infer, body=max_body) for path in _MODEL),
        *(route(f"{path}/ready", "HttpModelReady", door.model_ready) for path in _MODEL),
        *(route(path, "HttpModelMetadata", door.model) for path in _MODEL),
    ]


@dataclass(frozen=True, slots=True)
class _Door:
    service: OpenInference

    async def live(self, _: Request) -> Response:
        """Answer ``GET /v2/health/live``."""
        live = (await self.service.ServerLive(oip.ServerLiveRequest(), None)).live
        return JSONResponse({"live": live}, 200 if live else 503)

    async def ready(self, _: Request) -> Response:
        """Answer ``GET /v2/health/ready``."""
        ready = (await self.service.ServerReady(oip.ServerReadyRequest(), None)).ready
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    async def server(self, call: HttpCall) -> None:
        """Answer ``GET /v2``."""
        found = await self.service.ServerMetadata(oip.ServerMetadataRequest(), call)
        await call.answer_json({"name": found.name, "version": found.version, "extensions": []})

    async def model_ready(self, call: HttpCall) -> None:
        """Answer ``GET /v2/models/NAME/ready``: 503 while calls would not be taken."""
        name, version = _model(call)
        request = oip.ModelReadyRequest(name=name, version=version)
        ready = (await self.service.ModelReady(request, call)).ready
        told = json.dumps({"name": name, "ready": ready}).encode()
        await call.answer(told, code=200 if ready else 503)

    async def model(self, call: HttpCall) -> None:
        """Answer ``GET /v2/models/NAME``."""
        name, version = _model(call)
        request = oip.ModelMetadataRequest(name=name, version=version)
        found = await self.service.ModelMetadata(request, call)
        await call.answer_json(
            {
                "name": found.name,
                "versions": list(found.versions),
                "platform": found.platform,
                "inputs": [_told_tensor(one) for one in found.inputs],
                "outputs": [_told_tensor(one) for one in found.outputs],
            }
        )

    async def infer(self, call: HttpCall) -> None:
        """Answer ``POST /v2/models/NAME/infer``."""
        name, version = _model(call)
        request = read_infer(call.members)
        request.model_name, request.model_version = name, version
        found = await self.service.ModelInfer(request, call)
        outputs = [{**_told_tensor(one), "data": _data(one)} for one in found.outputs]
        await call.answer_json(
            {
                "model_name": found.model_name,
                "model_version": found.model_version,
                "id": found.id,
                "parameters": {k: one.string_param for k, one in found.parameters.items()},
                "outputs": outputs,
            }
        )


def _model(call: HttpCall) -> tuple[str, str]:
    return call.path["name"], call.path.get("version", "")


def _error_body(found: Problem) -> bytes:
    """Return an error as this protocol tells it: its message alone."""
    return json.dumps({"error": found.content["error"]["message"]}).encode()


def read_infer(members: Mapping[str, Any]) -> oip.ModelInferRequest:
    """Return the message that a body stands for, without its model.

    Raises:
        InvalidRequest: a member is unknown or of the wrong type; tensors hold strings, in lists of any depth.
    """
    fields = Fields(members)
    request = oip.ModelInferRequest(id=fields.text("id") or "")
    _read_parameters(fields, request.parameters)
    for i, one in enumerate(fields.list("inputs", dict, "objects") or ()):
        given = fields.within(f"inputs[{i}]", one)
        shape = given.list("shape", int, "whole numbers") or []
        tensor = request.inputs.add(
            name=given.text("name") or "", datatype=given.text("datatype") or ""
        )
        try:
            tensor.shape.extend(shape)
        except ValueError as error:
            raise given.error("shape", f"shape has a number out of range: {error}.") from error
        _read_parameters(given, tensor.parameters)
        for text in _flat(given, given.take("data")):
            tensor.contents.bytes_contents.append(unicode_text(given, "data", text).encode())
        given.finish()
    for i, one in enumerate(fields.list("outputs", dict, "objects") or ()):
        given = fields.within(f"outputs[{i}]", one)
        wanted = request.outputs.add(name=given.text("name") or "")
        _read_parameters(given, wanted.parameters)
        given.finish()
    fields.finish()
    return request


def _flat(fields: Fields, data: Any) -> Iterator[str]:
    """Yield the strings of nested lists, in order."""
    left = [data]
    while left:
        one = left.pop()
        if isinstance(one, list):
            left.extend(reversed(one))
        elif isinstance(one, str):
            yield one
        else:
            raise fields.error("data", f"data holds {json.dumps(one)[:64]}; it must be strings.")


def _read_parameters(fields: Fields, parameters: Any) -> None:
    for name, value in (fields.mapping("parameters") or {}).items():
        unicode_text(fields, "parameters", name)
        parameter = parameters[name]
        try:
            if isinstance(value, bool):
                parameter.bool_param = value
            elif isinstance(value, int):
                parameter.int64_param = value
            elif isinstance(value, float):
                parameter.double_param = value
            else:
                parameter.string_param = value
        except (TypeError, ValueError) as error:
            raise fields.error(
                f"parameters.{name[:64]}", f"{name[:64]} is no boolean, number or text: {error}."
            ) from error


def _told_tensor(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}


def _data(tensor: oip.ModelInferResponse.InferOutputTensor) -> list[Any]:
    contents = tensor.contents
    if tensor.datatype == "BYTES":
        return [one.decode() for one in contents.bytes_contents]
    return list(contents.int64_contents or contents.fp32_contents)

"""Tensors of the protocol: texts out of those that are sent, values into those that are answered."""

from __future__ import annotations

import math
import struct
from itertools import islice
from typing import TYPE_CHECKING

from lorary.errors import InvalidRequest
from lorary.oip import open_inference_pb2 as oip

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TEXT_INPUT = "text_input"
MAX_DIMENSIONS = 8
"""Of the texts. Each is told again with every output, and the product of thousands of large ones takes minutes."""

_LENGTH = struct.Struct("<I")


def read_texts(request: oip.ModelInferRequest, *, most: int) -> tuple[tuple[str, ...], list[int]]:
    """Return the texts of a call, at most so many, and the shape that they were sent in.

    Raises:
        InvalidRequest: its inputs are not one tensor of texts, or its elements do not fill its shape.
    """
    if [tensor.name for tensor in request.inputs] != [TEXT_INPUT]:
        names = ", ".join(repr(tensor.name[:64]) for tensor in request.inputs[:8])
        raise InvalidRequest(
            f"the inputs are {names or 'none'}; send one, '{TEXT_INPUT}'.", field="inputs"
        )
    (tensor,) = request.inputs
    if tensor.datatype != "BYTES":
        raise InvalidRequest(
            f"'{TEXT_INPUT}' has datatype '{tensor.datatype[:64]}'; it must be BYTES, of UTF-8 text.",
            field="inputs[0].datatype",
        )
    if tensor.parameters:
        name = min(tensor.parameters)[:64]
        raise InvalidRequest(
            f"'{TEXT_INPUT}' has the parameter '{name}', and tensors here have none. Leave it out.",
            field="inputs[0].parameters",
        )
    if len(tensor.shape) > MAX_DIMENSIONS:
        raise InvalidRequest(
            f"the shape of '{TEXT_INPUT}' has {len(tensor.shape)} dimensions; at most {MAX_DIMENSIONS} are "
            "allowed. Send the texts in fewer, such as one.",
            field="inputs[0].shape",
        )
    shape = list(tensor.shape)
    count = math.prod(shape)
    if not shape or min(shape) < 1 or count > most:
        raise InvalidRequest(
            f"'{TEXT_INPUT}' has shape {shape}; it must hold 1 to {most} texts.",
            field="inputs[0].shape",
        )
    # One more tells that there are too many; a raw tensor of megabytes may have a million empty ones.
    elements = _elements(request, most=count + 1)
    if len(elements) != count:
        has = f"more than {count}" if len(elements) > count else len(elements)
        raise InvalidRequest(
            f"'{TEXT_INPUT}' has {has} elements and shape {shape}, which holds {count}.",
            field="inputs[0].shape",
        )
    return tuple(_text(element, i) for i, element in enumerate(elements)), shape


def _elements(request: oip.ModelInferRequest, *, most: int) -> list[bytes]:
    """Return the elements of the only input, which is of BYTES; the first ``most`` of them."""
    contents = request.inputs[0].contents
    if not request.raw_input_contents:
        other = [field.name for field, _ in contents.ListFields() if field.name != "bytes_contents"]
        if other:
            raise InvalidRequest(
                f"'{TEXT_INPUT}' is of BYTES and has {other[0]}; fill bytes_contents.",
                field=f"inputs[0].contents.{other[0]}",
            )
        return list(contents.bytes_contents[:most])
    if len(request.raw_input_contents) != 1 or contents.ListFields():
        raise InvalidRequest(
            f"{len(request.raw_input_contents)} raw contents were sent for one input"
            f"{' that has contents of its own' if contents.ListFields() else ''}; send one of either kind.",
            field="raw_input_contents",
        )
    return list(islice(_split(request.raw_input_contents[0]), most))


def _split(raw: bytes) -> Iterator[bytes]:
    """Yield the elements of a raw tensor of BYTES."""
    start = 0
    while start < len(raw):
        stop = start + _LENGTH.size
        if stop <= len(raw):
            stop += _LENGTH.unpack_from(raw, start)[0]
        if stop > len(raw):
            raise InvalidRequest(
                f"the raw contents of '{TEXT_INPUT}' end within an element: at byte {start} of {len(raw)} "
                "begin 4 bytes of length, the least significant first, and as many bytes of text.",
                field="raw_input_contents",
            )
        yield raw[start + _LENGTH.size : stop]
        start = stop


def _text(element: bytes, place: int) -> str:
    try:
        return element.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"text {place} of '{TEXT_INPUT}' is not UTF-8: {error.reason} at byte {error.start}.",
            field=f"inputs[0].contents.bytes_contents[{place}]",
        ) from error


def add_output(
    response: oip.ModelInferResponse,
    name: str,
    datatype: str,
    shape: Sequence[int],
    values: Sequence[str] | Sequence[float],
    *,
    is_raw: bool,
) -> None:
    """Add a tensor of BYTES (of texts), INT64 or FP32 to an answer, with its elements as the call sent its own."""
    tensor = response.outputs.add(name=name, datatype=datatype, shape=shape)
    if is_raw:
        response.raw_output_contents.append(_packed(datatype, values))
    elif datatype == "BYTES":
        tensor.contents.bytes_contents.extend(str(value).encode() for value in values)
    elif datatype == "INT64":
        tensor.contents.int64_contents.extend(int(value) for value in values)
    else:
        tensor.contents.fp32_contents.extend(float(value) for value in values)


def _packed(datatype: str, values: Sequence[str] | Sequence[float]) -> bytes:
    if datatype == "BYTES":
        encoded = [str(value).encode() for value in values]
        return b"".join(_LENGTH.pack(len(one)) + one for one in encoded)
    return struct.pack(f"<{len(values)}{'q' if datatype == 'INT64' else 'f'}", *values)

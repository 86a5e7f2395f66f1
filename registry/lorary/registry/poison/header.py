"""Safetensors files whose header lies; public parsers take several of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

from lorary.registry.poison.attack import Attack, Victim, corrupt

_MANY_TENSORS: Final = 20_001


def _bytes(content: bytes) -> Callable[[Victim], None]:
    return lambda victim: _write(victim, content)


def _write(victim: Victim, content: bytes) -> None:
    victim.tensors.write_bytes(content)


def _cut(victim: Victim) -> None:
    _write(victim, victim.tensors.read_bytes()[:-1])


def _cut_in_header(victim: Victim) -> None:
    _write(victim, victim.tensors.read_bytes()[:64])


def _grow(victim: Victim) -> None:
    _write(victim, victim.tensors.read_bytes() + b"\0")


def _claim(length: int) -> Callable[[Victim], None]:
    return lambda victim: victim.set_raw(b"{}", length=length)


def _header(raw: bytes) -> Callable[[Victim], None]:
    return lambda victim: victim.set_raw(raw, bytes(64))


def _entry(**changes: Any) -> Callable[[Victim], None]:
    """Change the first tensor's entry; a value of ``...`` takes the key away."""

    def change(victim: Victim) -> None:
        header, data = victim.header_and_data()
        first = header[next(iter(header))]
        for key, value in changes.items():
            if value is ...:
                del first[key]
            else:
                first[key] = value
        victim.set_raw(header, data)

    return change


def _named(name: str) -> Callable[[Victim], None]:
    """Give the first tensor another name."""

    def change(victim: Victim) -> None:
        header, data = victim.header_and_data()
        first = next(iter(header))
        victim.set_raw({(name if key == first else key): header[key] for key in header}, data)

    return change


def _shift(start: int, end: int) -> Callable[[Victim], None]:
    """Move the offsets of the second tensor."""

    def change(victim: Victim) -> None:
        header, data = victim.header_and_data()
        offsets = header[[*header][1]]["data_offsets"]
        header[[*header][1]]["data_offsets"] = [offsets[0] + start, offsets[1] + end]
        victim.set_raw(header, data)

    return change


def _swap_offsets(victim: Victim) -> None:
    header, data = victim.header_and_data()
    first = header[next(iter(header))]
    first["data_offsets"].reverse()
    victim.set_raw(header, data)


def _twice(victim: Victim) -> None:
    header, data = victim.header_and_data()
    name = next(iter(header))
    again = f', "{name}": {json.dumps(header[name])}}}'
    victim.set_raw((json.dumps(header)[:-1] + again).encode(), data)


def _shape_twice(victim: Victim) -> None:
    header, data = victim.header_and_data()
    raw = json.dumps(header).replace('"shape"', '"shape": [1, 1], "shape"', 1)
    victim.set_raw(raw.encode(), data)


def _not_a_number(victim: Victim) -> None:
    header, data = victim.header_and_data()
    header[next(iter(header))]["shape"][0] = float("nan")
    victim.set_raw(json.dumps(header).encode(), data)


def _metadata(victim: Victim) -> None:
    header, data = victim.header_and_data()
    victim.set_raw({"__metadata__": {"format": {"nested": 1}}, **header}, data)


def _many(victim: Victim) -> None:
    header = {
        f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]}
        for i in range(_MANY_TENSORS)
    }
    victim.set_raw(header, bytes(4 * _MANY_TENSORS))


def _huge(victim: Victim) -> None:
    victim.set_raw(b"{" + b" " * (9 << 20) + b"}")


ATTACKS: Final[tuple[Attack, ...]] = (
    corrupt("header", "empty-file", "Weights of 0 bytes.", "too short", _bytes(b"")),
    corrupt("header", "seven-bytes", "Less than the header's length takes.", "too short", _bytes(b"\1" * 7)),
    corrupt("header", "truncated-data", "The last byte is missing.", "truncated", _cut),
    corrupt("header", "truncated-header", "The file ends inside its header.", "truncated", _cut_in_header),
    corrupt("header", "trailing-bytes", "Bytes that no tensor owns, to hide something in.", "trailing", _grow),
    corrupt("header", "header-of-2-to-the-63", "A length that overflows where it is a signed number.",
            "claims a header", _claim(2**63)),
    corrupt("header", "header-of-2-to-the-64-less-1", "A length that wraps where 8 is added.",
            "claims a header", _claim(2**64 - 1)),
    corrupt("header", "header-of-0", "A header of no bytes.", "not a JSON object", _claim(0)),
    corrupt("header", "header-of-9-megabytes", "A header that takes long to parse.",
            "the limit is", _huge),
    corrupt("header", "header-is-no-json", "A header that is not JSON.", "not JSON", _header(b"{nonsense")),
    corrupt("header", "header-is-a-list", "A header that is a list.", "not a JSON object", _header(b"[1, 2, 3]")),
    corrupt("header", "header-is-not-utf8", "Bytes that are no text.", "not JSON", _header(b'{"\xff": 1}')),
    corrupt("header", "half-a-character", "Half of a surrogate pair, which can be read and not written.",
            "not JSON", _header(b'{"\\ud800": 1}')),
    corrupt("header", "deep-nesting", "A million brackets, to exhaust a parser's stack.",
            "not JSON", _header(b'{"a":' + b"[" * 1_000_000)),
    corrupt("header", "number-of-5000-digits", "A number that takes quadratic time to parse.",
            "not JSON", _header(b'{"a": ' + b"9" * 5000 + b"}")),
    corrupt("header", "duplicate-tensor", "One name twice: the checked tensor is not the loaded one.",
            "twice", _twice),
    corrupt("header", "duplicate-shape", "Two shapes for one tensor.", "twice", _shape_twice),
    corrupt("header", "not-a-number-as-a-dimension", "NaN in a shape.", "not JSON", _not_a_number),
    corrupt("header", "metadata-with-objects", "Metadata that is not text.", "__metadata__", _metadata),
    corrupt("header", "no-tensors", "A header without tensors.", "0 tensors", _header(b"{}")),
    corrupt("header", "too-many-tensors", f"{_MANY_TENSORS} tensors of one number.",
            f"{_MANY_TENSORS} tensors", _many),
    corrupt("header", "overlapping-offsets", "A tensor that reads another's bytes.",
            "overlaps", _shift(-4, -4)),
    corrupt("header", "gap-between-tensors", "Bytes between tensors that nobody looks at.",
            "leaves a gap", _shift(4, 4)),
    corrupt("header", "reversed-offsets", "An end before its beginning.", "data_offsets", _swap_offsets),
    corrupt("header", "negative-offset", "An offset into the header.", "data_offsets", _entry(data_offsets=[-8, 0])),
    corrupt("header", "fractional-offset", "An offset that is no whole number.",
            "data_offsets", _entry(data_offsets=[0, 1024.0])),
    corrupt("header", "true-as-an-offset", "A truth value where a number is expected.",
            "data_offsets", _entry(data_offsets=[False, True])),
    corrupt("header", "three-offsets", "One offset too many.", "data_offsets", _entry(data_offsets=[0, 8, 16])),
    corrupt("header", "offset-beyond-64-bits", "An offset that wraps to the right one.",
            "bytes;", _entry(data_offsets=[0, 2**64 + 1024])),
    corrupt("header", "dimension-of-0", "A tensor without elements.", "positive", _entry(shape=[0, 64])),
    corrupt("header", "negative-dimension", "A dimension below 0.", "positive", _entry(shape=[-4, -64])),
    corrupt("header", "shape-that-wraps", "Dimensions whose product is 0 in 64 bits.",
            "bytes;", _entry(shape=[2**32, 2**32])),
    corrupt("header", "nine-dimensions", "More dimensions than anybody needs.", "positive", _entry(shape=[1] * 9)),
    corrupt("header", "true-as-a-dimension", "A truth value as a dimension.", "positive", _entry(shape=[True, 64])),
    corrupt("header", "no-shape", "An entry without a shape.", "exactly dtype", _entry(shape=...)),
    corrupt("header", "unknown-key", "An entry with a key of its own.", "exactly dtype", _entry(byteorder="big")),
    corrupt("header", "unknown-dtype", "A dtype that does not exist.", "accepted are", _entry(dtype="F33")),
    corrupt("header", "integers", "Integers, which loaders cast to a change of 0.", "accepted are", _entry(dtype="I8")),
    corrupt("header", "truth-values", "BOOL in place of floats.", "accepted are", _entry(dtype="BOOL")),
    corrupt("header", "double-precision", "F64, which no server computes with.", "accepted are", _entry(dtype="F64")),
    corrupt("header", "dtype-of-another-size", "F16 over the bytes of F32: half of the values.",
            "needs", _entry(dtype="F16")),
    corrupt("header", "dtype-that-is-a-list", "A dtype that is no text.", "accepted are", _entry(dtype=["F32"])),
    corrupt("header", "name-of-600-characters", "A tensor's name that fills logs.", "1 to 512", _named("a" * 600)),
    corrupt("header", "nul-in-a-name", "A name that C ends early.", "printable", _named("base_model\0.weight")),
    corrupt("header", "newline-in-a-tensor-name", "A name that forges a line of a log.",
            "printable", _named("x\nINFO all is well")),
    corrupt("header", "look-alike-tensor-name", "A Cyrillic a in a tensor's name.",
            "printable ASCII", _named("b\N{CYRILLIC SMALL LETTER A}se_model.model.x.lora_A.weight")),
    corrupt("header", "name-of-no-characters", "A tensor without a name.", "1 to 512", _named("")),
)  # fmt: skip

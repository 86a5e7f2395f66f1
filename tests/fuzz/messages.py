"""Protobuf messages that nobody would send: whatever their descriptors allow, and bytes that they do not.

A message grows out of a good one by a few changes, each of them to any value that a field can hold: so most inputs
come far into the server, and none is one that somebody thought of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from google.protobuf.descriptor import FieldDescriptor as Field
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from google.protobuf.message import Message

    Draw = Callable[[st.SearchStrategy[Any]], Any]

TEXTS = (
    *("", " ", "a", "the cat sat on the mat", "\0", "\n\r\t", "\x7f\x1b[2J", "é ü € 😀", "\u202e"),
    *("<|im_start|>", "<|im_end|>", "x<|endoftext|>", "<tool_call>", "{{ text }}", "{% raw %}"),
    *("../../etc/passwd", "/etc/passwd", "file:///etc", "%s%n", "null", "NaN", "1e400", "-1"),
    *("a" * 300, "😀" * 300, "cat " * 2000, "\u0301" * 64, "[" * 3000),
)
"""What any text may be, beside random ones."""
HINTS: Mapping[str, Sequence[str]] = {
    "adapter": (
        *("alpha", "alpha@prod", "alpha@1", "alpha@99", "alpha@sha256:", "alpha@latest", "judge"),
        *("judge@prod", "nobody", "nobody@3", "alpha@", "@prod", "ALPHA", "a/b/c", "\u0430lpha"),
    ),
    "name": (
        *("alpha", "judge", "nobody", "look", "look!", "a/b", "latest", "judge@prod", "base"),
        *("text_input", "text_output", "label", "probability", "embedding", "completion_tokens"),
    ),
    "model_name": ("alpha", "judge", "judge@prod", "alpha@1", "base", "nobody", "alpha@", "a/b/c"),
    "version": ("", "1", "2", "prod", "latest", "-1", "01", "9" * 30, "@1", "sha256:"),
    "model_version": ("", "1", "2", "prod", "latest", "-1", "01", "9" * 30, "@1", "sha256:"),
    "datatype": ("BYTES", "FP32", "INT64", "bytes", "BOOL"),
    # Of a map by texts: parameters of the Open Inference Protocol.
    "key": (
        *("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "json_schema", "regex"),
        *("use_template", "priority", "scale", "routing_key", "pooling", "normalize", "dimensions"),
        *("max_token", "n", "logprobs", "stop_token_ids", "choice", "logit_bias", "sampling"),
    ),
    "string_param": ("mean", "last", "cat", "[a-c]+", '{"type": "integer"}', "key"),
    "alias": ("prod", "canary", "latest", "3", "", "a" * 65, "sha256"),
    "role": ("user", "system", "assistant", "tool", "developer"),
    "labels": ("good", "bad", "not good", "the"),
    "continuations": (" good", " bad", " not"),
    "stop": ("cat", "\n", "<|im_end|>"),
    "functions": ("look", "now", "none"),
    "tool_call_id": ("call", "call2"),
    "arguments": ("{}", '{"at": 12}', "[]", "{", '{"a":' * 80 + "1" + "}" * 80, '{"a": "\\ud800"}'),
    "parameters": (
        *("{}", '{"type": "object", "properties": {"at": {"type": "integer"}}}', "[]", "{"),
        *('{"type": "array"}', '{"$ref": "#"}', '{"type": "object", "required": ["at"]}'),
        '{"properties": {"a": {"enum": []}}}',
    ),
    "json_schema": (
        *("{}", '{"type": "integer"}', '{"type": "object", "properties": {"a": {"$ref": "#"}}}'),
        *('{"anyOf": []}', '{"enum": []}', '{"type": "nothing"}', "{", "[]", "true", "false"),
        *('{"minLength": 99999999999999999999}', '{"pattern": "(", "type": "string"}'),
        *('{"minItems": 4000000000, "type": "array"}', '{"multipleOf": 0, "type": "number"}'),
        *('{"a":' * 500 + "1" + "}" * 500, '{"const": "\\ud800"}', '{"$ref": "http://x/y"}'),
    ),
    "regex": (
        *("[a-c]+", "(", "a{100000}", "(a*)*b", "(?=a)", "\\p{Greek}", "(?s:.)*", "[^\\x00-\\xff]"),
        *("x{0,4294967295}", "((((a{40}){40}){40}){40})", "\\1", "", "^$", "|", "(a|aa)+$"),
    ),
    "lark": (
        *('start: "a" | "b" start', "start: start", "start: nobody", "start:", '%import "/etc/x"'),
        *("start: /(/", "start: %json {", 'start: "a"{3,1}', "start: @grammar1", "start: A\nA: A"),
        *(
            'start: "' + "x" * 3000 + '"',
            "start: <|im_end|>",
            "start: a\na: b\nb: a",
            "%ignore /x/",
        ),
    ),
    "request_id": ("id", "x" * 129, "tab\t", "naïve"),
}
"""By a field's name, what it may also be: good values, and ones that look like it."""
_INTS = (
    *(0, 1, 2, 3, 5, 16, 17, 20, 21, 64, 128, 129, 159, 255, 256, 257, 1024, 65_535, 65_536, 999_999),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, -1, -10, -11, -(2**31), -(2**63)),
)  # fmt: skip
_RANGES = {
    Field.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    Field.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    Field.CPPTYPE_UINT32: (0, 2**32 - 1),
    Field.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_FLOATS = st.sampled_from(
    (
        *(0.0, -0.0, 0.5, 1.0, 2.0, 100.0, -1.0, 16.0, -16.0, 1e-30, 3e38, -3e38),
        *(2.0**-149, 2.0**-126, float("nan"), float("inf"), float("-inf")),
    )
) | st.floats(width=32)
_BYTES = (
    *(b"", b"\0", b"the cat", b"\xff\xfe", b"\xed\xa0\x80", b"x" * 3000),
    *(b"\x07\0\0\0the cat", b"\x07\0\0\0the cat" * 2, b"\0\0\0\0", b"\x08\0\0\0the cat"),
    *(b"\xff\xff\xff\xff", b"\x07\0", b"\0\0\0\0" * 300),
)
"""Texts, and tensors of texts as the Open Inference Protocol sends them raw: whole ones, and others."""
_MANY = (0, 1, 1, 1, 2, 2, 3, 9, 17, 129, 300, 1025)
"""How often something repeats."""


def scalars(field: Field) -> st.SearchStrategy[Any]:
    """Return every value of a field that holds no message."""
    kind = field.cpp_type
    if kind in _RANGES:
        low, high = _RANGES[kind]
        known = [value for value in _INTS if low <= value <= high]
        return st.sampled_from(known) | st.integers(low, high)
    if kind in (Field.CPPTYPE_FLOAT, Field.CPPTYPE_DOUBLE):
        return _FLOATS
    if kind == Field.CPPTYPE_BOOL:
        return st.booleans()
    if kind == Field.CPPTYPE_ENUM:
        assert field.enum_type is not None
        return st.sampled_from([*field.enum_type.values_by_number, 99, -1, 2**31 - 1])
    if field.type == Field.TYPE_BYTES:
        return st.sampled_from(_BYTES) | st.binary(max_size=64)
    return texts(field.name)


def texts(name: str) -> st.SearchStrategy[str]:
    """Return texts for a field of this name; Unicode as protobuf has it, without surrogates."""
    free = st.text(st.characters(codec="utf-8"), max_size=24)
    hints = HINTS.get(name)
    either = st.sampled_from(TEXTS) | free
    return either if hints is None else st.sampled_from(hints) | either


def change(draw: Draw, message: Message) -> None:
    """Change one field of a message, or of a message inside it."""
    fields = list(message.DESCRIPTOR.fields)
    if not fields:
        return
    field = draw(st.sampled_from(fields))
    here: Any = getattr(message, field.name)
    if field.message_type is None and not field.is_repeated:
        setattr(message, field.name, draw(scalars(field)))
    elif field.message_type is None:
        del here[:]
        here.extend(_values(draw, field))
    elif field.message_type.GetOptions().map_entry:
        key, value = (
            field.message_type.fields_by_name["key"],
            field.message_type.fields_by_name["value"],
        )
        first = draw(scalars(key))
        for k in range(draw(st.sampled_from(_MANY))):
            is_text = key.cpp_type == Field.CPPTYPE_STRING
            at: Any = (f"{first}{k}" if k else first) if is_text else (first + k) % 2**32
            if value.message_type is None:
                here[at] = draw(scalars(value)) if k < 3 else 1.0
            elif k < 3:
                change(draw, here[at])
            else:
                here[at].SetInParent()
    elif field.is_repeated:
        _change_several(draw, here)
    elif draw(st.sampled_from((True, True, True, False))):
        here.SetInParent()
        change(draw, here)
    else:
        message.ClearField(field.name)


def _values(draw: Draw, field: Field) -> list[Any]:
    count = draw(st.sampled_from(_MANY))
    drawn = [draw(scalars(field)) for _ in range(min(count, 3))]
    return (drawn * count)[:count] if drawn else []


def _change_several(draw: Draw, items: Any) -> None:
    """Change one of several messages, add one, repeat one, or take them all away."""
    what = draw(st.sampled_from(("change", "change", "add", "repeat", "clear")))
    if what == "clear":
        del items[:]
    elif what == "add" or not items:
        change(draw, items.add())
    elif what == "change":
        change(draw, items[draw(st.integers(0, len(items) - 1))])
    else:
        items.extend([items[0]] * draw(st.sampled_from(_MANY)))


def changed(draw: Draw, seeds: Sequence[Message]) -> Message:
    """Return one of ``seeds`` after a few changes."""
    seed: Message = draw(st.sampled_from(seeds))
    message = type(seed)()
    message.CopyFrom(seed)
    for _ in range(draw(st.sampled_from((0, 1, 1, 1, 2, 2, 3, 6)))):
        change(draw, message)
    return message


def damaged(draw: Draw, good: bytes) -> bytes:
    """Return bytes that may be no message any more: cut off, flipped, with strangers behind them, or random."""
    how = draw(st.sampled_from(("cut", "flip", "unknown", "groups", "twice", "random")))
    if how == "cut":
        return good[: draw(st.integers(0, max(0, len(good) - 1)))]
    if how == "flip" and good:
        at: int = draw(st.integers(0, len(good) - 1))
        return good[:at] + bytes([draw(st.integers(0, 255))]) + good[at + 1 :]
    if how == "unknown":
        number, wire = draw(st.integers(1, 2**29 - 1)), draw(st.integers(0, 7))
        return good + _varint(number << 3 | wire) + bytes(draw(st.binary(max_size=16)))
    if how == "groups":
        return good + b"\x0b" * int(draw(st.sampled_from((1, 99, 101, 20_000))))
    if how == "twice":
        return good + good
    return bytes(draw(st.binary(max_size=200)))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])

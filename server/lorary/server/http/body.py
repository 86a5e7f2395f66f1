"""A request's body: bytes within the limit, one JSON object, members taken by name and type."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lorary.errors import InvalidRequest
from lorary.server.validate import hint_for

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


def parse_object(raw: bytes, content_type: str) -> dict[str, Any]:
    """Return the JSON object of a body.

    Raises:
        InvalidRequest: it is not declared as JSON, is no JSON, or no object.
    """
    # A web page may send anything but this to another site without asking it first.
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise InvalidRequest(
            f"content-type is {content_type[:64]!r}; send JSON as 'application/json'.",
            field="content-type",
        )
    try:
        value = json.loads(raw, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is no valid JSON: {error}.", field="body") from error
    if not isinstance(value, dict):
        raise InvalidRequest(
            f"the body is a JSON {type(value).__name__}; send an object.", field="body"
        )
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


class Fields:
    """The members of a JSON object, each taken once; null is the same as left out.

    Args:
        members: the object.
        path: where it stands in the body, such as ``stream_options.``; empty for the body itself.
    """

    def __init__(self, members: Mapping[str, Any], path: str = "") -> None:
        self._left = {name: value for name, value in members.items() if value is not None}
        self._path = path
        self._asked: set[str] = set()

    def take(self, name: str) -> Any:
        """Return a member of any type; None where it is not there."""
        self._asked.add(name)
        return self._left.pop(name, None)

    def text(self, name: str) -> str | None:
        """Return a string that is Unicode."""
        value: str | None = self._typed(name, str, "a string")
        return None if value is None else unicode_text(self, name, value)

    def integer(self, name: str) -> int | None:
        """Return a whole number."""
        value: int | None = self._typed(name, int, "a whole number")
        return value

    def number(self, name: str) -> float | None:
        """Return a number."""
        value = self._typed(name, (int, float), "a number")
        try:
            return None if value is None else float(value)
        except OverflowError as error:
            raise self.error(name, f"{name} is too large a number.") from error

    def boolean(self, name: str) -> bool | None:
        """Return a boolean."""
        value: bool | None = self._typed(name, bool, "true or false")
        return value

    def switch(self, name: str) -> bool:
        """Return a boolean, False where it is not there."""
        return bool(self.boolean(name))

    def object(self, name: str) -> Fields | None:
        """Return an object's members."""
        value = self._typed(name, dict, "an object")
        return None if value is None else self.within(name, value)

    def required(self, name: str) -> Fields:
        """Return the members of an object that must be there."""
        found = self.object(name)
        if found is None:
            raise self.error(name, f"{name} is missing; it must be an object.")
        return found

    def within(self, name: str, members: Mapping[str, Any]) -> Fields:
        """Return the members of an object that was found at ``name``."""
        return Fields(members, f"{self._path}{name}.")

    def mapping(self, name: str) -> dict[str, Any] | None:
        """Return an object as it is, whose names are the caller's own."""
        value: dict[str, Any] | None = self._typed(name, dict, "an object")
        return value

    def list(self, name: str, kind: type, words: str) -> list[Any] | None:
        """Return a list whose items are all of one type; ``words`` name it in errors."""
        value = self._typed(name, list, f"a list of {words}")
        for i, item in enumerate(value or ()):
            if not _is(item, kind):
                raise self.error(
                    f"{name}[{i}]", f"{name}[{i}] is {_shown(item)}; it must be one of {words}."
                )
        items: list[Any] | None = value
        return items

    def error(self, name: str, message: str) -> InvalidRequest:
        """Return the error for a member."""
        return InvalidRequest(message, field=f"{self._path}{name}")

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """Refuse members that would change the answer and cannot be served, each with its reason."""
        for name, why in reasons.items():
            value = self.take(name)
            if value not in (None, [], {}, False, ""):
                raise self.error(name, f"{name} is not supported: {why}")

    def finish(self, ignored: Collection[str] = ()) -> None:
        """Refuse what nobody took and ``ignored`` does not name.

        A misspelt option that is dropped in silence changes every answer and no test.
        """
        for name in self._left:
            if name in ignored:
                continue
            hint = hint_for(name, self._asked)
            raise self.error(name[:64], f"'{name[:64]}' is no known member of the body{hint}")

    def _typed(self, name: str, kind: Any, words: str) -> Any:
        value = self.take(name)
        if value is None or _is(value, kind):
            return value
        raise self.error(name, f"{name} is {_shown(value)}; it must be {words}.")


def unicode_text(fields: Fields, name: str, text: str) -> str:
    """Refuse half a surrogate pair, which JSON can write and no text holds."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise fields.error(name, f"{name} is not valid Unicode text: {error.reason}.") from error
    return text


def json_text(fields: Fields, name: str, value: Any) -> str:
    """Return a JSON value as text.

    Raises:
        InvalidRequest: it can be read and not be written: its parts stand too deep in each other.
    """
    try:
        return json.dumps(value)
    except RecursionError as error:
        raise fields.error(name, f"{name} is nested too deep. Make it flatter.") from error


def _is(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of a type; true is no number."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return json.dumps(value)[:64]

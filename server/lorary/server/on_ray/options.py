"""A server's options as Ray Serve passes them: a mapping from YAML, or texts from its command line."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorary.errors import ConfigError
from lorary.server.config import ServerConfig, parse_size

if TYPE_CHECKING:
    from collections.abc import Mapping

# Serve has the doors and ends the process; and a folder has one owner, where replicas are many.
NOT_HERE = frozenset(
    {
        *("port", "http_port", "http_host", "tls_cert", "tls_key", "tls_client_ca", "reflection"),
        *("ready_file", "drain_delay", "state_dir", "warm_before_ready"),
    }
)
# Replicas of one machine must not claim the same port, or the same cores.
DEFAULTS: dict[str, Any] = {"metrics_port": 0, "pin_threads": False}
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def read_config(options: Mapping[str, Any]) -> ServerConfig:
    """Return the configuration of each replica; keys are those of ``lorary serve``, with ``_`` or ``-``.

    Raises:
        ConfigError: a key is unknown, has no meaning here, or its value is no good.
    """
    hints = typing.get_type_hints(ServerConfig)
    fields = {field.name: field for field in dataclasses.fields(ServerConfig)}
    values = dict(DEFAULTS)
    for given, value in options.items():
        name = given.replace("-", "_")
        if name not in fields:
            known = ", ".join(sorted(fields.keys() - NOT_HERE))
            raise ConfigError(f"'{given}' is no option of a replica; it is one of {known}.")
        if name in NOT_HERE:
            raise ConfigError(
                f"'{given}' has no meaning on Ray, where Serve has the door and the processes; leave it "
                "out (docs/scaling.md)."
            )
        values[name] = _value(given, value, hints[name], is_size=fields[name].metadata["is_size"])
    if "base" not in values:
        raise ConfigError("there is no base; name one: base=smollm2-135m.")
    return ServerConfig(**values)


def _value(name: str, value: Any, hint: Any, *, is_size: bool) -> Any:
    """Return a value as its field wants it; texts are read, and what is of another kind is left."""
    if not isinstance(value, str):
        return value
    kinds = set(typing.get_args(hint)) or {hint}
    try:
        if is_size:
            return parse_size(value)
        if Path in kinds:
            return Path(value)
        if bool in kinds:
            return _bool(value)
        if int in kinds:
            return int(value)
        if float in kinds:
            return float(value)
    except ValueError as error:
        raise ConfigError(f"'{name}' is '{value}', which cannot be read: {error}.") from error
    return value


def _bool(text: str) -> bool:
    if text.lower() not in _TRUE + _FALSE:
        raise ValueError("it is true or false")
    return text.lower() in _TRUE

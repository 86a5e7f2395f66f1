"""The configuration: ranges, refusals, and that flags, fields and docs are one thing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from lorary.errors import ConfigError
from lorary.registry.address import DEFAULT_REGISTRY
from lorary.server.config import ServerConfig, flag, format_size, options_table, parse_size


def config(**options: Any) -> ServerConfig:
    return ServerConfig(**{"base": "tiny", "registry": "r", **options})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"base": ""}, "--base is empty"),
        ({"registry": ""}, "--registry is empty"),
        ({"port": -1}, "--port is -1"),
        ({"port": 65536}, "--port"),
        ({"port": 9400}, "both 9400"),
        ({"max_batch": 0}, "--max-batch is 0; it must be between 1 and 4096"),
        ({"adapter_memory": 1}, "between 1MiB and"),
        ({"drain_timeout": float("nan")}, "--drain-timeout"),
        ({"quantize": "nf4", "quantize_plan": Path("p")}, "the plan has a default of its own"),
        ({"quantize": "fp2"}, "one of auto, none, int8, nf4"),
        ({"host": "0.0.0.0"}, "--insecure-bind"),
        ({"host": "example.org"}, "no TLS .* and no --access"),
        ({"ready_file": Path("/no/such/folder/ready")}, "create it first"),
    ],
)
def test_impossible_values_are_refused_by_flag(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        config(**options)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_hosts_need_no_permission_and_have_reflection(host: str) -> None:
    assert config(host=host).has_reflection


def test_other_hosts_have_no_reflection_unless_asked() -> None:
    assert not config(host="0.0.0.0", insecure_bind=True).has_reflection
    assert config(host="0.0.0.0", insecure_bind=True, reflection=True).has_reflection


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("2GiB", 2**31), ("512 MiB", 2**29), ("1.5GB", 1_500_000_000), ("4096", 4096), ("1kib", 1024)],
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes
    assert parse_size(format_size(num_bytes)) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "2TiB2", "-1", "two"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_size(text)


def test_server_and_registry_command_have_one_default() -> None:
    assert config().registry == "r"
    assert ServerConfig(base="tiny").registry == DEFAULT_REGISTRY


def test_every_field_is_in_the_table() -> None:
    table = options_table()
    assert all(f"`{flag(field.name)}`" in table for field in dataclasses.fields(ServerConfig))

"""Prometheus' configuration and alerts, checked by promtool."""

from __future__ import annotations

from typing import Any

from tests.deploy.files import (
    PROMETHEUS_CONFIG,
    RULES,
    RULES_TEST,
    read_yaml,
    run,
    tool,
)


def alerts() -> list[dict[str, Any]]:
    return [
        rule for group in read_yaml(RULES)["groups"] for rule in group["rules"] if "alert" in rule
    ]


def test_config_and_rules_are_valid() -> None:
    run(tool("promtool"), "check", "config", PROMETHEUS_CONFIG)
    run(tool("promtool"), "check", "rules", "--lint-fatal", RULES)


def test_alerts_fire_when_they_should() -> None:
    run(tool("promtool"), "test", "rules", RULES_TEST)


def test_every_alert_has_a_unit_test() -> None:
    tested = RULES_TEST.read_text()
    assert not [rule["alert"] for rule in alerts() if rule["alert"] not in tested]


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    for rule in alerts():
        assert rule["labels"]["severity"] in {"critical", "warning"}, rule["alert"]
        assert rule["annotations"].keys() == {"summary", "action"}, rule["alert"]

"""A real server scraped by a real Prometheus: everything the dashboard and the alerts read exists."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from lorary.client import Client
from lorary.errors import AdapterNotFound
from lorary.registry import BaseCard, Registry
from tests.deploy.files import (
    PROMETHEUS_CONFIG,
    RULES,
    SYNTHETIC,
    panel_expressions,
    read_yaml,
    rule_expressions,
    selectors,
    tool,
)
from tests.processes import running, serving, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NUM_SCRAPES = 5


@dataclass(frozen=True, slots=True)
class Live:
    """A server under calls, and the Prometheus that watches it."""

    prometheus: str
    exposition: str

    def ask(self, path: str, **parameters: str) -> Any:
        """Return what Prometheus' HTTP API answers."""
        query = urllib.parse.urlencode(parameters)
        answer = json.loads(fetch(f"{self.prometheus}/api/v1/{path}?{query}"))
        assert answer["status"] == "success", answer
        return answer["data"]


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as answer:
        body: bytes = answer.read()
    return body.decode()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def call(client: Client, once: threading.Event, stop: threading.Event) -> None:
    """Call with every adapter and none until told to stop; load and unload one of them.

    ``once`` is set when each of them was called, and that one was loaded a second time.
    """
    is_again = False
    while not stop.is_set():
        for adapter in ("alpha", "bravo", ""):
            client.generate(prompt="the cat sat on", adapter=adapter, max_tokens=8, ignore_eos=True)
            if is_again:
                once.set()
        client.unload_adapter("alpha")
        is_again = True


def prometheus_answers(url: str) -> bool:
    try:
        return "Ready" in fetch(f"{url}/-/ready")
    except OSError:
        return False


def num_scrapes(live: Live) -> float:
    result = live.ask("query", query='sum(count_over_time(lorary_engine_up{job="lorary"}[1h]))')
    return float(result["result"][0]["value"][1]) if result["result"] else 0.0


@pytest.fixture(scope="module")
def live(
    tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("live")
    registry = Registry.open(root / "registry", create=True)
    card = BaseCard.from_folder(tiny_base)
    for name in ("alpha", "bravo"):
        registry.push(tiny_adapters[name], name, base=card)
    with serving(tiny_base, root / "registry", root) as server:
        config = read_yaml(PROMETHEUS_CONFIG)
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(RULES)]
        target = server.metrics_url.split("/")[2]
        config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
        (root / "prometheus.yml").write_text(yaml.safe_dump(config))
        port = free_port()
        watch = [tool("prometheus"), f"--config.file={root / 'prometheus.yml'}"]
        watch += [f"--storage.tsdb.path={root / 'tsdb'}", f"--web.listen-address=127.0.0.1:{port}"]
        url = f"http://127.0.0.1:{port}"
        with running(watch, root / "prometheus.log") as prometheus:
            wait_for(
                "Prometheus",
                lambda: prometheus_answers(url),
                prometheus,
                root / "prometheus.log",
            )
            once, stop = threading.Event(), threading.Event()
            with Client(server.address) as client:
                client.wait_until_ready(30)
                with pytest.raises(AdapterNotFound):
                    client.generate(prompt="the cat", adapter="nobody")
                caller = threading.Thread(target=call, args=(client, once, stop))
                caller.start()
                try:
                    early = Live(url, "")
                    wait_for(
                        "scrapes",
                        lambda: once.is_set() and num_scrapes(early) >= NUM_SCRAPES,
                        prometheus,
                        root / "prometheus.log",
                    )
                    yield Live(url, fetch(server.metrics_url))
                finally:
                    stop.set()
                    caller.join(30)


def test_every_panel_shows_something(live: Live) -> None:
    def empty() -> list[str]:
        found = []
        for title, expression in panel_expressions(rate_interval="10s"):
            result = live.ask("query", query=expression)["result"]
            values = [float(series["value"][1]) for series in result]
            if not [value for value in values if value == value]:
                found.append(f"{title}: {expression}")
        return found

    # Where the machine stood still the last ten seconds may hold no two scrapes: a while later they do.
    until = time.monotonic() + 60
    while left := empty():
        assert time.monotonic() < until, left
        time.sleep(1)


def test_every_series_and_label_value_of_panels_and_rules_is_exposed(live: Live) -> None:
    """Also those that no scrape holds while all is well: a label value misspelt never fires."""
    exposed: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(live.exposition):
        for sample in family.samples:
            exposed.setdefault(sample.name, []).append(sample.labels)
    recorded = {name for name, _ in rule_expressions()} | SYNTHETIC
    # Status codes appear when a call ends so; they are gRPC's names. So do causes of eviction.
    from_elsewhere = {"job", "instance", "code", "cause"}
    for title, expression in [*panel_expressions(), *rule_expressions()]:
        for name, labels in selectors(expression):
            if name in recorded:
                continue
            assert name in exposed, f"{title} reads {name}, which the server does not expose"
            wanted = {k: v for k, v in labels.items() if k not in from_elsewhere}
            assert any(
                all(re.fullmatch(v, series.get(k, "")) for k, v in wanted.items())
                for series in exposed[name]
            ), f"{title} reads {name} with {wanted}"
            assert not (labels.keys() - {"job", "instance"}) - {
                label for series in exposed[name] for label in series
            }


def test_rules_evaluate_and_a_healthy_server_alerts_nobody(live: Live) -> None:
    rules = [rule for group in live.ask("rules")["groups"] for rule in group["rules"]]
    assert len(rules) == len(rule_expressions())
    assert not [(rule["name"], rule["lastError"]) for rule in rules if rule["health"] == "err"]
    # A scrape that a busy machine missed is soon forgotten; what a rule has wrong stays.
    until = time.monotonic() + 30
    while alerts := live.ask("alerts")["alerts"]:
        assert time.monotonic() < until, alerts
        time.sleep(1)


def test_exposition_follows_prometheus_conventions(live: Live) -> None:
    done = subprocess.run(
        [tool("promtool"), "check", "metrics"],
        input=live.exposition,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr

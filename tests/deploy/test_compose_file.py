"""The compose file, checked by Compose itself, which needs no engine for that."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.deploy.files import DEPLOY, read_yaml, run, tool

COMPOSE = DEPLOY / "compose/compose.yaml"
CUDA = DEPLOY / "compose/compose.cuda.yaml"


def resolved(*extra: str) -> dict[str, Any]:
    command = [tool("docker-compose"), "-f", str(COMPOSE), *extra, "config", "--format", "json"]
    services = json.loads(run(*command, LORARY_REGISTRY="/srv/registry").stdout)["services"]
    assert isinstance(services, dict)
    return services


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return resolved()


def test_ports_are_published_on_loopback_only(services: dict[str, Any]) -> None:
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert {port["host_ip"] for port in published} == {"127.0.0.1"}
    assert {port["target"] for port in published} == {50051, 9400, 9090, 3000}


def test_containers_can_do_no_more_than_they_must(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_mounted_files_exist(services: dict[str, Any]) -> None:
    mounted = [
        volume["source"]
        for service in services.values()
        for volume in service.get("volumes", [])
        if volume["type"] == "bind" and volume["source"] != "/srv/registry"
    ]
    assert len(mounted) == 3
    for source in mounted:
        assert (DEPLOY / source).is_dir(), source


def test_server_gets_time_to_drain(services: dict[str, Any]) -> None:
    from lorary.server.config import ServerConfig

    server = services["server"]
    grace_s = int(server["stop_grace_period"].removesuffix("s"))
    config = ServerConfig(base="b", registry="r")
    assert grace_s > config.drain_delay + config.drain_timeout + 5


def test_server_is_told_what_it_understands(services: dict[str, Any]) -> None:
    """The flags of the compose file and of both images are flags of ``lorary serve``."""
    from typer.testing import CliRunner

    from lorary.server.cli import app

    commands = [services["server"]["command"]]
    for path in sorted((DEPLOY / "docker").glob("Dockerfile.c*[!e]")):
        (line,) = [line for line in path.read_text().splitlines() if line.startswith("CMD [")]
        commands.append(json.loads(line.removeprefix("CMD ")))
    for command in commands:
        assert command[0] == "serve"
        # The last flag stops before anything is built: that value is refused by the configuration.
        result = CliRunner().invoke(app, [*command[1:], "--max-batch", "0"])
        assert result.exit_code == 2, result.output
        assert "--max-batch" in result.output


def test_cuda_file_swaps_the_image_and_asks_for_gpus() -> None:
    services = resolved("-f", str(CUDA))
    for name in ("assets", "server"):
        assert services[name]["image"] == "lorary:cuda"
        assert services[name]["build"]["dockerfile"] == "deploy/docker/Dockerfile.cuda"
    (device,) = services["server"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"


def test_traces_go_to_the_profiles_collector_when_asked_for(services: dict[str, Any]) -> None:
    assert services["server"]["environment"] == {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}
    assert "jaeger" not in services
    with_traces = resolved("--profile", "traces")
    (page,) = with_traces["jaeger"]["ports"]
    assert (page["host_ip"], page["target"]) == ("127.0.0.1", 16686)
    for name in ("read_only", "cap_drop", "security_opt"):
        assert with_traces["jaeger"][name] == services["server"][name]


def test_grafana_finds_its_source_and_dashboard(services: dict[str, Any]) -> None:
    provisioning = DEPLOY / "compose/grafana/provisioning"
    (source,) = read_yaml(provisioning / "datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = read_yaml(provisioning / "dashboards/lorary.yaml")["providers"]
    targets = [volume["target"] for volume in services["grafana"]["volumes"]]
    assert provider["options"]["path"] in targets


def test_prometheus_scrapes_the_server(services: dict[str, Any]) -> None:
    (scrape,) = read_yaml(DEPLOY / "prometheus/prometheus.yml")["scrape_configs"]
    (static,) = scrape["static_configs"]
    host, _, port = static["targets"][0].partition(":")
    assert host in services
    assert int(port) in [published["target"] for published in services[host]["ports"]]

"""The files of deploy/ray, without Ray: they name what exists, and say the same."""

from __future__ import annotations

import importlib
from typing import Any

import kubernetes_validate
import pytest
import yaml

from lorary.server.on_ray.options import read_config
from tests.deploy.files import RAY_SERVE, RAY_SERVICE, read_yaml


def test_the_operator_is_told_the_same_as_serve() -> None:
    service = read_yaml(RAY_SERVICE)
    assert yaml.safe_load(service["spec"]["serveConfigV2"]) == read_yaml(RAY_SERVE)


def test_what_the_proxies_import_exists() -> None:
    for path in read_yaml(RAY_SERVE)["grpc_options"]["grpc_servicer_functions"]:
        module, _, name = path.rpartition(".")
        assert callable(getattr(importlib.import_module(module), name))
    (application,) = read_yaml(RAY_SERVE)["applications"]
    (deployment,) = application["deployments"]
    module, _, name = deployment["autoscaling_config"]["policy"]["policy_function"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_its_options_are_a_servers() -> None:
    (application,) = read_yaml(RAY_SERVE)["applications"]
    options = dict(application["args"])
    announced = options.pop("adapters_per_replica")
    config = read_config(options)
    (deployment,) = application["deployments"]
    scaling = deployment["autoscaling_config"]
    assert announced > 0
    assert scaling["target_ongoing_requests"] <= config.max_batch


@pytest.mark.parametrize("version", ["1.27", "1.33", "1.37"])
def test_kubernetes_knows_every_field_of_its_pods(version: str) -> None:
    """The operator's own kind has no schema here; what it makes pods of has."""
    cluster = read_yaml(RAY_SERVICE)["spec"]["rayClusterConfig"]
    groups: list[dict[str, Any]] = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **group["template"]}
        kubernetes_validate.validate(pod, version, strict=True)

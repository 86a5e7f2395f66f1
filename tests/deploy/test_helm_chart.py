"""The Helm chart, rendered by Helm itself and held against Kubernetes' own schemas."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer.main
import yaml

from lorary.server.cli import app
from tests.deploy.files import RULES, read_yaml

SAFE: dict[str, Any] = {
    "registryVolume": {"existingClaim": "adapters"},
    "tls": {"existingSecret": "lorary-tls", "name": "lorary.prod.svc"},
    "access": {"existingSecret": "lorary-tenants"},
}
CASES: dict[str, dict[str, Any]] = {
    "trusted": {"insecureBind": True, "registry": "hf://acme"},
    "safe": SAFE,
    "everything": {
        **SAFE,
        "tls": {**SAFE["tls"], "clientCertificates": True},
        "replicas": 3,
        "options": {"max-batch": 64, "quantize": "nf4", "prefix-cache": False},
        "hub": {"existingSecret": "hub"},
        "http": {"enabled": True, "port": 8080},
        "metrics": {"podMonitor": {"enabled": True}, "rules": {"enabled": True}},
        "autoscaling": {"enabled": True, "maxReplicas": 8},
        "resources": {"limits": {"nvidia.com/gpu": 1, "memory": "32Gi"}},
        "cache": {"existingClaim": "cache"},
        "imagePullSecrets": [{"name": "pull"}],
        "nodeSelector": {"gpu": "h200"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "priorityClassName": "high",
        "podAnnotations": {"a": "b"},
        "podLabels": {"team": "nlp"},
        "extraEnv": [{"name": "HF_ENDPOINT", "value": "http://hub.prod.svc:8080"}],
        "networkPolicy": {"callers": [{"namespaceSelector": {}}], "egressPorts": []},
        "tracing": {"endpoint": "http://collector.observability.svc:4317", "share": 0.05},
    },
    "bare": {**SAFE, "serviceAccount": {"create": False}, "networkPolicy": {"enabled": False},
             "podDisruptionBudget": {"enabled": False}, "spreadOverNodes": False},
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "open": ({"registry": "hf://acme"}, "insecureBind=true"),
    "half open": ({**SAFE, "access": {}}, "insecureBind=true"),
    "no registry": ({"insecureBind": True}, "existingClaim"),
    "no name": ({**SAFE, "tls": {"existingSecret": "t"}}, "tls.name"),
    "misspelt": ({**SAFE, "replica": 2}, "replica"),
    "its own flag": ({**SAFE, "options": {"insecure-bind": True}}, "insecure-bind"),
    "a moving tag": ({**SAFE, "image": {"repository": "lorary", "tag": "latest"}}, "tag"),
}
CUSTOM = {"PodMonitor", "PrometheusRule", "ScaledObject"}
VERSIONS = ("1.27", "1.33", "1.37")


@pytest.fixture(scope="module")
def rendered() -> dict[str, Any]:
    cases = {**CASES, **{name: values for name, (values, _) in REFUSED.items()}}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("render_chart.py"))],
        input=json.dumps(cases), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def objects(rendered: dict[str, Any], case: str) -> dict[str, dict[str, Any]]:
    """Every object of a case, by kind."""
    files = rendered[case]
    assert isinstance(files, dict), files
    loaded = [yaml.safe_load(text) for name, text in files.items() if name.endswith(".yaml")]
    return {one["kind"]: one for one in loaded if one is not None}


def container(rendered: dict[str, Any], case: str) -> dict[str, Any]:
    found: dict[str, Any] = objects(rendered, case)["Deployment"]["spec"]["template"]["spec"]
    return dict(found["containers"][0])


def test_helm_finds_nothing_to_mend(rendered: dict[str, Any]) -> None:
    assert not rendered["lint"]["errors"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_knows_every_field(rendered: dict[str, Any], case: str, version: str) -> None:
    for kind, one in objects(rendered, case).items():
        if kind not in CUSTOM:
            kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_open_or_wrong_does_not_render(rendered: dict[str, Any], case: str) -> None:
    assert isinstance(rendered[case], str), "it was rendered"
    assert REFUSED[case][1] in rendered[case]


@pytest.mark.parametrize("case", CASES)
def test_the_server_understands_its_arguments(rendered: dict[str, Any], case: str) -> None:
    first, *arguments = container(rendered, case)["args"]
    assert first == "serve"
    read = typer.main.get_command(app).make_context("serve", arguments).params
    assert read["host"] == "0.0.0.0"
    assert read["insecure_bind"] == (case == "trusted")
    assert (read["tls_cert"] is None) == (read["access"] is None) == (case == "trusted")
    if case == "everything":
        assert (read["max_batch"], read["quantize"], read["prefix_cache"]) == (64, "nf4", False)
        assert str(read["tls_client_ca"]) == "/etc/lorary/tls/ca.crt"
        assert read["http_port"] == 8080
        assert read["trace_share"] == 0.05
    is_traced = read["otlp_endpoint"] == "http://collector.observability.svc:4317"
    assert is_traced == (case == "everything")


def test_a_pod_has_time_to_drain_and_no_rights(rendered: dict[str, Any]) -> None:
    for case in CASES:
        pod = objects(rendered, case)["Deployment"]["spec"]["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] > 70
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["automountServiceAccountToken"] is False
        allowed = container(rendered, case)["securityContext"]
        assert allowed["readOnlyRootFilesystem"]
        assert allowed["capabilities"] == {"drop": ["ALL"]}
        mounts = {m["name"] for m in container(rendered, case)["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_probes_ask_the_way_the_server_answers(rendered: dict[str, Any]) -> None:
    plain, tls = container(rendered, "trusted"), container(rendered, "everything")
    assert plain["readinessProbe"]["grpc"]["service"] == "lorary.v1.Inference"
    assert plain["livenessProbe"]["grpc"]["service"] == ""
    assert tls["readinessProbe"]["exec"]["command"][1].endswith("healthcheck.py")
    env = {one["name"]: one.get("value") for one in tls["env"]}
    assert env["LORARY_TLS_NAME"] == "lorary.prod.svc"
    assert {"LORARY_CA", "LORARY_CERT", "LORARY_KEY", "HF_ENDPOINT"} <= env.keys()


def test_traces_may_leave_where_pods_may_reach_little(rendered: dict[str, Any]) -> None:
    def ports(case: str) -> list[int]:
        egress = objects(rendered, case)["NetworkPolicy"]["spec"]["egress"]
        return sorted({port["port"] for one in egress for port in one["ports"]})

    assert ports("everything") == [53, 4317]
    assert ports("safe") == [53, 443]


def test_alerts_and_scaling_read_what_is_scraped(rendered: dict[str, Any]) -> None:
    found = objects(rendered, "everything")
    assert found["PrometheusRule"]["spec"] == read_yaml(RULES)
    assert found["PodMonitor"]["spec"]["jobLabel"] == "app.kubernetes.io/name"
    assert found["Deployment"]["metadata"]["labels"]["app.kubernetes.io/name"] == "lorary"
    assert "replicas" not in found["Deployment"]["spec"]
    (trigger,) = found["ScaledObject"]["spec"]["triggers"]
    assert 'lorary_requests_waiting{namespace="prod"' in trigger["metadata"]["query"]
    assert found["ScaledObject"]["spec"]["scaleTargetRef"]["name"] == "demo-lorary"

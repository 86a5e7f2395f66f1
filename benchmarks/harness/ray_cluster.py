"""Ray Serve with Lorary's replicas on this machine alone: a process that runs it, and that process.

``RayProcess`` starts ``python -m benchmarks.harness.ray_cluster JSON``, which runs deploy/ray/serve.yaml with
other arguments, says ``ready`` on standard output, and obeys lines of standard input: ``kill TAG`` kills a
replica. It ends at the end of its input.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self, cast

import yaml

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "deploy/ray/serve.yaml"
APPLICATION = "lorary"
OBJECT_STORE_BYTES = 80 * 2**20
STOP_TIMEOUT_S = 45.0


class RayProcess:
    """Runs from ``with`` to its end.

    Args:
        args: of the application, instead of those in deploy/ray/serve.yaml or beside them.
        port: for gRPC.
        http_port: Serve opens one for HTTP as well.
        log: file for what it says.
        replicas: how many.
        cores: Ray's CPUs for each; also the threads of its maths.

    Raises:
        RuntimeError: it ended before it was ready; with the end of its log.
    """

    def __init__(
        self,
        args: Mapping[str, Any],
        *,
        port: int,
        http_port: int,
        log: Path,
        replicas: int = 2,
        cores: float = 0.5,
    ) -> None:
        self._stack = ExitStack()
        # Ray's sockets lie in this folder, and their paths must be short.
        temp = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="lr"))
        given = {"args": dict(args), "port": port, "http_port": http_port, "temp": temp}
        given |= {"replicas": replicas, "cores": cores}
        self._log = log
        file = self._stack.enter_context(log.open("wb"))
        paths = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.harness.ray_cluster", json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": paths, "RAY_USAGE_STATS_ENABLED": "0"},
            start_new_session=True,
        )
        self._input = cast("IO[bytes]", self._process.stdin)
        self._output = cast("IO[bytes]", self._process.stdout)
        if self._output.readline() != b"ready\n":
            self.stop()
            raise RuntimeError(f"no cluster; its log:\n{log.read_text()[-4000:]}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def kill(self, tag: str) -> None:
        """Kill a replica as a fault would: at once, whatever it does."""
        self._input.write(f"kill {tag}\n".encode())
        self._input.flush()
        if self._output.readline() != b"killed\n":
            raise RuntimeError(f"replica '{tag}' was not killed")

    def stop(self) -> int | None:
        """End everything; return the exit status, None where it had to be killed."""
        self._input.close()
        status: int | None = None
        try:
            status = self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._output.close()
        self._stack.close()
        return status


def main(given: dict[str, Any]) -> None:
    """Run a cluster until standard input ends."""
    import ray
    from ray import serve
    from ray.serve.config import gRPCOptions
    from ray.serve.schema import ServeDeploySchema

    from lorary.server.on_ray.application import DEPLOYMENT, build

    schema = ServeDeploySchema.model_validate(yaml.safe_load(CONFIG.read_text()))
    (application,) = schema.applications
    (deployment,) = application.deployments
    wanted = given["replicas"]
    scaling = {**deployment.autoscaling_config, "min_replicas": wanted, "max_replicas": wanted}
    ray.init(
        num_cpus=max(1, round(wanted * given["cores"])),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,  # standard output is what the other side reads
        _temp_dir=given["temp"],
    )
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": "127.0.0.1", "port": given["http_port"]},
        grpc_options=gRPCOptions(
            port=given["port"],
            grpc_servicer_functions=schema.grpc_options.grpc_servicer_functions,
        ),
    )
    told = {"autoscaling_config": scaling, "ray_actor_options": {"num_cpus": given["cores"]}}
    app = build({**application.args, **given["args"], "deployment": told})
    serve.run(app, name=APPLICATION, route_prefix=application.route_prefix)
    _say("ready")
    for line in sys.stdin:
        tag = line.removeprefix("kill ").strip()
        name = f"SERVE_REPLICA::{APPLICATION}#{DEPLOYMENT}#{tag}"
        ray.kill(ray.get_actor(name, namespace="serve"), no_restart=True)
        _say("killed")
    serve.shutdown()
    ray.shutdown()


def _say(word: str) -> None:
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

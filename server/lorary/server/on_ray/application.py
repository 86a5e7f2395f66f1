"""The application that Ray Serve runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray import serve

from lorary.errors import ConfigError
from lorary.server.on_ray.options import read_config
from lorary.server.on_ray.replica import Replica

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ray.serve import Application

DEPLOYMENT = "Lorary"
SERVICERS = (
    "lorary.server.on_ray.ingress.add_inference",
    "lorary.server.on_ray.ingress.add_health",
)
"""For Serve's ``grpc_servicer_functions``."""
NUM_ANNOUNCED = 256
FULL_FACTOR = 2


def build(args: Mapping[str, Any]) -> Application:
    """Return the application; Serve's ``import_path`` is ``lorary.server.on_ray.application:build``.

    Args:
        args: options of ``lorary serve`` for every replica, and

            - ``adapters_per_replica`` (256): how many adapters Serve remembers to be on a replica, which
              should be about as many as fit there;
            - ``deployment``: what ``serve.deployment`` takes, such as ``num_replicas``.

    Raises:
        ConfigError: an option is unknown, has no meaning here, or its value is no good.

    Example::

        serve.run(build({"base": "smollm2-135m", "deployment": {"num_replicas": 2}}))
    """
    options = dict(args)
    deployment = options.pop("deployment", {})
    announced = int(options.pop("adapters_per_replica", NUM_ANNOUNCED))
    if announced < 1:
        raise ConfigError(f"adapters_per_replica is {announced}; it is at least 1.")
    config = read_config(options)
    given: dict[str, Any] = {
        "name": DEPLOYMENT,
        # Full for the router a little before the replica itself refuses: a hot adapter spills over to
        # other replicas (bounded load), and only then waits before them.
        "max_ongoing_requests": FULL_FACTOR * config.max_batch,
        "max_queued_requests": config.max_waiting,
        "graceful_shutdown_timeout_s": config.drain_timeout,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": 5.0,
        **deployment,
    }
    return serve.deployment(**given)(Replica).bind(config, announced)

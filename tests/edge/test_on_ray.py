"""What replicas and proxies on Ray agree on, without Ray: refusals, options, ids, and how many there should be."""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2

from lorary.errors import ConfigError, InvalidRequest, Overloaded, Unavailable
from lorary.server import status
from lorary.server.on_ray.announcer import Announcer
from lorary.server.on_ray.autoscaling import by_waiting
from lorary.server.on_ray.ingress import serves_own
from lorary.server.on_ray.options import read_config
from lorary.server.on_ray.refusal import Refusal

SERVE_CUTS_AT = 4096


def test_a_refusal_survives_as_it_was() -> None:
    error = InvalidRequest("temperature is -1; it is 0 to 100.", field="sampling.temperature")
    sent = Refusal(status.to_status(error), (("lorary-request-id", "mine"),))
    assert Refusal.unpack(sent.pack()) == sent
    assert Refusal.unpack("The actor died unexpectedly before finishing this task.") is None


def test_the_longest_refusal_is_not_cut() -> None:
    letters = random.Random(0)
    text = "".join(chr(letters.randrange(0x20000, 0x2A000)) for _ in range(5000))
    found = status.to_status(InvalidRequest(text, field="input.text"))
    assert 0.9 < 12 * len(found.message) / status.MAX_WIRE_BYTES <= 1.01
    facts = (("lorary-request-id", "x" * 128), ("lorary-replica", "y" * 40))
    assert len(Refusal(found, facts).pack()) < SERVE_CUTS_AT


def test_errors_of_serve_become_ours_and_say_nothing_of_its_inside() -> None:
    assert isinstance(serves_own(grpc.StatusCode.RESOURCE_EXHAUSTED), Overloaded)
    gone = serves_own(grpc.StatusCode.INTERNAL)
    assert isinstance(gone, Unavailable)
    assert gone.retry_after_s
    found: status_pb2.Status = status.to_status(gone)
    assert found.code == grpc.StatusCode.UNAVAILABLE.value[0]


class Multiplexing:
    """Ray Serve's list of ids, as ``ray.serve.multiplex`` keeps it."""

    def __init__(self, limit: int) -> None:
        self.ids: OrderedDict[str, None] = OrderedDict()
        self.forgotten: list[str] = []
        self._limit = limit

    async def __call__(self, name: str) -> str:
        await asyncio.sleep(0)
        if name not in self.ids and len(self.ids) >= self._limit:
            self.forgotten.append(self.ids.popitem(last=False)[0])
        self.ids[name] = None
        self.ids.move_to_end(name)
        return name


async def told(announcer: Announcer) -> None:
    """Wait until Serve knows whoever has entered."""
    for _ in range(1000):
        if not announcer._tasks:
            return
        await asyncio.sleep(0)
    pytest.fail("Serve is never told")


async def test_what_is_in_use_is_not_what_serve_forgets() -> None:
    serve = Multiplexing(3)
    announcer = Announcer(serve, 3)
    announcer.enter("long")  # a stream that goes on and on
    for number in range(10):
        announcer.enter(f"short-{number}")
        await told(announcer)
        announcer.leave(f"short-{number}")
    assert "long" in serve.ids
    assert serve.forgotten == [f"short-{number}" for number in range(8)]
    announcer.leave("long")
    for number in range(3):
        announcer.enter(f"later-{number}")
        await told(announcer)
    assert "long" not in serve.ids


async def test_with_all_of_them_in_use_the_new_one_is_known_all_the_same() -> None:
    serve = Multiplexing(2)
    announcer = Announcer(serve, 2)
    for name in ("a", "b", "c"):
        announcer.enter(name)
        await told(announcer)
    assert list(serve.ids)[-1] == "c"


def test_options_are_read_from_texts_and_from_yaml() -> None:
    told = read_config(
        {"base": "tiny", "adapter-memory": "2GiB", "max_batch": "8", "prefix_cache": "false"}
    )
    assert (told.adapter_memory, told.max_batch, told.prefix_cache) == (2 * 2**30, 8, False)
    # Replicas of one machine: neither the same port nor the same cores.
    assert (told.metrics_port, told.pin_threads) == (0, False)
    assert read_config({"base": "tiny", "max_batch": 8, "pin_threads": True}).pin_threads


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"base": "tiny", "max_bach": 8}, "'max_bach' is no option"),
        ({"base": "tiny", "port": 50051}, "'port' has no meaning on Ray"),
        ({"base": "tiny", "state-dir": "/tmp"}, "'state-dir' has no meaning on Ray"),
        ({"base": "tiny", "max_batch": "many"}, "'max_batch' is 'many'"),
        ({"base": "tiny", "prefix_cache": "perhaps"}, "it is true or false"),
        ({"max_batch": 8}, "there is no base"),
        ({"base": "tiny", "max_batch": 0}, "max-batch"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_config(options)


def scaling(
    reported: dict[str, dict[str, float]], *, at_router: float = 0, calls: float = 0
) -> Any:
    return SimpleNamespace(
        aggregated_metrics=reported,
        total_queued_requests=at_router,
        total_num_requests=calls,
        config=SimpleNamespace(target_ongoing_requests=10.0),
    )


def test_what_waits_for_an_adapter_asks_for_no_machine() -> None:
    reported = {
        "running": {"one": 8.0, "two": 8.0},
        "waiting_for_place": {"one": 10.0, "two": 0.0},
        "waiting_for_adapter": {"one": 500.0, "two": 500.0},
    }
    assert by_waiting(scaling(reported, at_router=14, calls=1040))[0] == 4.0
    # Before anybody has reported, Serve's own count is all there is.
    assert by_waiting(scaling({}, calls=30))[0] == 3.0

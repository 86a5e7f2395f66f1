"""What Prometheus sees."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from typing import TYPE_CHECKING

import grpc.aio
import pytest
from prometheus_client import (
    CollectorRegistry,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.parser import text_string_to_metric_families

from lorary.errors import CorruptArtifact
from lorary.server.histogram import OneWriterHistogram
from lorary.server.top_adapters import OTHER, TopAdapters
from lorary.v1 import inference_pb2 as pb
from tests.edge.fakes import digest_of, serving

if TYPE_CHECKING:
    from tests.edge.fakes import Edge


async def scrape(edge: Edge) -> str:
    def read() -> str:
        with urllib.request.urlopen(edge.metrics_url) as response:
            return str(response.read().decode())

    return await asyncio.to_thread(read)


async def ask(edge: Edge, adapter: str, max_tokens: int = 4) -> None:
    request = pb.GenerateRequest(
        adapter=adapter,
        input=pb.Input(prompt="2 5"),
        sampling=pb.SamplingParams(max_tokens=max_tokens),
    )
    async for _ in edge.inference.Generate(request):
        pass


def value(text: str, name: str, **labels: str) -> float | None:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return sample.value
    return None


async def test_a_call_is_seen_in_every_metric_it_touches(edge: Edge) -> None:
    await ask(edge, "alpha")
    text = await scrape(edge)
    assert value(text, "lorary_requests_total", method="Generate", code="OK") == 1
    assert value(text, "lorary_request_seconds_count", method="Generate") == 1
    assert value(text, "lorary_tokens_total", kind="prompt") == 2
    assert value(text, "lorary_tokens_total", kind="generation") == 4
    assert value(text, "lorary_time_to_first_token_seconds_count") == 1
    assert value(text, "lorary_inter_token_seconds_count") == 3
    assert value(text, "lorary_queue_seconds_count") == 1
    assert value(text, "lorary_step_seconds_count") == 4
    assert value(text, "lorary_step_distinct_adapters_count") == 4
    assert value(text, "lorary_step_decode_rows_sum") == 4
    assert value(text, "lorary_requests_running") == 0
    assert value(text, "lorary_requests_waiting", reason="capacity") == 0
    assert value(text, "lorary_adapters", state="resident") == 1
    assert value(text, "lorary_adapter_bytes") == 4096
    assert value(text, "lorary_adapter_info", adapter="alpha", digest=digest_of("alpha")) == 1
    assert value(text, "lorary_adapter_requests_total", adapter="alpha") == 1
    assert value(text, "lorary_adapter_tokens_total", adapter="alpha", kind="generation") == 4
    assert value(text, "lorary_kv_tokens_capacity") == 256
    assert value(text, "lorary_build_info", base="tiny") == 1
    assert value(text, "process_resident_memory_bytes")


async def test_loads_and_evictions_are_counted(edge: Edge) -> None:
    edge.metrics.on_load("alpha", 0.5, None)
    edge.metrics.on_load("alpha", 0.5, CorruptArtifact("x"))
    edge.metrics.on_evict("memory")
    text = await scrape(edge)
    assert value(text, "lorary_adapter_loads_total", result="ok") == 1
    assert value(text, "lorary_adapter_loads_total", result="error") == 1
    assert value(text, "lorary_adapter_load_seconds_count") == 1
    assert value(text, "lorary_adapter_evictions_total", cause="memory") == 1


async def test_names_and_help_are_what_promtool_wants(edge: Edge) -> None:
    """The rules of ``promtool check metrics``, which is not on every machine."""
    await ask(edge, "alpha")
    for family in text_string_to_metric_families(await scrape(edge)):
        name, kind = family.name, family.type
        assert family.documentation, name
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name), name
        if name.startswith("process_"):
            continue
        assert name.startswith("lorary_"), name
        assert kind != "unknown", name
        if kind == "counter":
            assert all(s.name.endswith("_total") for s in family.samples), name
        else:
            assert not name.endswith(("_total", "_count", "_sum", "_bucket")), name
        for unit in ("_ms", "_milliseconds", "_kb", "_mb", "_minutes"):
            assert unit not in name, name
        for label in {label for s in family.samples for label in s.labels}:
            assert re.fullmatch(r"[a-z][a-z0-9_]*", label), (name, label)


async def test_unknown_names_and_methods_never_become_labels(edge: Edge) -> None:
    for ref in ("nobody", "../x", "nobody@sha256:abcd"):
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(edge, ref)
    text = await scrape(edge)
    assert "nobody" not in text
    assert value(text, "lorary_requests_total", method="Generate", code="NOT_FOUND") == 2


async def test_series_per_adapter_are_bounded_in_a_live_scrape() -> None:
    async with serving(tracked_adapters=1) as edge:
        for adapter in ("alpha", "beta", ""):
            await ask(edge, adapter, max_tokens=1)
        text = await scrape(edge)
        assert value(text, "lorary_adapter_requests_total", adapter="alpha") == 1
        assert value(text, "lorary_adapter_requests_total", adapter=OTHER) == 2
        assert value(text, "lorary_adapter_requests_total", adapter="beta") is None


def test_a_histogram_of_one_writer_says_what_prometheus_own_would() -> None:
    disable_created_metrics()  # type: ignore[no-untyped-call]  # as the server does
    bounds = (0.001, 0.5, 1, 32)
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    one = OneWriterHistogram("lorary_x", "Help.", buckets=bounds, registry=ours)
    other = Histogram("lorary_x", "Help.", buckets=bounds, registry=theirs)
    for value in (0.0, 0.001, 0.0011, 1, 1.5, 32, 33.0, 1e9):
        one.observe(value)
        other.observe(value)
    assert generate_latest(ours) == generate_latest(theirs)


def test_a_busy_newcomer_takes_the_quietest_series_and_no_counter_ever_falls() -> None:
    registry = CollectorRegistry()
    top = TopAdapters(2, registry)

    def count(adapter: str) -> float | None:
        return registry.get_sample_value("lorary_adapter_requests_total", {"adapter": adapter})

    for adapter in ("a", "a", "a", "b"):
        top.add(adapter, prompt_tokens=1, generated_tokens=1)
    others = []
    for _ in range(5):
        top.add("c", prompt_tokens=1, generated_tokens=1)
        others.append(count(OTHER))
    # c needs more than twice b's one request; what came before stays with the others.
    assert others == [1, 2, 2, 2, 2]
    assert (count("a"), count("b"), count("c")) == (3, None, 3)
    top.add("b", prompt_tokens=1, generated_tokens=1)
    assert count(OTHER) == 3


def test_a_limit_of_zero_tracks_nobody() -> None:
    registry = CollectorRegistry()
    TopAdapters(0, registry).add("a", prompt_tokens=1, generated_tokens=2)
    labels = {"adapter": OTHER, "kind": "generation"}
    assert registry.get_sample_value("lorary_adapter_tokens_total", labels) == 2

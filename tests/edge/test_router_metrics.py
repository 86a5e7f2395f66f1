"""What an endpoint picker reads of a server, under vLLM's names."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

from lorary.server.router_metrics import AskedRefs
from tests.edge.fakes import FakeResidency, serving
from tests.edge.test_metrics import ask, scrape, value

if TYPE_CHECKING:
    from prometheus_client.samples import Sample

ADAPTER_BYTES = 4096
"""What an adapter of the fakes takes."""


def lora_info(text: str) -> list[Sample]:
    return [
        sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "vllm:lora_requests_info"
    ]


async def test_what_is_resident_and_what_is_coming_are_listed_as_callers_call_them() -> None:
    residency = FakeResidency(slow={"beta"})
    async with serving(residency=residency, router_metrics=True) as edge:
        await ask(edge, "alpha")
        await ask(edge, "alpha@1")
        residency.prefetch(edge.registry.resolve("beta"))
        (info,) = lora_info(await scrape(edge))
        assert info.labels["running_lora_adapters"] == "alpha,alpha@1"
        assert info.labels["waiting_lora_adapters"] == "beta@1"
        assert abs(info.value - time.time()) < 60


async def test_a_version_that_left_is_not_listed_and_leaves_no_series_behind() -> None:
    residency = FakeResidency()
    async with serving(residency=residency, router_metrics=True) as edge:
        await ask(edge, "alpha")
        await ask(edge, "beta")
        for resident in list(residency.resident.values()):
            if resident.name == "alpha":
                residency.unload(resident.digest)
        (info,) = lora_info(await scrape(edge))
        assert info.labels["running_lora_adapters"] == "beta,beta@1"


async def test_what_is_left_of_max_lora_is_what_there_is_memory_for() -> None:
    memory = 2**20
    async with serving(router_metrics=True, adapter_memory=memory) as edge:
        (empty,) = lora_info(await scrape(edge))
        assert empty.labels["max_lora"] == "1"
        await ask(edge, "alpha")
        (info,) = lora_info(await scrape(edge))
        names = info.labels["running_lora_adapters"].split(",")
        assert int(info.labels["max_lora"]) - len(names) == memory // ADAPTER_BYTES - 1


async def test_queue_and_cache_have_the_names_that_pickers_look_for() -> None:
    async with serving(router_metrics=True) as edge:
        await ask(edge, "alpha")
        text = await scrape(edge)
        assert value(text, "vllm:num_requests_running") == 0
        assert value(text, "vllm:num_requests_waiting") == 0
        assert value(text, "vllm:kv_cache_usage_perc") == 0
        assert value(text, "vllm:cache_config_info", block_size="32", num_gpu_blocks="8") == 1


async def test_nothing_of_it_is_there_unless_it_is_wanted() -> None:
    async with serving() as edge:
        await ask(edge, "alpha")
        assert "vllm" not in await scrape(edge)


def test_refs_are_remembered_up_to_so_many_the_latest_first() -> None:
    asked = AskedRefs(most=2)
    for ref, digest in (("a", "1"), ("b", "1"), ("a", "2"), ("c", "2")):
        asked.note(ref, digest)
    assert asked.by_digest() == {"2": ["a", "c"]}

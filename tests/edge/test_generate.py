"""The data plane over real sockets, with answers worked out in ``fakes``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest

from lorary.v1 import inference_pb2 as pb
from tests.edge.fakes import FINGERPRINT, digest_of

if TYPE_CHECKING:
    from tests.edge.fakes import Edge


def request(adapter: str = "", **fields: Any) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(**fields)
    return pb.GenerateRequest(
        adapter=adapter, input=pb.Input(prompt="2 5"), sampling=sampling, request_id="mine"
    )


async def collect(call: Any) -> list[pb.GenerateResponse]:
    return [event async for event in call]


async def test_stream_is_the_worked_example(edge: Edge) -> None:
    events = await collect(edge.inference.Generate(request("beta", max_tokens=3)))
    assert [list(e.chunk.token_ids) for e in events[:-1]] == [[8], [11], [14]]
    complete = events[-1].complete
    assert complete.text == "8 11 14 "
    assert complete.finish_reason == pb.FINISH_REASON_LENGTH
    assert (complete.usage.prompt_tokens, complete.usage.completion_tokens) == (2, 3)


async def test_receipt_names_what_answered(edge: Edge) -> None:
    call = edge.inference.Generate(request("beta@prod", max_tokens=1))
    receipt = (await collect(call))[-1].complete.receipt
    assert (receipt.ref, receipt.name, receipt.version) == ("beta@prod", "beta", 1)
    assert receipt.digest == digest_of("beta")
    assert receipt.base_fingerprint == FINGERPRINT
    assert receipt.quantization == "none"
    assert receipt.request_id == "mine"
    assert receipt.timings.adapter_load_ns == 2
    trailing = dict(await call.trailing_metadata())
    assert trailing["lorary-adapter-digest"] == digest_of("beta")
    assert trailing["lorary-request-id"] == "mine"


async def test_bare_base_has_an_empty_digest_and_default_tokens_fill_the_context(
    edge: Edge,
) -> None:
    events = await collect(edge.inference.Generate(request()))
    complete = events[-1].complete
    assert complete.receipt.digest == ""
    assert complete.usage.completion_tokens == 62  # 256 by default, cut to context 64 - prompt 2


async def test_text_uses_the_adapters_template_and_defaults(edge: Edge) -> None:
    call = edge.inference.Generate(pb.GenerateRequest(adapter="alpha", input=pb.Input(text="2 5")))
    complete = (await collect(call))[-1].complete
    assert complete.usage.prompt_tokens == 3  # 100 2 5
    assert complete.text == "7 9 11 13 15 "  # the task's max_new_tokens is 5
    assert edge.engine.submitted[0].sampling.stop == ("900",)


@pytest.mark.parametrize(
    ("field", "prompt_tokens"),
    [
        ({"token_ids": pb.TokenIds(ids=[2, 5])}, 2),
        ({"chat": pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="2 5")])}, 3),
    ],
)
async def test_other_inputs(edge: Edge, field: dict[str, Any], prompt_tokens: int) -> None:
    call = edge.inference.Generate(
        pb.GenerateRequest(input=pb.Input(**field), sampling=pb.SamplingParams(max_tokens=1))
    )
    complete = (await collect(call))[-1].complete
    assert (complete.text, complete.usage.prompt_tokens) == ("6 ", prompt_tokens)


async def test_n_answers_each_end_once_with_a_lease_each(edge: Edge) -> None:
    events = await collect(edge.inference.Generate(request("alpha", max_tokens=2, n=3, seed=7)))
    ends = [e.complete.index for e in events if e.HasField("complete")]
    assert sorted(ends) == [0, 1, 2]
    for index in range(3):
        tokens = [
            list(e.chunk.token_ids)
            for e in events
            if e.HasField("chunk") and e.chunk.index == index
        ]
        assert tokens == [[7], [9]]
    assert len(edge.residency.leases) == 3
    assert edge.residency.num_held == 0
    assert not edge.engine.cancelled


async def test_logprobs_travel(edge: Edge) -> None:
    events = await collect(edge.inference.Generate(request(max_tokens=1, logprobs=2)))
    position = events[0].chunk.logprobs[0]
    assert (position.chosen.token_id, position.chosen.logprob) == (6, -0.5)
    assert [p.token_id for p in position.top] == [0, 1]


async def test_classify_is_a_softmax_over_the_adapters_labels(edge: Edge) -> None:
    answer = await edge.inference.Classify(
        pb.ClassifyRequest(adapter="beta", input=pb.Input(prompt="2 5"))
    )
    assert [score.label for score in answer.scores] == ["8", "10"]
    assert answer.scores[1].logprob == -2.0
    assert answer.scores[0].probability == pytest.approx(1 / (1 + math.exp(-2.0)))
    assert sum(s.probability for s in answer.scores) == pytest.approx(1.0)
    assert answer.receipt.digest == digest_of("beta")
    assert answer.usage.prompt_tokens == 2


async def test_classify_with_given_labels_on_the_bare_base(edge: Edge) -> None:
    answer = await edge.inference.Classify(
        pb.ClassifyRequest(input=pb.Input(prompt="2 5"), labels=["9", "6", "7"])
    )
    assert [score.label for score in answer.scores] == ["6", "7", "9"]


async def test_tokenize_is_what_generate_reads(edge: Edge) -> None:
    call = edge.inference.Tokenize(pb.TokenizeRequest(adapter="alpha", input=pb.Input(text="2 5")))
    answer = await call
    assert list(answer.token_ids) == [100, 2, 5]
    assert list(answer.pieces) == ["100 ", "2 ", "5 "]
    assert dict(await call.trailing_metadata())["lorary-adapter-digest"] == digest_of("alpha")


async def test_server_info_counts_steps_by_distinct_adapters(edge: Edge) -> None:
    await collect(edge.inference.Generate(request("alpha", max_tokens=4)))
    info = await edge.inference.GetServerInfo(pb.GetServerInfoRequest())
    assert (info.base, info.max_context, info.num_running) == ("tiny", 64, 0)
    assert info.adapter_memory_used_bytes == 4096
    assert sum(info.steps_by_distinct_adapters) == 4


async def test_a_request_id_in_metadata_is_kept(edge: Edge) -> None:
    call = edge.inference.GetServerInfo(
        pb.GetServerInfoRequest(), metadata=(("lorary-request-id", "from-the-gateway"),)
    )
    await call
    assert dict(await call.trailing_metadata())["lorary-request-id"] == "from-the-gateway"

"""Both clients against a real server: results, errors as they were raised, retries, readiness."""

from __future__ import annotations

import asyncio
import inspect
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import pytest_asyncio

from lorary import errors
from lorary.client import AsyncClient, Chunk, Client, GenerateResult
from lorary.client.failures import from_rpc_error
from lorary.errors import OUTCOMES, LoraryError
from lorary.server import status
from lorary.server.engine.request import Constraint
from tests.edge.fakes import FINGERPRINT, digest_of, eventually, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from tests.edge.fakes import Edge


@pytest_asyncio.fixture
async def edge() -> AsyncIterator[Edge]:
    async with serving() as running:
        yield running


@pytest_asyncio.fixture
async def client(edge: Edge) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(edge.address) as open_client:
        yield open_client


def public_calls(cls: type) -> dict[str, list[str]]:
    return {
        name: list(inspect.signature(member).parameters)
        for name, member in vars(cls).items()
        if inspect.isfunction(member) and not name.startswith("_")
    }


def test_both_clients_offer_the_same_calls() -> None:
    assert public_calls(Client) == public_calls(AsyncClient)


async def test_prompts_have_log_probabilities_of_their_own(client: AsyncClient) -> None:
    answer = await client.generate(prompt="2 5", max_tokens=1, prompt_logprobs=1)
    assert [one.chosen for one in answer.prompt_logprobs] == [(2, 0.0), (5, -0.25)]
    assert answer.prompt_logprobs[1].top == ((0, -1.0),)


async def test_what_an_answer_must_be_travels(edge: Edge, client: AsyncClient) -> None:
    cases: list[tuple[dict[str, Any], Constraint]] = [
        ({"choice": ["a", "b"]}, Constraint("choice", '["a", "b"]')),
        ({"json_schema": {"type": "object"}}, Constraint("json_schema", '{"type": "object"}')),
        ({"json_schema": "{}"}, Constraint("json_schema", "{}")),
        ({"regex": "a+"}, Constraint("regex", "a+")),
        ({"lark": "start: A"}, Constraint("lark", "start: A")),
    ]
    for options, wanted in cases:
        await client.generate(prompt="2 5", max_tokens=1, logit_bias={4: -1.5}, **options)
        assert edge.engine.submitted[-1].sampling.constraint == wanted
        assert edge.engine.submitted[-1].sampling.logit_bias == ((4, -1.5),)
    with pytest.raises(errors.InvalidRequest, match="choice and regex"):
        await client.generate(prompt="2 5", choice=["a"], regex="a")


async def test_generate(client: AsyncClient) -> None:
    answer = await client.generate(
        "2 5", adapter="alpha@prod", max_tokens=3, logprobs=1, request_id="mine"
    )
    assert answer.text == "7 9 11 "
    assert answer.token_ids == (7, 9, 11)
    assert answer.finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 3)
    assert (answer.receipt.name, answer.receipt.version) == ("alpha", 1)
    assert answer.receipt.digest == digest_of("alpha")
    assert answer.receipt.base_fingerprint == FINGERPRINT
    assert answer.receipt.request_id == "mine"
    assert answer.receipt.timings.decode_s == 4e-9
    assert [position.chosen[0] for position in answer.logprobs] == [7, 9, 11]


@pytest.mark.parametrize(
    "given",
    [{"prompt": "2 5"}, {"token_ids": [2, 5]}, {"messages": [{"role": "user", "content": "2 5"}]}],
)
async def test_every_kind_of_input(client: AsyncClient, given: dict[str, Any]) -> None:
    assert (await client.generate(**given, max_tokens=1)).text == "6 "


async def test_stream_yields_chunks_then_the_answer(client: AsyncClient) -> None:
    events = [event async for event in client.stream(prompt="2 5", max_tokens=2)]
    assert [e.text for e in events if isinstance(e, Chunk)] == ["6 ", "7 "]
    assert isinstance(events[-1], GenerateResult)
    assert events[-1].token_ids == (6, 7)


async def test_generate_many_is_by_index(client: AsyncClient) -> None:
    answers = await client.generate_many(3, prompt="2 5", max_tokens=2)
    assert [(a.index, a.token_ids) for a in answers] == [(i, (6, 7)) for i in range(3)]


async def test_the_other_calls(client: AsyncClient) -> None:
    scored = await client.classify(prompt="2 5", adapter="beta")
    assert scored.label == "8"
    assert sum(scored.probabilities.values()) == pytest.approx(1.0)
    assert scored.logprobs == {"8": 0.0, "10": -2.0}
    assert (await client.tokenize("2 5", adapter="alpha")).pieces == ("100 ", "2 ", "5 ")
    assert (await client.server_info()).base == "tiny"
    loaded = await client.load_adapter("alpha", pin=True)
    assert (loaded.residency, loaded.pinned) == ("resident", True)
    resident = await client.list_adapters(resident_only=True)
    assert {a.name for a in resident} == {"alpha", "beta"}
    assert (await client.unload_adapter("alpha")).residency == "registry"


async def test_priorities_reach_the_engine(edge: Edge, client: AsyncClient) -> None:
    await client.generate(prompt="2", max_tokens=1)
    await client.generate(prompt="2", max_tokens=1, priority=-10)
    await client.generate_many(2, prompt="2", max_tokens=1, priority=3)
    await client.classify(prompt="2", adapter="beta", priority=10)
    assert [r.priority for r in edge.engine.submitted] == [0, -10, 3, 3, 10]
    with pytest.raises(errors.InvalidRequest, match="in \\[-10, 10\\]") as caught:
        await client.generate(prompt="2", priority=11)
    assert caught.value.field == "priority"
    with pytest.raises(errors.InvalidRequest, match="priority cannot be"):
        await client.generate(prompt="2", priority=2**31)


async def test_leaving_a_stream_early_cancels_the_call(edge: Edge, client: AsyncClient) -> None:
    stream = client.stream(prompt="2 5", max_tokens=62)
    async for _ in stream:
        break
    await stream.aclose()  # type: ignore[attr-defined]
    await eventually(lambda: edge.calls.num_in_flight == 0)


async def test_the_sync_client_works_from_threads(edge: Edge) -> None:
    def work() -> list[str]:
        with Client(edge.address) as client:
            client.wait_until_ready(30)
            texts = [client.generate(prompt="2 5", adapter="beta", max_tokens=2).text]
            texts += [e.text for e in client.stream(prompt="1", max_tokens=1)]
            texts.append(client.classify(prompt="2 5", adapter="beta").label)
            for _ in client.stream(prompt="2 5", max_tokens=62):
                break
            with pytest.raises(errors.AdapterNotFound):
                client.generate(prompt="2", adapter="nobody")
            return texts

    assert await asyncio.to_thread(work) == ["8 11 ", "2 ", "2 ", "8"]
    await eventually(lambda: edge.calls.num_in_flight == 0)


async def test_errors_raise_as_what_they_were(client: AsyncClient) -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        await client.generate(prompt="2", temperature=-1.0)
    assert caught.value.field == "sampling.temperature"
    assert isinstance(caught.value.__cause__, grpc.RpcError)
    with pytest.raises(errors.InvalidRef):
        await client.generate(prompt="2", adapter="../x")
    with pytest.raises(errors.IncompatibleAdapter):
        await client.generate(prompt="2", adapter="other-base")


async def test_what_cannot_be_sent_is_refused_here(client: AsyncClient) -> None:
    with pytest.raises(errors.InvalidRequest, match=r"sampling\.max_tokens cannot be -1"):
        await client.generate(prompt="2", max_tokens=-1)
    with pytest.raises(errors.InvalidRequest, match=r"token_ids cannot be"):
        await client.generate(token_ids=[-1])
    with pytest.raises(errors.InvalidRequest, match="exactly one"):
        await client.generate("2", prompt="2")
    with pytest.raises(errors.InvalidRequest, match="exactly one"):
        await client.generate()
    with pytest.raises(TypeError, match="did you mean 'temperature'"):
        await client.generate(prompt="2", temprature=1.0)  # type: ignore[call-arg]


async def test_a_deadline_is_an_error_of_ours(edge: Edge, client: AsyncClient) -> None:
    edge.engine.gate.clear()
    with pytest.raises(errors.DeadlineExceeded):
        await client.generate(prompt="2", timeout_s=0.2)


class FakeRpcError(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, text: str, trailing: Any) -> None:
        self._answer = code, text, trailing

    def code(self) -> grpc.StatusCode:
        return self._answer[0]

    def details(self) -> str:
        return self._answer[1]

    def trailing_metadata(self) -> Any:
        return self._answer[2]


@pytest.mark.parametrize("cls", OUTCOMES)
def test_every_error_comes_back_as_its_class(cls: type[LoraryError]) -> None:
    """Server and client map by one table; a class that only one of them knew would show here."""
    rich = status.to_status(cls("what — why — what to do"))
    trailing = (("other", "x"), (status.DETAILS_KEY, rich.SerializeToString()))
    raised = from_rpc_error(FakeRpcError(status.code_of(cls("x")), rich.message, trailing), "t")
    assert type(raised) is cls
    assert str(raised) == "what — why — what to do"


def test_what_errors_carry_comes_back() -> None:
    sent: list[tuple[LoraryError, str, Any]] = [
        (errors.InvalidRequest("x", field="a.b"), "field", "a.b"),
        (errors.Overloaded("x", retry_after_s=2.5), "retry_after_s", 2.5),
        (errors.Unavailable("x", retry_after_s=0.0), "retry_after_s", 0.0),
    ]
    for error, name, value in sent:
        trailing = ((status.DETAILS_KEY, status.to_status(error).SerializeToString()),)
        raised = from_rpc_error(FakeRpcError(status.code_of(error), "x", trailing), "t")
        assert getattr(raised, name) == value


@pytest.mark.parametrize("code", [c for c in grpc.StatusCode if c is not grpc.StatusCode.OK])
@pytest.mark.parametrize("trailing", [None, (), ((status.DETAILS_KEY, b"\xff garbage"),)])
def test_foreign_statuses_become_errors_of_ours(code: grpc.StatusCode, trailing: Any) -> None:
    raised = from_rpc_error(FakeRpcError(code, "from a proxy", trailing), "host:1")
    assert isinstance(raised, LoraryError)
    assert "host:1" in str(raised)


@contextmanager
def counting(edge: Edge, times: int, error: LoraryError) -> Iterator[list[str]]:
    """Let the registry fail ``times`` times."""
    registry: Any = edge.registry
    real: Callable[[str], Any] = registry.resolve
    seen: list[str] = []

    def resolve(ref: str) -> Any:
        seen.append(ref)
        if len(seen) <= times:
            raise error
        return real(ref)

    registry.resolve = resolve
    yield seen


async def test_unavailable_is_retried_before_the_first_message(
    edge: Edge, client: AsyncClient
) -> None:
    with counting(edge, 2, errors.RegistryUnavailable("away for a moment")) as seen:
        answer = await client.generate(prompt="2 5", adapter="alpha", max_tokens=1)
    assert answer.text == "7 "
    assert len(seen) == 3


async def test_other_errors_are_not_retried(edge: Edge, client: AsyncClient) -> None:
    with (
        counting(edge, 9, errors.CorruptArtifact("damaged")) as seen,
        pytest.raises(errors.CorruptArtifact),
    ):
        await client.generate(prompt="2 5", adapter="alpha")
    assert len(seen) == 1


async def test_no_server_is_unavailable_and_says_where() -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(errors.Unavailable, match=r"127\.0\.0\.1:1"):
            await client.generate(prompt="2")
        with pytest.raises(errors.Unavailable, match=r"not ready within 0\.3 s"):
            await client.wait_until_ready(0.3)


async def test_a_server_that_starts_late_is_waited_for() -> None:
    async with serving() as probe:
        port = int(probe.address.rsplit(":", 1)[-1])
    async with AsyncClient(f"127.0.0.1:{port}") as client:
        waiting = asyncio.create_task(client.wait_until_ready(60))
        await asyncio.sleep(1.0)
        async with serving(port=port):
            assert (await waiting).base == "tiny"


def test_a_sync_client_gives_up_in_time() -> None:
    started = time.monotonic()
    with (
        Client("127.0.0.1:1") as client,
        pytest.raises(errors.Unavailable, match=r"not ready within 0\.3 s"),
    ):
        client.wait_until_ready(0.3)
    assert time.monotonic() - started < 10

"""The client for threads."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Self

import grpc

from lorary.client import messages as m
from lorary.client.channel import DEFAULT_TARGET, DEFAULT_TIMEOUT_S, Deadline, channel_options
from lorary.client.control import ControlCalls
from lorary.client.credentials import Credentials
from lorary.client.failures import from_rpc_error
from lorary.client.results import GenerateResult
from lorary.client.stubs import stubs
from lorary.errors import Unavailable
from lorary.v1 import control_pb2, inference_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Unpack

    from lorary.client.results import (
        AdapterInfo,
        Chunk,
        Classification,
        Embedding,
        Execution,
        Pooling,
        Scored,
        ServerInfo,
        Tokens,
    )


class Client(ControlCalls):
    """A connection to one server; safe to share between threads.

    Args:
        target: ``host:port``, or any gRPC target such as ``dns:///lorary:50051``.
        timeout_s: deadline of a whole call, unless the call sets its own; ``None`` sets none.
        credentials: token and TLS; by default what the environment says (``Credentials.from_environment``).
        channel: an open channel to use instead; it stays the caller's to close.
        affinity: of the servers behind ``target``, on how many an adapter's calls are; 0 takes servers in
            turn. The calls name their adapter in their metadata, and gRPC hashes it (docs/scaling.md).

    Raises:
        ConfigError: the token would travel unencrypted, a TLS file cannot be read, or ``affinity`` is out
            of its range.

    Example::

        with Client("127.0.0.1:50051") as client:
            for event in client.stream("a long day", adapter="translation@prod"):
                if isinstance(event, Chunk):
                    print(event.text, end="")
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        credentials: Credentials | None = None,
        channel: grpc.Channel | None = None,
        affinity: int = 0,
    ) -> None:
        self.target = target
        self._timeout_s = timeout_s
        self._owned = None
        if credentials is None:
            credentials = Credentials.from_environment()
        if channel is None:
            channel = self._owned = _open(target, credentials, affinity)
        self._inference, self._control = stubs(channel, credentials, affinity)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; running calls end as cancelled."""
        if self._owned is not None:
            self._owned.close()

    def wait_until_ready(self, timeout_s: float = 60.0) -> ServerInfo:
        """Wait until the server answers; return its description.

        Raises:
            Unavailable: it does not within ``timeout_s``.
        """
        deadline = Deadline(timeout_s)
        while True:
            try:
                answer = self._inference.GetServerInfo(
                    inference_pb2.GetServerInfoRequest(),
                    timeout=max(deadline.remaining_s, 0.001),
                    wait_for_ready=True,
                )
                return m.server_info(answer)
            except grpc.RpcError as error:
                cause = from_rpc_error(error, self.target)
                if deadline.is_over or not isinstance(cause, Unavailable):
                    raise Unavailable(
                        f"the server at '{self.target}' was not ready within {timeout_s:g} s: {cause}"
                    ) from error
            time.sleep(min(0.2, deadline.remaining_s))

    def generate(
        self,
        text: str | None = None,
        *,
        prompt: str | None = None,
        messages: Sequence[m.Message] | None = None,
        token_ids: Sequence[int] | None = None,
        adapter: str = "",
        adapters: m.Adapters = (),
        scale: float | None = None,
        priority: int = 0,
        request_id: str = "",
        routing_key: str = "",
        execution: Execution = "auto",
        timeout_s: float | None = None,
        **sampling: Unpack[m.GenerateOptions],
    ) -> GenerateResult:
        """Return one whole answer.

        Args:
            text: plain text for the adapter's own template. Exactly one of ``text``, ``prompt``,
                ``messages`` and ``token_ids`` is given.
            prompt: a complete prompt, special tokens included.
            messages: chat messages for the base's chat template.
            token_ids: token ids, taken as they are.
            adapter: ``name``, ``name@alias``, ``name@3``, ``name@sha256:…``; empty: the bare base.
            adapters: several at once instead, with weights: ``[("sentiment@prod", 0.7), ("polite@2", 0.3)]``
                or a mapping. The first one's template, labels and stop strings apply.
            scale: what the change of the single ``adapter`` is multiplied by; default 1.
            priority: -10 to 10; higher is served sooner while requests wait for a place.
            request_id: an id for the server's log; the server makes one when empty.
            routing_key: who calls, such as a user's id: the same key gets the same version while an
                alias has a canary. The request's id when empty.
            execution: ``batched``: beside the base, in one batch with other adapters; ``merged``: folded into a
                copy of the base's weights, or refused with the reason; ``auto``: as the server sees fit.
            timeout_s: deadline of this call; default: the client's.
            sampling: see ``SamplingOptions``, and ``ToolOptions`` for functions that may be called.

        Raises:
            LoraryError: what the server refused, as the class that it was.

        Example::

            client.generate("the film was a delight", adapter="sentiment@prod").text
            client.generate(prompt="Once upon a time", max_tokens=32, temperature=0.8, seed=1)
        """
        request = m.generate_request(
            1,
            text,
            prompt,
            messages,
            token_ids,
            adapter,
            priority,
            request_id,
            sampling,
            adapters,
            scale,
            routing_key,
            execution,
        )
        (answer,) = self._all(request, timeout_s)
        return answer

    def generate_many(
        self,
        n: int,
        text: str | None = None,
        *,
        prompt: str | None = None,
        messages: Sequence[m.Message] | None = None,
        token_ids: Sequence[int] | None = None,
        adapter: str = "",
        adapters: m.Adapters = (),
        scale: float | None = None,
        priority: int = 0,
        request_id: str = "",
        routing_key: str = "",
        execution: Execution = "auto",
        timeout_s: float | None = None,
        **sampling: Unpack[m.GenerateOptions],
    ) -> list[GenerateResult]:
        """Return ``n`` answers to the same input, by index; see ``generate``."""
        request = m.generate_request(
            n,
            text,
            prompt,
            messages,
            token_ids,
            adapter,
            priority,
            request_id,
            sampling,
            adapters,
            scale,
            routing_key,
            execution,
        )
        return self._all(request, timeout_s)

    def stream(
        self,
        text: str | None = None,
        *,
        prompt: str | None = None,
        messages: Sequence[m.Message] | None = None,
        token_ids: Sequence[int] | None = None,
        adapter: str = "",
        adapters: m.Adapters = (),
        scale: float | None = None,
        priority: int = 0,
        request_id: str = "",
        routing_key: str = "",
        execution: Execution = "auto",
        timeout_s: float | None = None,
        **sampling: Unpack[m.GenerateOptions],
    ) -> Iterator[Chunk | GenerateResult]:
        """Yield chunks as they come, then the whole answer; see ``generate``.

        Leaving the loop early cancels the call.

        Example::

            for event in client.stream("a long day", adapter="translation@prod"):
                match event:
                    case Chunk(text=text):
                        print(text, end="", flush=True)
                    case GenerateResult(receipt=receipt):
                        print(receipt.digest)
        """
        request = m.generate_request(
            1,
            text,
            prompt,
            messages,
            token_ids,
            adapter,
            priority,
            request_id,
            sampling,
            adapters,
            scale,
            routing_key,
            execution,
        )
        return self._stream(request, timeout_s)

    def classify(
        self,
        text: str | None = None,
        *,
        prompt: str | None = None,
        messages: Sequence[m.Message] | None = None,
        token_ids: Sequence[int] | None = None,
        adapter: str = "",
        adapters: m.Adapters = (),
        scale: float | None = None,
        labels: Sequence[str] = (),
        priority: int = 0,
        request_id: str = "",
        routing_key: str = "",
        execution: Execution = "auto",
        timeout_s: float | None = None,
    ) -> Classification:
        """Return the probability of every label, in one pass over the input.

        ``labels`` is what to score, by default the adapter's own; the rest is as in ``generate``.

        Example::

            client.classify("the film was a delight", adapter="sentiment@prod").label
        """
        request = m.classify_request(
            text,
            prompt,
            messages,
            token_ids,
            adapter,
            labels,
            priority,
            request_id,
            adapters,
            scale,
            routing_key,
            execution,
        )
        return m.classification(self._call(self._inference.Classify, request, timeout_s))

    def score(
        self,
        continuations: Sequence[str],
        text: str | None = None,
        *,
        prompt: str | None = None,
        messages: Sequence[m.Message] | None = None,
        token_ids: Sequence[int] | None = None,
        adapter: str = "",
        adapters: m.Adapters = (),
        scale: float | None = None,
        with_end: bool = False,
        priority: int = 0,
        request_id: str = "",
        routing_key: str = "",
        execution: Execution = "auto",
        timeout_s: float | None = None,
    ) -> Scored:
        """Return how likely each continuation is behind the input, token by token, in one pass.

        ``with_end`` scores the end of the answer behind each, too; the rest is as in ``generate``.

        Example::

            client.score([" Paris", " Rome"], prompt="The capital of France is")
        """
        request = m.score_request(
            continuations,
            text,
            prompt,
            messages,
            token_ids,
            adapter,
            with_end,
            priority,
            request_id,
            adapters,
            scale,
            routing_key,
            execution,
        )
        answer = self._call(self._inference.Score, request, timeout_s)
        return m.scored(continuations, answer)

    def embed(
        self,
        texts: str | Sequence[str] | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        token_ids: Sequence[Sequence[int]] | None = None,
        adapter: str = "",
        adapters: m.Adapters = (),
        scale: float | None = None,
        pooling: Pooling = "mean",
        normalize: bool = False,
        dimensions: int | None = None,
        priority: int = 0,
        request_id: str = "",
        routing_key: str = "",
        execution: Execution = "auto",
        timeout_s: float | None = None,
    ) -> list[Embedding]:
        """Return one vector for each input, in order: what the model's last norm makes of its tokens, pooled.

        Exactly one of ``texts`` (plain, for the adapter's own template), ``prompts`` (complete, special tokens
        included) and ``token_ids`` (of each input) is given; one text or prompt may stand for a list of it.
        ``pooling`` is the ``mean`` over an input's tokens, or the ``last`` one's; ``dimensions`` keeps so many
        components, the first ones; ``normalize`` gives vectors of length 1. The rest is as in ``generate``.

        Example::

            a, b = client.embed(prompts=["a red cat", "a blue dog"], adapter="search@prod", normalize=True)
            similarity = sum(x * y for x, y in zip(a.values, b.values))
        """
        request = m.embed_request(
            texts,
            prompts,
            token_ids,
            adapter,
            pooling,
            normalize,
            dimensions,
            priority,
            request_id,
            adapters,
            scale,
            routing_key,
            execution,
        )
        return m.embeddings(self._call(self._inference.Embed, request, timeout_s))

    def tokenize(
        self,
        text: str | None = None,
        *,
        prompt: str | None = None,
        messages: Sequence[m.Message] | None = None,
        token_ids: Sequence[int] | None = None,
        adapter: str = "",
        adapters: m.Adapters = (),
        timeout_s: float | None = None,
    ) -> Tokens:
        """Return the token ids that ``generate`` would read."""
        request = inference_pb2.TokenizeRequest(
            adapter=adapter,
            adapters=m.weighted(adapters),
            input=m.make_input(text, prompt, messages, token_ids),
        )
        return m.tokens(self._call(self._inference.Tokenize, request, timeout_s))

    def server_info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """Return the server's base, limits and load."""
        request = inference_pb2.GetServerInfoRequest()
        return m.server_info(self._call(self._inference.GetServerInfo, request, timeout_s))

    def list_adapters(
        self, *, resident_only: bool = False, timeout_s: float | None = None
    ) -> list[AdapterInfo]:
        """Return the versions that the server knows, and which of them are on its device."""
        request = control_pb2.ListAdaptersRequest(resident_only=resident_only)
        answer = self._call(self._control.ListAdapters, request, timeout_s)
        return [m.adapter_info(adapter) for adapter in answer.adapters]

    def load_adapter(
        self, adapter: str, *, pin: bool = False, timeout_s: float | None = None
    ) -> AdapterInfo:
        """Load a version and return when it is on the device; ``pin`` keeps it there."""
        request = control_pb2.LoadAdapterRequest(adapter=adapter, pin=pin)
        answer = self._call(self._control.LoadAdapter, request, timeout_s)
        return m.adapter_info(answer.adapter)

    def unload_adapter(
        self, adapter: str, *, force: bool = False, timeout_s: float | None = None
    ) -> AdapterInfo:
        """Free a version's memory once its running calls have ended; ``force`` ends them."""
        request = m.unload_request(adapter, force=force)
        answer = self._call(self._control.UnloadAdapter, request, timeout_s)
        return m.adapter_info(answer.adapter)

    def _call(self, method: Any, request: Any, timeout_s: float | None) -> Any:
        try:
            return method(request, timeout=self._timeout_s if timeout_s is None else timeout_s)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.target) from error

    def _all(
        self, request: inference_pb2.GenerateRequest, timeout_s: float | None
    ) -> list[GenerateResult]:
        events = self._stream(request, timeout_s)
        return sorted((e for e in events if isinstance(e, GenerateResult)), key=lambda e: e.index)

    def _stream(
        self, request: inference_pb2.GenerateRequest, timeout_s: float | None
    ) -> Iterator[Chunk | GenerateResult]:
        answers = m.Answers()
        call = self._inference.Generate(
            request, timeout=self._timeout_s if timeout_s is None else timeout_s
        )
        try:
            for event in call:
                yield answers.read(event)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.target) from error
        finally:
            call.cancel()


def _open(target: str, credentials: Credentials, affinity: int) -> grpc.Channel:
    credentials.check(target)
    options = channel_options(affinity=affinity)
    secure = credentials.channel_credentials()
    if secure is None:
        return grpc.insecure_channel(target, options=options)
    return grpc.secure_channel(target, secure, options=options)

"""Call a Lorary server: ``Client`` for threads, ``AsyncClient`` for asyncio. Needs grpcio only.

Example::

    from lorary.client import Client

    with Client("127.0.0.1:50051") as client:
        client.wait_until_ready()
        answer = client.generate("the film was a delight", adapter="sentiment@prod")
        print(answer.text, answer.receipt.digest)

Errors are the classes of ``lorary.errors``: what the server refused raises here as what it was.
"""

from lorary.client.aio import AsyncClient
from lorary.client.credentials import Credentials
from lorary.client.messages import Adapters, Message, SamplingOptions, ToolOptions
from lorary.client.results import (
    AdapterEvent,
    AdapterInfo,
    Chunk,
    Classification,
    ComposedAdapter,
    Embedding,
    EventsLost,
    GenerateResult,
    PositionLogprobs,
    Receipt,
    RolloutInfo,
    Scored,
    ScoredText,
    ServerInfo,
    Snapshot,
    Timings,
    Tokens,
    ToolCall,
    ToolCallPiece,
    Usage,
)
from lorary.client.sync import Client

__all__ = [
    "AdapterEvent",
    "AdapterInfo",
    "Adapters",
    "AsyncClient",
    "Chunk",
    "Classification",
    "Client",
    "ComposedAdapter",
    "Credentials",
    "Embedding",
    "EventsLost",
    "GenerateResult",
    "Message",
    "PositionLogprobs",
    "Receipt",
    "RolloutInfo",
    "SamplingOptions",
    "Scored",
    "ScoredText",
    "ServerInfo",
    "Snapshot",
    "Timings",
    "Tokens",
    "ToolCall",
    "ToolCallPiece",
    "ToolOptions",
    "Usage",
]

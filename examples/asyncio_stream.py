"""Stream answers of several adapters at once with asyncio; the server puts them into the same steps."""

import asyncio
import sys

from lorary.client import AsyncClient, Chunk

INTERFACE_TEXTS = ["Open a new window", "Delete this cell", "Save all changes"]


async def translate(client: AsyncClient, text: str) -> str:
    """Return the translation, counting its chunks as they come."""
    pieces = []
    async for event in client.stream(text, adapter="translation@prod", max_tokens=32):
        if isinstance(event, Chunk):
            pieces.append(event.text)
        else:
            seconds = event.receipt.timings.decode_s
            print(f"{text} → {event.text}  ({len(pieces)} chunks, {seconds:.2f} s)")
    return "".join(pieces)


async def judge(client: AsyncClient, text: str) -> str:
    """Return the sentiment's label."""
    return (await client.classify(text, adapter="sentiment@prod")).label


async def main(target: str) -> None:
    """Ask for everything at once, then say how many adapters shared the server's steps."""
    async with AsyncClient(target) as client:
        await client.wait_until_ready()
        answers = [translate(client, text) for text in INTERFACE_TEXTS]
        verdict, *_ = await asyncio.gather(judge(client, "a waste of two hours"), *answers)
        print(f"and meanwhile: {verdict}")
        info = await client.server_info()
        steps = dict(enumerate(info.steps_by_distinct_adapters))
        print(f"steps by number of distinct adapters: {steps}")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"))

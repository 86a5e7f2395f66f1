"""Ask three adapters of one base and the base itself; `python examples/quickstart.py [HOST:PORT]`."""

import sys
from concurrent.futures import ThreadPoolExecutor

from lorary.client import Client

TASKS = {
    "translation@prod": "Save the file before closing?",
    "summarization@prod": "The central bank left rates unchanged on Tuesday, citing slow growth.",
}
with Client(*sys.argv[1:]) as client, ThreadPoolExecutor() as pool:
    client.wait_until_ready()
    verdict = client.classify("a waste of two hours", adapter="sentiment@prod")
    print(verdict.label, verdict.probabilities)
    # Sent together, they share the server's steps: a different adapter in every row of the batch.
    answers = [pool.submit(client.generate, text, adapter=ref) for ref, text in TASKS.items()]
    for result in [answer.result() for answer in answers]:
        print(result.receipt.name, result.receipt.digest[:19], result.text)
    print("base:", client.generate(prompt="Once upon a time", max_tokens=16).text)

"""Tell errors apart: what to fix, what to ask again later, and what to retry at once."""

import sys
import time

from quire.cluster import Client, InvalidRequest, QueueFull, ReplicaDied, SamplingParams, collect

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8100"
sampling = SamplingParams(max_tokens=16, temperature=1.0, seed=7)  # with a seed, an answer can be resumed


def answer_of(client: Client, prompt: str) -> str:
    for _ in range(5):
        try:
            return collect(client.generate(prompt, sampling)).text
        except ReplicaDied as error:  # the client has tried every gateway
            time.sleep(error.retry_s)
        except QueueFull:
            time.sleep(1)
    raise SystemExit("no answer after five attempts")


with Client(address, retry_for_s=10) as client:
    print(answer_of(client, "Long ago, a cat named"))
    try:
        collect(client.generate([5, 1_000_000]))
    except InvalidRequest as error:
        print(f"{error.status}: {error}")

"""Asks a gateway the same questions, four at a time, until it is ended; prints outcomes as lines of JSON."""

import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from quire.cluster import CallOptions, Client, SamplingParams, collect
from quire.replicas.errors import QuireError

PROMPTS = [f"Long ago, a {who} named {name}" for who in ("cat", "fox", "hen", "owl") for name in "ABC"]
SAMPLING = SamplingParams(max_tokens=24, ignore_eos=True)
ASKERS = 4  # one that waits for a dead host must not be the only one


def main(address: str, deadline_s: float) -> None:
    with ThreadPoolExecutor(ASKERS) as askers:
        for at in range(ASKERS):
            askers.submit(ask, address, deadline_s, PROMPTS[at::ASKERS])


def ask(address: str, deadline_s: float, prompts: Sequence[str]) -> None:
    while True:
        for prompt in prompts:
            start = time.time()
            outcome: dict[str, object] = {"prompt": prompt, "start": start}
            with Client(address) as client:
                try:
                    answer = collect(client.generate(prompt, SAMPLING, CallOptions(deadline_s=deadline_s)))
                    outcome["tokens"] = answer.outputs[0].token_ids
                except QuireError as error:
                    outcome["error"] = f"{error.status}: {error}"
            line = json.dumps({**outcome, "seconds": time.time() - start})
            print(line + "\n", end="", flush=True)  # in one piece


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))

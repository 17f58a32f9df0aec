"""Asks a gateway the same questions until it is ended; prints each outcome as a line of JSON."""

import json
import sys
import time

from quire.cluster.client import CallOptions, Client, SamplingParams, collect
from quire.replicas.errors import QuireError

PROMPTS = [f"Long ago, a {who} named {name}" for who in ("cat", "fox", "hen", "owl") for name in "ABC"]
SAMPLING = SamplingParams(max_tokens=24, ignore_eos=True)


def main(address: str, deadline_s: float) -> None:
    while True:
        for prompt in PROMPTS:
            start = time.time()
            outcome: dict[str, object] = {"prompt": prompt, "start": start}
            with Client(address) as client:
                try:
                    answer = collect(client.generate(prompt, SAMPLING, CallOptions(deadline_s=deadline_s)))
                    outcome["tokens"] = answer.outputs[0].token_ids
                except QuireError as error:
                    outcome["error"] = f"{error.status}: {error}"
            print(json.dumps({**outcome, "seconds": time.time() - start}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))

"""Wait for a whole answer: its outputs, why they ended, and what they cost."""

import sys

from quire.cluster import Client, SamplingParams, collect

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8100"
sampling = SamplingParams(max_tokens=24, temperature=0.8, seed=7, n=2, logprobs=0)
with Client(address) as client:
    print(f"{client.model().name} is served")
    answer = collect(client.generate("Long ago, a cat named", sampling))
for index, output in sorted(answer.outputs.items()):
    likelihood = sum(token.logprob for token in output.logprobs)
    print(f"{index}: {output.text!r}, log-probability {likelihood:.1f}")
print(f"{answer.usage.prompt_tokens} tokens of prompt, {answer.usage.output_tokens} of output")
print(f"TTFT {answer.timings.first_token_s:.3f} s, total {answer.timings.total_s:.3f} s")

"""Stream the answer of a chat as it is computed."""

import sys

from quire.cluster import Client, SamplingParams

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8100"
messages = [
    {"role": "user", "content": "The pass key is 71432."},
    {"role": "assistant", "content": "Thank you, I will remember it."},
    {"role": "user", "content": "What is the pass key?"},
]
with Client(address) as client:
    for delta in client.chat(messages, SamplingParams(max_tokens=40)):
        print(delta.text, end="", flush=True)
print()

"""Ask many questions at once on an event loop, each with a deadline."""

import asyncio
import sys

from quire.cluster import AsyncClient, CallOptions, DeadlinePassed, SamplingParams, collect_async


async def ask(client: AsyncClient, prompt: str) -> str:
    try:
        stream = client.generate(prompt, SamplingParams(max_tokens=16), CallOptions(deadline_s=60))
        return (await collect_async(stream)).text
    except DeadlinePassed:
        return "(no answer in time)"


async def main(address: str) -> None:
    prompts = [f"Long ago, a {animal} named" for animal in ("cat", "fox", "hen", "owl")]
    async with AsyncClient(address) as client:
        texts = await asyncio.gather(*(ask(client, prompt) for prompt in prompts))
    for prompt, text in zip(prompts, texts, strict=True):
        print(f"{prompt}{text}")


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8100"))

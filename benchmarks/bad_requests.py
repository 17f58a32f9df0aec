"""What 16 well-behaved streams see while others send what cannot be served: errors, wrong answers, waits.

    scripts/loopback python benchmarks/bad_requests.py [--seconds S] [--cases CASE...] [--json FILE]

Ray Serve with two replicas of the demo model, changed so that one token's embedding is no number. The streams
are greedy, and each answer must be the one it was before. Cases, a quarter of the time each:
`fails in a step`: prompts with that token, and requests that end before they are done;
`wrong values`: requests whose values or names cannot be, past the client library, which would refuse them;
`too large`: texts of 4 and 15 MB, the latter with a deadline of a second, and messages beyond the limit;
`damaged folders`: `quire serve` of models with a damaged file, on the machine that serves.
They come from a process of their own, of the lowest priority, as both sides share this machine.
Rounds with and without them alternate; the time between two tokens with them is told beside that without.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import grpc
import numpy as np
import torch
from rows import Row, merge, report
from safetensors.torch import load_file, save_file

from quire.cluster import AsyncClient, SamplingParams, collect_async
from quire.cluster.cli.ray_session import cluster
from quire.cluster.cli.rollout import served
from quire.cluster.config import ServeConfig, parse
from quire.protos.quire.v1 import inference_pb2, inference_pb2_grpc
from quire.replicas.errors import QuireError
from quire.replicas.model.checkpoint import find_model

STREAMS, NEW_TOKENS = 16, 60
ROUNDS, PAUSE_S, SENDERS = 3, 0.2, 4
MOST_RATIO = 1.5
BROKEN = 4095
"""The token whose embedding is no number."""
SAMPLING = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, temperature=0)
PROMPTS = [f"Long ago, a {who} named {name}" for who in ("cat", "fox", "hen", "owl") for name in "ABCD"]
Right = Mapping[str, Sequence[int]]
Stub = inference_pb2_grpc.InferenceStub
Bad = Callable[[Stub], Awaitable[str]]
"""Sends one, and says how it ended if it ended as it should not."""


@dataclass
class Seen:
    """By the well-behaved streams, and by who sent the others."""

    answers: int = 0
    errors: int = 0
    wrong: int = 0
    gaps_s: list[float] = field(default_factory=list)
    sent: int = 0
    misjudged: int = 0


def broken_model(into: Path) -> Path:
    """The demo model with a head of its own, which the token without an embedding leaves alone."""
    folder = Path(shutil.copytree(find_model("demo"), into / "model"))
    change_json(folder / "config.json", tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.embed_tokens.weight"][BROKEN] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def change_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def damaged_folders(into: Path) -> list[Path]:
    """One folder for each file that may be damaged, and for some that say what cannot be."""

    def copy(name: str, damage: Callable[[Path], object]) -> Path:
        folder = Path(shutil.copytree(find_model("demo"), into / name))
        damage(folder)
        return folder

    return [
        copy("config", lambda f: (f / "config.json").write_text("{")),
        copy("kind", lambda f: change_json(f / "config.json", model_type="nothing")),
        copy("layers", lambda f: change_json(f / "config.json", num_hidden_layers=9)),
        copy("tokenizer", lambda f: (f / "tokenizer.json").write_text('{"model": {}}')),
        copy("no tokenizer", lambda f: (f / "tokenizer.json").unlink()),
        copy("generation", lambda f: (f / "generation_config.json").write_text("[1")),
        copy("index", lambda f: (f / "model.safetensors.index.json").write_text("{}")),
        copy("weights", lambda f: (f / "model.safetensors").write_bytes(b"\\x08" + b"\\0" * 99)),
    ]


def config_of(model: Path) -> ServeConfig:
    return parse(
        {
            "engine": {
                "model": str(model),
                "name": "demo",
                "device": "cpu",
                "threads_per_shard": 1,
                "pool": {"bytes": 24 << 20},
            },
            "gateway": {"cpus": 0.1, "port": 0},
            "replicas": {"count": 2, "cpus_per_shard": 0.1, "graceful_shutdown_s": 2},
        }
    )


# ---- what is sent


async def status_of(call: Awaitable[object]) -> str:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


async def read_all(stream: object) -> None:
    async for _ in stream:  # type: ignore[attr-defined]
        pass


def generate(
    *expected: str,
    timeout_s: float | None = None,
    sampling: Mapping[str, object] | None = None,
    **fields: object,
) -> Bad:
    """A request, and the statuses with which it may end."""
    request = inference_pb2.GenerateRequest(sampling=inference_pb2.Sampling(**(sampling or {})), **fields)

    async def send(stub: Stub) -> str:
        status = await status_of(read_all(stub.Generate(request, timeout=timeout_s)))
        return "" if status in expected else f"{status}: {str(request)[:80]!r}"

    return send


def chat(*expected: str, messages: Sequence[tuple[str, str]]) -> Bad:
    turns = [inference_pb2.ChatMessage(role=role, content=content) for role, content in messages]
    request = inference_pb2.ChatRequest(messages=turns)

    async def send(stub: Stub) -> str:
        status = await status_of(read_all(stub.Chat(request)))
        return "" if status in expected else f"{status}: {str(request)[:80]!r}"

    return send


def ids(*token_ids: int) -> inference_pb2.TokenIds:
    return inference_pb2.TokenIds(ids=token_ids)


def fail_in_a_step() -> list[Bad]:
    broken, ban = ids(5, 6, BROKEN), {"min_tokens": 8, "max_tokens": 9, "stop": ["a"] * 16}
    return [
        generate("INTERNAL", token_ids=broken),
        generate("INTERNAL", token_ids=broken, sampling={"n": 8, "temperature": 1.0}),
        generate("INTERNAL", token_ids=broken, sampling={"prompt_logprobs": 20}),
        generate("OK", token_ids=ids(5, 6), sampling=ban),
        generate("OK", token_ids=ids(8, 9), sampling={"stop_token_ids": range(64), "max_tokens": 2}),
        generate("OK", "DEADLINE_EXCEEDED", timeout_s=0.1, token_ids=ids(5), sampling={"max_tokens": 99}),
    ]


def wrong_values() -> list[Bad]:
    refused, text, nan, most = "INVALID_ARGUMENT", "Long ago", float("nan"), 2**32 - 1
    wrong: list[Mapping[str, object]] = [
        {"max_tokens": 0}, {"max_tokens": 2, "min_tokens": most}, {"min_tokens": 9, "max_tokens": 3},
        {"temperature": nan}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": float("inf")}, {"min_p": 2.0},
        {"repetition_penalty": 0.0}, {"presence_penalty": 99.0}, {"frequency_penalty": nan},
        {"logprobs": 4096}, {"prompt_logprobs": 99}, {"n": 0}, {"n": 1000}, {"stop": [""]},
        {"stop": ["a"] * 99}, {"stop": ["a" * 9999]}, {"stop_token_ids": [4096]},
        {"stop_token_ids": list(range(999))},
    ]  # fmt: skip
    return [
        *(generate(refused, text=text, sampling=values) for values in wrong),
        generate(refused),
        generate(refused, token_ids=ids()),
        generate(refused, token_ids=ids(4096)),
        generate(refused, token_ids=ids(2**32 - 1)),
        generate(refused, text=text, priority=10**6),
        generate("NOT_FOUND", text=text, model="another"),
        chat(refused, messages=[]),
    ]


def too_large() -> list[Bad]:
    refused = ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED")
    words = "the quick brown fox "
    return [
        generate(*refused, text=words * (4_000_000 // len(words))),
        generate(*refused, "DEADLINE_EXCEEDED", timeout_s=1.0, text=words * (15_000_000 // len(words))),
        generate(*refused, text="a" * 4_000_000),
        generate(*refused, text="a" * 17_000_000),
        generate(*refused, token_ids=ids(*[7] * 4096)),
        generate(*refused, token_ids=ids(*[7] * 1_000_000)),
    ]


def served_folder(folder: Path) -> Bad:
    """`quire serve` of it, which must say in one line why not."""

    async def send(_: Stub) -> str:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "quire.cluster.cli.main", "serve", str(folder), "--port", "0",
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            _, said = await asyncio.wait_for(process.communicate(), 60)
        except TimeoutError:
            process.terminate()
            await process.wait()
            return f"{folder.name}: still there after 60 s"
        # A line of progress comes first, and nothing else but the reason.
        lines = [line for line in said.decode().strip().splitlines() if "checking the model" not in line]
        refused = process.returncode == 1 and len(lines) == 1 and lines[0].startswith("quire: ")
        return "" if refused else f"{folder.name}: {process.returncode}, {lines[-1:]}"

    return send


# ---- who is watched meanwhile


async def streams(client: AsyncClient, right: Right, until_s: float, seen: Seen) -> None:
    """One of them: answers without a pause, the last of them begun before `until_s`."""

    async def ask(prompt: str) -> None:
        token_ids: list[int] = []
        last_s = None
        async for delta in client.generate(prompt, SAMPLING):
            now_s = time.monotonic()
            if last_s is not None and delta.token_ids:
                seen.gaps_s.append(now_s - last_s)
            last_s = now_s
            token_ids.extend(delta.token_ids)
        seen.wrong += token_ids != right[prompt]

    async def one(number: int) -> None:
        while time.monotonic() < until_s:
            number = (number + 1) % len(PROMPTS)
            seen.answers += 1
            try:
                await ask(PROMPTS[number])
            except QuireError as error:
                print(f"a stream ended: {type(error).__name__}: {error}", flush=True)
                seen.errors += 1

    await asyncio.gather(*(one(number) for number in range(STREAMS)))


async def senders(address: str, bad: Sequence[Bad], count: int, until_s: float) -> tuple[int, int]:
    """Run `at_once` senders with pauses between requests; return how many were sent, and ended wrongly."""
    sent = misjudged = 0

    async def one(number: int, stub: Stub) -> None:
        nonlocal sent, misjudged
        while time.monotonic() < until_s:
            sent += 1
            if ended := await bad[number % len(bad)](stub):
                print(f"ended as it should not: {ended}", flush=True)
                misjudged += 1
            number += count
            await asyncio.sleep(PAUSE_S)

    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        await asyncio.gather(*(one(number, stub) for number in range(count)))
    return sent, misjudged


def sending(orders: Connection, address: str, name: str, damaged: Sequence[Path]) -> None:
    """The senders' process: what they send costs the watched streams' own process nothing."""
    os.nice(19)  # their machines are their own
    bad, count = CASES[name](damaged)
    orders.send("ready")
    while (seconds := orders.recv()) is not None:
        orders.send(asyncio.run(senders(address, bad, count, time.monotonic() + seconds)))


async def compare(
    name: str, address: str, right: Right, damaged: Sequence[Path], seconds: float
) -> list[Row]:
    """Rounds without and with them, one after the other."""
    calm, beside = Seen(), Seen()
    context = multiprocessing.get_context("spawn")
    orders, theirs = context.Pipe()
    process = context.Process(target=sending, args=(theirs, address, name, damaged))
    process.start()
    await asyncio.to_thread(orders.recv)
    async with AsyncClient(address) as client:
        for _ in range(ROUNDS):
            await streams(client, right, time.monotonic() + seconds / ROUNDS, calm)
            orders.send(seconds / ROUNDS)
            await streams(client, right, time.monotonic() + seconds / ROUNDS, beside)
            sent, misjudged = await asyncio.to_thread(orders.recv)
            beside.sent += sent
            beside.misjudged += misjudged
    orders.send(None)
    process.join()
    without_s, with_s = (float(np.quantile(seen.gaps_s, 0.99)) for seen in (calm, beside))
    counts = {
        "errors of the others": (calm.errors + beside.errors, calm.answers + beside.answers, "answers"),
        "wrong answers of the others": (calm.wrong + beside.wrong, calm.answers + beside.answers, "answers"),
        "ended as they should not": (beside.misjudged, beside.sent, "sent"),
    }
    return [
        *(Row(name, what, n, "", f"of {of} {whose}", n / of) for what, (n, of, whose) in counts.items()),
        Row(name, "p99 between tokens", with_s * 1e3, "ms", "without", with_s / without_s),
    ]


async def right_answers(address: str) -> dict[str, list[int]]:
    async with AsyncClient(address) as client:
        answers = await asyncio.gather(*(collect_async(client.generate(p, SAMPLING)) for p in PROMPTS))
        return {p: list(answer.outputs[0].token_ids) for p, answer in zip(PROMPTS, answers, strict=True)}


CASES: Mapping[str, Callable[[Sequence[Path]], tuple[Sequence[Bad], int]]] = {
    "fails in a step": lambda damaged: (fail_in_a_step(), SENDERS),
    "wrong values": lambda damaged: (wrong_values(), SENDERS),
    "too large": lambda damaged: (too_large(), SENDERS),
    "damaged folders": lambda damaged: ([served_folder(folder) for folder in damaged], 1),
}
"""What is sent, and by how many at once."""


async def run(address: str, damaged: Sequence[Path], seconds: float, cases: Sequence[str]) -> list[Row]:
    right = await right_answers(address)
    rows = []
    for name in cases:
        rows += await compare(name, address, right, damaged, seconds / len(cases))
        report(rows[-4:], None)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="of bad requests, in all")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.update(RAY_worker_niceness="0")  # of its own 15, replicas lose against any other process
    with tempfile.TemporaryDirectory() as folder:
        config, damaged = config_of(broken_model(Path(folder))), damaged_folders(Path(folder))
        with cluster(config, None), served(config, lambda words: None) as port:
            rows = asyncio.run(run(f"127.0.0.1:{port}", damaged, args.seconds, args.cases))
    if args.json:
        merge(rows, args.json)
    return any(row.ratio > (MOST_RATIO if row.unit else 0) for row in rows)


if __name__ == "__main__":
    sys.exit(main())

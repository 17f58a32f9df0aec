"""The commands of a client: `quire generate`, `chat`, `stats` and `top`. They need nothing but the client."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import click

from quire.cluster.api.answer import Answer
from quire.cluster.api.client import Client
from quire.cluster.api.requests import CallOptions
from quire.cluster.cli.options import address_option, sampling_options
from quire.protos.quire.v1 import inference_pb2
from quire.replicas.errors import InvalidRequest, ReplicaDied
from quire.replicas.request import SamplingParams


@click.command()
@click.argument("prompt")
@sampling_options
@address_option
def generate(prompt: str, address: str, **options: Any) -> None:
    """Continue PROMPT ("-": from standard input)."""
    text = _read_standard_input() if prompt == "-" else prompt
    sampling, call = _sampling(options)
    with Client(address) as client:
        _print_stream(client.generate(text, sampling, call))


@click.command()
@click.argument("message", required=False)
@click.option("--system", help="What the model is told first.")
@sampling_options
@address_option
def chat(message: str | None, system: str | None, address: str, **options: Any) -> None:
    """Chat: answer MESSAGE, or talk until end of input."""
    turns = [("system", system)] if system else []
    sampling, call = _sampling(options)
    with Client(address) as client:
        for said in [message] if message else _typed_lines():
            turns.append(("user", said))
            answer = _print_stream(client.chat(turns, sampling, call))
            turns.append(("assistant", answer.text))


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Everything, for programs.")
@address_option
def stats(as_json: bool, address: str) -> None:
    """What is served, in which formats, and how the cache is used."""
    from google.protobuf.json_format import MessageToJson

    from quire.cluster.cli.stats_text import stats_lines

    with Client(address) as client:
        found = client.stats()
    click.echo(
        MessageToJson(found, preserving_proto_field_name=True) if as_json else "\n".join(stats_lines(found))
    )


@click.command()
@click.option("--once", is_flag=True, help="One look instead of one after the other, for scripts.")
@click.option("--every", default=2.0, show_default=True, help="Seconds between two looks.")
@address_option
def top(once: bool, every: float, address: str) -> None:
    """Replicas, rates, cache and transfers, drawn again and again until interrupted."""
    from quire.cluster.cli.top import top_lines

    if every <= 0:
        raise click.UsageError(f"--every is a positive number of seconds, got {every:g}")
    with Client(address) as client:
        before, asked_s = client.stats(), time.monotonic()
        while True:
            time.sleep(every)
            try:
                now, now_s = client.stats(), time.monotonic()
                text = "\n".join(top_lines(before, now, now_s - asked_s))
                before, asked_s = now, now_s
            except ReplicaDied as error:  # it may come back: look again
                if once:
                    raise
                text = f"no answer: {error}"
            if once:
                click.echo(text)
                return
            click.clear()
            click.echo(text)


def _sampling(options: dict[str, Any]) -> tuple[SamplingParams, CallOptions]:
    sampling = SamplingParams(
        max_tokens=options["max_tokens"],
        temperature=options["temperature"],
        top_p=options["top_p"],
        seed=options["seed"],
        stop=options["stop"],
    )
    return sampling, CallOptions(deadline_s=options["deadline"])


def _read_standard_input() -> str:
    data = sys.stdin.buffer.read()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the prompt from standard input is not UTF-8: {error}") from error


def _typed_lines() -> Iterator[str]:
    """What the user types, line by line, until end of input."""
    click.echo("you> ", nl=False, err=True)
    for line in sys.stdin:
        if said := line.strip():
            yield said
        click.echo("you> ", nl=False, err=True)


def _print_stream(deltas: Iterable[inference_pb2.Delta]) -> Answer:
    answer = Answer()
    for delta in deltas:
        answer.add(delta)
        click.echo(delta.text, nl=False)
    click.echo()
    return answer


COMMANDS = (generate, chat, stats, top)

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
        _print_stream(client.generate(text, sampling, call), sampling)


@click.command()
@click.argument("message", required=False)
@click.option("--system", help="The system message that begins the chat.")
@sampling_options
@address_option
def chat(message: str | None, system: str | None, address: str, **options: Any) -> None:
    """Answer MESSAGE, or every line of standard input as one chat."""
    turns = [{"role": "system", "content": system}] if system else []
    sampling, call = _sampling(options)
    with Client(address) as client:
        for said in [message] if message else _typed_lines():
            turns.append({"role": "user", "content": said})
            answer = _print_stream(client.chat(turns, sampling, call), sampling)
            turns.append({"role": "assistant", "content": answer.text})


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, for programs.")
@address_option
def stats(as_json: bool, address: str) -> None:
    """Show what is served, in which formats, and how the cache is used."""
    from google.protobuf.json_format import MessageToJson

    from quire.cluster.cli.stats_text import stats_lines

    with Client(address) as client:
        found = client.stats()
    click.echo(
        MessageToJson(found, preserving_proto_field_name=True) if as_json else "\n".join(stats_lines(found))
    )


@click.command()
@click.option("--once", is_flag=True, help="Show them once, for scripts.")
@click.option("--every", default=2.0, show_default=True, help="Seconds between updates.")
@address_option
def top(once: bool, every: float, address: str) -> None:
    """Show replicas, rates, cache and transfers, again and again until interrupted."""
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
            except ReplicaDied as error:  # it may come back: ask again
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
    return _decoded(sys.stdin.buffer.read())


def _typed_lines() -> Iterator[str]:
    """Yield the lines of standard input until its end; a person at a terminal is prompted for each."""
    person = sys.stdin.isatty()
    click.echo("you> " if person else "", nl=False, err=True)
    for line in sys.stdin.buffer:
        if said := _decoded(line).strip():
            yield said
        click.echo("you> " if person else "", nl=False, err=True)
    click.echo(err=True, nl=person)


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"standard input is not UTF-8: {error}") from error


def _print_stream(deltas: Iterable[inference_pb2.Delta], sampling: SamplingParams) -> Answer:
    """Print an answer as it arrives. What is printed ends with a newline even if the answer is cut off."""
    answer = Answer()
    try:
        for delta in deltas:
            answer.add(delta)
            click.echo(delta.text, nl=False)
    except ReplicaDied as error:
        if not answer.outputs or sampling.seed is not None or sampling.temperature == 0:
            raise
        raise ReplicaDied(f"{error} (with --seed, an answer that is cut off can be resumed)") from error
    finally:
        if answer.outputs:
            click.echo()
    return answer


COMMANDS = (generate, chat, stats, top)

"""The Python client: `Client`, and `AsyncClient` for event loops.

Errors are the server's own, as `QuireError`s. Needs neither Ray nor torch.

Of several gateways ("a:8100,b:8100") another one is asked when one does not answer. An answer that has begun
is carried on there if its tokens can be drawn again: greedy, or with a seed. Otherwise it ends with
ReplicaDied, whose `retry_s` says when to ask again.

    with Client("127.0.0.1:8100") as client:
        for delta in client.chat([("user", "Hello!")], SamplingParams(max_tokens=64)):
            print(delta.text, end="")
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import grpc

from quire.cluster.api.requests import (
    Asked,
    CallOptions,
    cancel_request,
    chat_request,
    detokenize_request,
    generate_request,
    tokenize_request,
)
from quire.cluster.api.retry import Tries
from quire.cluster.api.status import error_of_rpc
from quire.protos.quire.v1 import inference_pb2, inference_pb2_grpc
from quire.replicas.errors import ConfigError, QuireError, ReplicaDied
from quire.replicas.request import SamplingParams
from quire.replicas.text.prompt import Messages, Prompt

_CHANNEL = (
    ("grpc.max_receive_message_length", 64 << 20),  # a long prompt's logprobs are one message
    ("grpc.keepalive_time_ms", 10_000),  # a gateway whose machine is gone sends no FIN
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),  # however long an answer is quiet
    ("grpc.initial_reconnect_backoff_ms", 200),  # a gateway that is replaced is soon back
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


@dataclass(slots=True)
class OutputText:
    """One of the n outputs, as far as it has come."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[inference_pb2.TokenLogprob] = field(default_factory=list)
    finish_reason: inference_pb2.FinishReason = inference_pb2.FINISH_REASON_UNSPECIFIED


@dataclass(slots=True)
class Answer:
    """All deltas of a request put together."""

    outputs: dict[int, OutputText] = field(default_factory=dict)
    usage: inference_pb2.Usage = field(default_factory=inference_pb2.Usage)
    timings: inference_pb2.Timings = field(default_factory=inference_pb2.Timings)
    prompt_logprobs: list[inference_pb2.TokenLogprob] = field(default_factory=list)
    routing: inference_pb2.Routing | None = None
    """If it was asked for."""

    @property
    def text(self) -> str:
        """The first output's."""
        return self.outputs[0].text

    def add(self, delta: inference_pb2.Delta) -> None:
        output = self.outputs.setdefault(delta.index, OutputText())
        output.text += delta.text
        output.token_ids.extend(delta.token_ids)
        output.logprobs.extend(delta.logprobs)
        self.prompt_logprobs.extend(delta.prompt_logprobs)
        output.finish_reason = delta.finish_reason or output.finish_reason
        if delta.HasField("usage"):
            self.usage, self.timings = delta.usage, delta.timings
            self.routing = delta.routing if delta.HasField("routing") else None


def collect(deltas: Iterable[inference_pb2.Delta]) -> Answer:
    answer = Answer()
    for delta in deltas:
        answer.add(delta)
    return answer


async def collect_async(deltas: AsyncIterable[inference_pb2.Delta]) -> Answer:
    answer = Answer()
    async for delta in deltas:
        answer.add(delta)
    return answer


class Client:
    """Connections to gateways. Every method raises QuireErrors; dropping an iterator ends its request."""

    def __init__(self, address: str = "127.0.0.1:8100", *, patience_s: float = 0.0) -> None:
        """`address` is host:port, or several with commas; nothing is sent before the first call.

        `patience_s`: while no gateway answers, all are asked again for so long.
        """
        self._addresses = addresses(address)
        self._channels = [grpc.insecure_channel(one, options=_CHANNEL) for one in self._addresses]
        self._stubs = [inference_pb2_grpc.InferenceStub(channel) for channel in self._channels]
        self._first, self._patience_s = random.randrange(len(self._stubs)), patience_s

    @property
    def gateway(self) -> str:
        """host:port of the one that is asked before the others."""
        return self._addresses[self._first]

    def generate(
        self, prompt: Prompt, sampling: SamplingParams | None = None, options: CallOptions | None = None
    ) -> Iterator[inference_pb2.Delta]:
        """Continue a text or token ids."""
        options = CallOptions() if options is None else options
        return self._stream("Generate", generate_request(prompt, sampling, options), options)

    def chat(
        self, messages: Messages, sampling: SamplingParams | None = None, options: CallOptions | None = None
    ) -> Iterator[inference_pb2.Delta]:
        """The assistant's next turn."""
        options = CallOptions() if options is None else options
        return self._stream("Chat", chat_request(messages, sampling, options), options)

    def cancel(self, request_id: str) -> bool:
        """Whether such a request was open."""
        request = cancel_request(request_id)
        return any(self._cancel_at(gateway, request) for gateway in range(len(self._stubs)))

    def tokenize(self, text: str = "", *, messages: Messages = ()) -> list[int]:
        """A text's token ids as `generate` would see them, or a chat's as `chat` would."""
        request = tokenize_request(text, messages)
        return list(self._call("Tokenize", request).token_ids)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        request = detokenize_request(token_ids)
        return str(self._call("Detokenize", request).text)

    def model(self) -> inference_pb2.Model:
        model: inference_pb2.Model = self._call("GetModel", inference_pb2.GetModelRequest())
        return model

    def stats(self) -> inference_pb2.Stats:
        stats: inference_pb2.Stats = self._call("GetStats", inference_pb2.GetStatsRequest())
        return stats

    def close(self) -> None:
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, rpc: str, request: object, only: int | None = None) -> Any:
        stubs = self._stubs if only is None else [self._stubs[only]]
        tries = Tries(len(stubs), self._first % len(stubs), patience_s=self._patience_s)
        while True:
            try:
                return getattr(stubs[tries.gateway], rpc)(request)
            except grpc.RpcError as error:
                pause_s = tries.failed(error_of_rpc(error))
            time.sleep(pause_s)

    def _cancel_at(self, gateway: int, request: inference_pb2.CancelRequest) -> bool:
        try:
            return bool(self._call("Cancel", request, gateway).found)
        except ReplicaDied:  # and its requests with it
            if len(self._stubs) == 1:
                raise
            return False

    def _stream(self, rpc: str, request: Asked, options: CallOptions) -> Iterator[inference_pb2.Delta]:
        tries = Tries(
            len(self._stubs),
            self._first,
            patience_s=self._patience_s,
            deadline_s=options.deadline_s,
        )
        while True:
            call = getattr(self._stubs[tries.gateway], rpc)(request, timeout=tries.timeout_s)
            try:
                begun = False
                for delta in call:
                    if not begun:
                        tries.began(dict(call.initial_metadata()))
                        begun = True
                    if (rest := tries.rest(delta)) is not None:
                        yield rest
                return
            except grpc.RpcError as error:
                pause_s = tries.failed(error_of_rpc(error))
                self._first = tries.gateway
            finally:
                call.cancel()  # of no effect once the stream has ended
            time.sleep(pause_s)


class AsyncClient:
    """`Client` for an event loop; make it inside the loop."""

    def __init__(self, address: str = "127.0.0.1:8100", *, patience_s: float = 0.0) -> None:
        """As of `Client`."""
        self._addresses = addresses(address)
        self._channels = [grpc.aio.insecure_channel(one, options=_CHANNEL) for one in self._addresses]
        self._stubs = [inference_pb2_grpc.InferenceStub(channel) for channel in self._channels]
        self._first, self._patience_s = random.randrange(len(self._stubs)), patience_s

    @property
    def gateway(self) -> str:
        """host:port of the one that is asked before the others."""
        return self._addresses[self._first]

    def generate(
        self, prompt: Prompt, sampling: SamplingParams | None = None, options: CallOptions | None = None
    ) -> AsyncIterator[inference_pb2.Delta]:
        """Continue a text or token ids."""
        options = CallOptions() if options is None else options
        return self._stream("Generate", generate_request(prompt, sampling, options), options)

    def chat(
        self, messages: Messages, sampling: SamplingParams | None = None, options: CallOptions | None = None
    ) -> AsyncIterator[inference_pb2.Delta]:
        """The assistant's next turn."""
        options = CallOptions() if options is None else options
        return self._stream("Chat", chat_request(messages, sampling, options), options)

    async def cancel(self, request_id: str) -> bool:
        """Whether such a request was open on this gateway."""
        request = cancel_request(request_id)
        return any([await self._cancel_at(gateway, request) for gateway in range(len(self._stubs))])

    async def tokenize(self, text: str = "", *, messages: Messages = ()) -> list[int]:
        """A text's token ids as `generate` would see them, or a chat's as `chat` would."""
        request = tokenize_request(text, messages)
        return list((await self._call("Tokenize", request)).token_ids)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        request = detokenize_request(token_ids)
        return str((await self._call("Detokenize", request)).text)

    async def model(self) -> inference_pb2.Model:
        model: inference_pb2.Model = await self._call("GetModel", inference_pb2.GetModelRequest())
        return model

    async def stats(self) -> inference_pb2.Stats:
        stats: inference_pb2.Stats = await self._call("GetStats", inference_pb2.GetStatsRequest())
        return stats

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, rpc: str, request: object, only: int | None = None) -> Any:
        stubs = self._stubs if only is None else [self._stubs[only]]
        tries = Tries(len(stubs), self._first % len(stubs), patience_s=self._patience_s)
        while True:
            try:
                return await getattr(stubs[tries.gateway], rpc)(request)
            except grpc.aio.AioRpcError as error:
                pause_s = tries.failed(error_of_rpc(error))
            await asyncio.sleep(pause_s)

    async def _cancel_at(self, gateway: int, request: inference_pb2.CancelRequest) -> bool:
        try:
            return bool((await self._call("Cancel", request, gateway)).found)
        except ReplicaDied:  # and its requests with it
            if len(self._stubs) == 1:
                raise
            return False

    async def _stream(
        self, rpc: str, request: Asked, options: CallOptions
    ) -> AsyncIterator[inference_pb2.Delta]:
        tries = Tries(
            len(self._stubs),
            self._first,
            patience_s=self._patience_s,
            deadline_s=options.deadline_s,
        )
        while True:
            call = getattr(self._stubs[tries.gateway], rpc)(request, timeout=tries.timeout_s)
            try:
                begun = False
                async for delta in call:
                    if not begun:
                        tries.began(dict(await call.initial_metadata()))
                        begun = True
                    if (rest := tries.rest(delta)) is not None:
                        yield rest
                return
            except grpc.aio.AioRpcError as error:
                pause_s = tries.failed(error_of_rpc(error))
                self._first = tries.gateway
            finally:
                call.cancel()  # of no effect once the stream has ended
            await asyncio.sleep(pause_s)


def addresses(text: str) -> list[str]:
    """Of gateways: host:port, or several with commas. Raises ConfigError if there is none."""
    found = [one.strip() for one in text.split(",") if one.strip()]
    if not found:
        raise ConfigError("no gateway's address was given; host:port is one, such as 127.0.0.1:8100")
    return found


__all__ = [
    "Answer",
    "AsyncClient",
    "CallOptions",
    "Client",
    "OutputText",
    "QuireError",
    "SamplingParams",
    "chat_request",
    "collect",
    "collect_async",
    "generate_request",
]

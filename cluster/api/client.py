"""The Python client: `AsyncClient` for event loops, and `Client`, the same for threads that may block.

Errors are those of the server, as `QuireError`s. If there are several gateways ("a:8100,b:8100") and one does
not answer, the next one is asked. An answer that has begun is resumed there if its tokens can be drawn again:
greedy, or with a seed. Otherwise it ends with `ReplicaDied`, whose `retry_s` says when to ask again.

    with Client("127.0.0.1:8100") as client:
        for delta in client.chat([{"role": "user", "content": "Hello!"}], SamplingParams(max_tokens=64)):
            print(delta.text, end="")
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Iterator, Sequence
from types import TracebackType
from typing import Any

import grpc

from quire.cluster.api.calls import BlockingCalls, Calls, iterate, run
from quire.cluster.api.requests import (
    CallOptions,
    StreamRequest,
    cancel_request,
    chat_request,
    detokenize_request,
    generate_request,
    tokenize_request,
)
from quire.cluster.api.retry import Attempts
from quire.cluster.api.status import error_of_rpc
from quire.protos.quire.v1 import inference_pb2, inference_pb2_grpc
from quire.replicas.errors import ConfigError, ReplicaDied
from quire.replicas.request import SamplingParams
from quire.replicas.text.prompt import Messages, Prompt

DEFAULT_ADDRESS = "127.0.0.1:8100"
Deltas = AsyncGenerator[inference_pb2.Delta, None]


class AsyncClient:
    """Connections to one or more gateways, for the event loop that it is made in.

    Every method raises QuireErrors. Closing a stream, or cancelling the task that reads it, ends its request.
    """

    _calls = Calls()

    def __init__(self, address: str = DEFAULT_ADDRESS, *, retry_for_s: float = 0.0) -> None:
        """`address` is host:port, or several with commas; nothing is sent before the first call.

        While no gateway answers, all of them are asked again for up to `retry_for_s` seconds.
        """
        self._addresses = _addresses(address)
        self._channels = [self._calls.channel(one) for one in self._addresses]
        self._stubs = [inference_pb2_grpc.InferenceStub(channel) for channel in self._channels]
        self._first, self._retry_for_s = random.randrange(len(self._stubs)), retry_for_s

    @property
    def gateway(self) -> str:
        """The host:port of the gateway that is asked before the others."""
        return self._addresses[self._first]

    def generate(
        self, prompt: Prompt, sampling: SamplingParams | None = None, options: CallOptions | None = None
    ) -> Deltas:
        """Continue a text or token ids, and stream the output."""
        options = CallOptions() if options is None else options
        return self._stream("Generate", generate_request(prompt, sampling, options), options)

    def chat(
        self, messages: Messages, sampling: SamplingParams | None = None, options: CallOptions | None = None
    ) -> Deltas:
        """Stream the assistant's next turn of a chat."""
        options = CallOptions() if options is None else options
        return self._stream("Chat", chat_request(messages, sampling, options), options)

    async def cancel(self, request_id: str) -> bool:
        """End the open request with this id, at whichever gateway; return whether there was one."""
        request = cancel_request(request_id)
        return any([await self._cancel_at(gateway, request) for gateway in range(len(self._stubs))])

    async def tokenize(self, text: str = "", *, messages: Messages = ()) -> list[int]:
        """Return the token ids of a text as `generate` would see them, or of a chat as `chat` would."""
        return list((await self._call("Tokenize", tokenize_request(text, messages))).token_ids)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return str((await self._call("Detokenize", detokenize_request(token_ids))).text)

    async def model(self) -> inference_pb2.Model:
        """Return what is served: the model, its limits, its KV formats and its sampling defaults."""
        model: inference_pb2.Model = await self._call("GetModel", inference_pb2.GetModelRequest())
        return model

    async def stats(self) -> inference_pb2.Stats:
        """Return counters and gauges of the gateway and of every replica that it is connected to."""
        stats: inference_pb2.Stats = await self._call("GetStats", inference_pb2.GetStatsRequest())
        return stats

    async def close(self) -> None:
        """Close all connections; requests that are still open end."""
        for channel in self._channels:
            await self._calls.result(channel.close())

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, rpc: str, request: object, only: int | None = None) -> Any:
        stubs = self._stubs if only is None else [self._stubs[only]]
        attempts = Attempts(len(stubs), self._first % len(stubs), retry_for_s=self._retry_for_s)
        while True:
            try:
                return await self._calls.result(getattr(stubs[attempts.gateway], rpc)(request))
            except grpc.RpcError as error:
                failure = error_of_rpc(error)
            await self._calls.sleep(attempts.failed(failure))

    async def _cancel_at(self, gateway: int, request: inference_pb2.CancelRequest) -> bool:
        try:
            return bool((await self._call("Cancel", request, gateway)).found)
        except ReplicaDied:  # and its requests with it
            if len(self._stubs) == 1:
                raise
            return False

    async def _stream(self, rpc: str, request: StreamRequest, options: CallOptions) -> Deltas:
        attempts = Attempts(
            len(self._stubs), self._first, retry_for_s=self._retry_for_s, deadline_s=options.deadline_s
        )
        while True:
            call = getattr(self._stubs[attempts.gateway], rpc)(request, timeout=attempts.timeout_s)
            try:
                begun = False
                async for delta in self._calls.items(call):
                    if not begun:
                        attempts.began(dict(await self._calls.result(call.initial_metadata())))
                        begun = True
                    if (rest := attempts.rest(delta)) is not None:
                        yield rest
                return
            except grpc.RpcError as error:
                failure = error_of_rpc(error)
            finally:
                call.cancel()  # has no effect once the stream has ended
            pause_s = attempts.failed(failure)
            self._first = attempts.gateway
            await self._calls.sleep(pause_s)


class _BlockingClient(AsyncClient):
    """An `AsyncClient` whose coroutines block instead of suspending."""

    _calls = BlockingCalls()


class Client:
    """An `AsyncClient` whose methods block. Threads may share one. Dropping an iterator ends its request."""

    def __init__(self, address: str = DEFAULT_ADDRESS, *, retry_for_s: float = 0.0) -> None:
        """Take the arguments of `AsyncClient`."""
        self._client = _BlockingClient(address, retry_for_s=retry_for_s)

    @property
    def gateway(self) -> str:
        """The host:port of the gateway that is asked before the others."""
        return self._client.gateway

    def generate(
        self, prompt: Prompt, sampling: SamplingParams | None = None, options: CallOptions | None = None
    ) -> Iterator[inference_pb2.Delta]:
        """Continue a text or token ids, and iterate over the output."""
        return iterate(self._client.generate(prompt, sampling, options))

    def chat(
        self, messages: Messages, sampling: SamplingParams | None = None, options: CallOptions | None = None
    ) -> Iterator[inference_pb2.Delta]:
        """Iterate over the assistant's next turn of a chat."""
        return iterate(self._client.chat(messages, sampling, options))

    def cancel(self, request_id: str) -> bool:
        """End the open request with this id, at whichever gateway; return whether there was one."""
        return run(self._client.cancel(request_id))

    def tokenize(self, text: str = "", *, messages: Messages = ()) -> list[int]:
        """Return the token ids of a text as `generate` would see them, or of a chat as `chat` would."""
        return run(self._client.tokenize(text, messages=messages))

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return run(self._client.detokenize(token_ids))

    def model(self) -> inference_pb2.Model:
        """Return what is served: the model, its limits, its KV formats and its sampling defaults."""
        return run(self._client.model())

    def stats(self) -> inference_pb2.Stats:
        """Return counters and gauges of the gateway and of every replica that it is connected to."""
        return run(self._client.stats())

    def close(self) -> None:
        """Close all connections; requests that are still open end."""
        run(self._client.close())

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _addresses(text: str) -> list[str]:
    """Split the addresses of gateways at their commas. Raises ConfigError if there is none."""
    found = [one.strip() for one in text.split(",") if one.strip()]
    if not found:
        raise ConfigError("no gateway's address was given; host:port is one, such as 127.0.0.1:8100")
    return found

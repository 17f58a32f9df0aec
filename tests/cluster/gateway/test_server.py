"""The gateway's listener: who may ping it how often, and what it says of messages that are too large."""

import asyncio

import grpc
import pytest
from serving import ScriptedEngine, staged

from quire.cluster import AsyncClient, collect_async
from quire.protos.quire.v1 import inference_pb2, inference_pb2_grpc
from quire.replicas.errors import InvalidRequest

PINGING = (
    ("grpc.keepalive_time_ms", 100),  # gRPC makes it once a second
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),
)
FIVE_PINGS_S = 5.5
"""gRPC ends a connection at the fourth ping that came too early."""


async def test_clients_that_ping_a_quiet_channel_every_second_keep_it():
    """With a call open and without one."""
    engine = ScriptedEngine()
    async with (
        staged(engine) as stage,
        grpc.aio.insecure_channel(stage.address, options=PINGING) as calling,
        grpc.aio.insecure_channel(stage.address, options=PINGING) as idle,
    ):
        request = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[5, 6]))
        call = inference_pb2_grpc.InferenceStub(calling).Generate(request)
        taken = await engine.requests.get()
        await inference_pb2_grpc.InferenceStub(idle).GetModel(inference_pb2.GetModelRequest())
        closed = [asyncio.ensure_future(_closed(channel)) for channel in (calling, idle)]
        done, _ = await asyncio.wait(closed, timeout=FIVE_PINGS_S, return_when=asyncio.FIRST_COMPLETED)
        assert not done
        engine.say(taken, "still here", 7, last=True)
        assert (await call.read()).text == "still here"
        for waiting in closed:
            waiting.cancel()


async def _closed(channel: grpc.aio.Channel) -> None:
    """Back once a channel that is ready no longer is."""
    while (state := channel.get_state()) is not grpc.ChannelConnectivity.READY:
        await channel.wait_for_state_change(state)
    await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)


async def test_a_message_that_is_too_large_is_no_reason_to_come_back_later():
    async with staged(ScriptedEngine()) as stage, AsyncClient(stage.address) as client:
        with pytest.raises(InvalidRequest, match=r"has 1700\d+ bytes.*gateway\.max_message_bytes"):
            await collect_async(client.generate("x" * 17_000_000))
        with pytest.raises(InvalidRequest, match=r"gateway\.max_message_bytes"):
            await client.tokenize("x" * 17_000_000)

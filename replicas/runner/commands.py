"""What rank 0 tells the other ranks between steps, what each of them says of its start, and their bytes."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from quire.kvstore.books.host_tier import Copies
from quire.kvstore.peers.messages import CompletePages, Order
from quire.kvstore.wire.transport import Endpoint
from quire.replicas.errors import QuireError
from quire.replicas.step_batch import StepBatch


class Idle(Struct, frozen=True, tag=True):
    """Rank 0 lives and asks whether the other ranks do."""


class Stop(Struct, frozen=True, tag=True):
    """The replica is closed."""


class Demote(Struct, frozen=True, tag=True):
    """Copy pages of the pool to host memory."""

    copies: Copies


class Promote(Struct, frozen=True, tag=True):
    """Copy pages from host memory to the pool."""

    copies: Copies


class NumberedOrder(Struct, frozen=True, tag=True):
    """An order of the store under a number of rank 0: transfer ids are unique per receiver only."""

    number: int
    order: Order

    def after(self, waited_s: float) -> NumberedOrder:
        """The same order with the time left to it after waiting for a step."""
        left_s = max(self.order.timeout_s - waited_s, 0.0)
        return NumberedOrder(self.number, msgspec.structs.replace(self.order, timeout_s=left_s))


class MeasureKeys(Struct, frozen=True, tag=True):
    """Sum up the moments of a text's keys: `Shard.key_moments`."""

    token_ids: tuple[int, ...]


Command = Idle | StepBatch | Stop | NumberedOrder | Demote | Promote | CompletePages | MeasureKeys


class Loaded(Struct, frozen=True):
    """How loading ended on one rank."""

    pages: int = 0
    slots: int = 0
    """Slots of the host tier."""
    endpoint: Endpoint | None = None
    """None without links."""
    error: str = ""
    """Name of a QuireError, or empty."""
    text: str = ""

    def check(self) -> Loaded:
        """Return itself, or raise the error that loading ended with."""
        if self.error:
            raise next(c for c in QuireError.__subclasses__() if c.__name__ == self.error)(self.text)
        return self


def encode_command(command: Command) -> bytes:
    """Encode a command as MessagePack; arrays as their shape and little-endian int64."""
    return _ENCODER.encode(command)


def decode_command(data: bytes) -> Command:
    """Decode what `encode_command` wrote."""
    command: Command = _DECODER.decode(data)
    return command


def _encode_array(array: Any) -> tuple[tuple[int, ...], bytes]:
    return array.shape, np.ascontiguousarray(array, dtype="<i8").tobytes()


def _decode_array(_: type, encoded: Any) -> Any:
    shape, data = encoded
    return np.frombuffer(data, dtype="<i8").reshape(shape)


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_encode_array)
_DECODER = msgspec.msgpack.Decoder(Command, dec_hook=_decode_array)

from quire.protos.quire.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PeerMessage(_message.Message):
    __slots__ = ("to", "sender", "message")
    TO_FIELD_NUMBER: _ClassVar[int]
    SENDER_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    to: str
    sender: str
    message: bytes
    def __init__(self, to: _Optional[str] = ..., sender: _Optional[str] = ..., message: _Optional[bytes] = ...) -> None: ...

class PeerHeard(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GatewayMessage(_message.Message):
    __slots__ = ("submit", "cancel", "stats")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    submit: Submit
    cancel: CancelCall
    stats: StatsQuery
    def __init__(self, submit: _Optional[_Union[Submit, _Mapping]] = ..., cancel: _Optional[_Union[CancelCall, _Mapping]] = ..., stats: _Optional[_Union[StatsQuery, _Mapping]] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("call", "token_ids", "sampling", "priority", "tenant", "remaining_s", "computed_by")
    CALL_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    REMAINING_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_BY_FIELD_NUMBER: _ClassVar[int]
    call: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _inference_pb2.Sampling
    priority: int
    tenant: str
    remaining_s: float
    computed_by: str
    def __init__(self, call: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_inference_pb2.Sampling, _Mapping]] = ..., priority: _Optional[int] = ..., tenant: _Optional[str] = ..., remaining_s: _Optional[float] = ..., computed_by: _Optional[str] = ...) -> None: ...

class CancelCall(_message.Message):
    __slots__ = ("call",)
    CALL_FIELD_NUMBER: _ClassVar[int]
    call: int
    def __init__(self, call: _Optional[int] = ...) -> None: ...

class StatsQuery(_message.Message):
    __slots__ = ("query",)
    QUERY_FIELD_NUMBER: _ClassVar[int]
    query: int
    def __init__(self, query: _Optional[int] = ...) -> None: ...

class ReplicaMessage(_message.Message):
    __slots__ = ("hello", "step", "stats")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    step: Step
    stats: StatsAnswer
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., stats: _Optional[_Union[StatsAnswer, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("model", "replica_id", "peer_id")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    model: _inference_pb2.Model
    replica_id: str
    peer_id: str
    def __init__(self, model: _Optional[_Union[_inference_pb2.Model, _Mapping]] = ..., replica_id: _Optional[str] = ..., peer_id: _Optional[str] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("events",)
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[Event]
    def __init__(self, events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("call", "delta", "failure")
    CALL_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    call: int
    delta: _inference_pb2.Delta
    failure: Failure
    def __init__(self, call: _Optional[int] = ..., delta: _Optional[_Union[_inference_pb2.Delta, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("status", "message")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    status: str
    message: str
    def __init__(self, status: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class StatsAnswer(_message.Message):
    __slots__ = ("query", "stats")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    query: int
    stats: _inference_pb2.ReplicaStats
    def __init__(self, query: _Optional[int] = ..., stats: _Optional[_Union[_inference_pb2.ReplicaStats, _Mapping]] = ...) -> None: ...

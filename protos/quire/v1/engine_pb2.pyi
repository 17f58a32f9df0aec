from quire.protos.quire.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TokenizerQuery(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TokenizerFiles(_message.Message):
    __slots__ = ("files",)
    class FilesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    FILES_FIELD_NUMBER: _ClassVar[int]
    files: _containers.ScalarMap[str, bytes]
    def __init__(self, files: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class PeerMessage(_message.Message):
    __slots__ = ("to", "sender", "message")
    TO_FIELD_NUMBER: _ClassVar[int]
    SENDER_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    to: str
    sender: str
    message: bytes
    def __init__(self, to: _Optional[str] = ..., sender: _Optional[str] = ..., message: _Optional[bytes] = ...) -> None: ...

class PeerAck(_message.Message):
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
    __slots__ = ("hello", "step", "stats", "load", "draining")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    step: Step
    stats: StatsAnswer
    load: Load
    draining: Draining
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., stats: _Optional[_Union[StatsAnswer, _Mapping]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., draining: _Optional[_Union[Draining, _Mapping]] = ...) -> None: ...

class Draining(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Hello(_message.Message):
    __slots__ = ("model", "replica_id", "peer_id", "keys", "tokenizer")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    model: _inference_pb2.Model
    replica_id: str
    peer_id: str
    keys: KeySpace
    tokenizer: bytes
    def __init__(self, model: _Optional[_Union[_inference_pb2.Model, _Mapping]] = ..., replica_id: _Optional[str] = ..., peer_id: _Optional[str] = ..., keys: _Optional[_Union[KeySpace, _Mapping]] = ..., tokenizer: _Optional[bytes] = ...) -> None: ...

class KeySpace(_message.Message):
    __slots__ = ("layout", "weights", "transforms")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    TRANSFORMS_FIELD_NUMBER: _ClassVar[int]
    layout: bytes
    weights: bytes
    transforms: bytes
    def __init__(self, layout: _Optional[bytes] = ..., weights: _Optional[bytes] = ..., transforms: _Optional[bytes] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("seen_call", "queued_tokens", "running", "waiting", "max_running", "pages_total", "pages_free", "pages_cached", "host_slots", "prefill_s_per_token", "prefill_s_per_token_before", "step_s", "hold_s", "fetch_s", "fetch_s_per_token")
    SEEN_CALL_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_FIELD_NUMBER: _ClassVar[int]
    PAGES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PAGES_FREE_FIELD_NUMBER: _ClassVar[int]
    PAGES_CACHED_FIELD_NUMBER: _ClassVar[int]
    HOST_SLOTS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_PER_TOKEN_BEFORE_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    HOLD_S_FIELD_NUMBER: _ClassVar[int]
    FETCH_S_FIELD_NUMBER: _ClassVar[int]
    FETCH_S_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    seen_call: int
    queued_tokens: int
    running: int
    waiting: int
    max_running: int
    pages_total: int
    pages_free: int
    pages_cached: int
    host_slots: int
    prefill_s_per_token: float
    prefill_s_per_token_before: float
    step_s: float
    hold_s: float
    fetch_s: float
    fetch_s_per_token: float
    def __init__(self, seen_call: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., max_running: _Optional[int] = ..., pages_total: _Optional[int] = ..., pages_free: _Optional[int] = ..., pages_cached: _Optional[int] = ..., host_slots: _Optional[int] = ..., prefill_s_per_token: _Optional[float] = ..., prefill_s_per_token_before: _Optional[float] = ..., step_s: _Optional[float] = ..., hold_s: _Optional[float] = ..., fetch_s: _Optional[float] = ..., fetch_s_per_token: _Optional[float] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("events", "load")
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[Event]
    load: Load
    def __init__(self, events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ..., load: _Optional[_Union[Load, _Mapping]] = ...) -> None: ...

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
    __slots__ = ("status", "message", "begun")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    BEGUN_FIELD_NUMBER: _ClassVar[int]
    status: str
    message: str
    begun: bool
    def __init__(self, status: _Optional[str] = ..., message: _Optional[str] = ..., begun: _Optional[bool] = ...) -> None: ...

class StatsAnswer(_message.Message):
    __slots__ = ("query", "stats")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    query: int
    stats: _inference_pb2.ReplicaStats
    def __init__(self, query: _Optional[int] = ..., stats: _Optional[_Union[_inference_pb2.ReplicaStats, _Mapping]] = ...) -> None: ...

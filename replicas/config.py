"""The engine's configuration: one frozen tree, checked once, never written back.

Knows nothing of clusters; `cluster/config.py` holds this tree as one of its branches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta

from quire.kernels.layout import PAGE_TOKENS
from quire.replicas.config_decoder import Count, NotNegative, Positive
from quire.replicas.errors import ConfigError

MAX_THREADS = 1024
"""More than any machine has cores; OpenMP ends a process that cannot have as many threads as it is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """The pages of one shard's pool."""

    bytes: Count | None = None
    """Bytes of memory for KV pages per shard; None: 256 MiB on a CPU, `memory_fraction` of what is free on
    a GPU once the weights are loaded and the largest step has had its workspace."""
    memory_fraction: Annotated[float, Meta(gt=0, le=1)] = 0.95
    page_tokens: int = 64
    """Tokens per page: 16, 32 or 64."""
    host_bytes: Annotated[int, Meta(ge=0)] = 0
    """Bytes of host memory per shard for blocks that are evicted from the pool; 0: none."""

    def __post_init__(self) -> None:
        if self.page_tokens not in PAGE_TOKENS:
            raise ConfigError(f"pool.page_tokens is one of {PAGE_TOKENS}, got {self.page_tokens}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """What one step may hold, and how many requests may wait."""

    max_running: Count = 64
    """How many sequences may hold pages at once."""
    max_step_tokens: Count | None = None
    """Token budget of a step: decoding sequences first, then chunks of prompts; None: 512 on a CPU, 8192 on
    a GPU."""
    max_queued: Count = 256
    """How many requests may wait; one more is refused with RESOURCE_EXHAUSTED."""

    def __post_init__(self) -> None:
        if self.max_step_tokens is not None and self.max_step_tokens < self.max_running:
            raise ConfigError(
                f"scheduler.max_step_tokens ({self.max_step_tokens}) must be at least "
                f"scheduler.max_running ({self.max_running}), or decoding sequences would starve"
            )

    def step_tokens(self, device: str) -> int:
        """The token budget of a step on a "cpu" or "cuda" device."""
        default = 8192 if device == "cuda" else 512
        return max(self.max_step_tokens or default, self.max_running)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuConfig:
    """How a step runs on a GPU. Both options take time at start and save it in every step."""

    compile: bool = True
    """Compile the model with torch.compile; its kernels are kept on disk for the next start."""
    graphs: bool = True
    """Capture steps that only decode in CUDA graphs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """How replicas of one deployment share blocks. Offline batches share nothing."""

    share: bool = True
    """Fetch blocks that another replica holds, where that is faster than computing them, and lend its own."""
    min_fetch_blocks: Count = 2
    """Fewer missing blocks than this are computed without a lookup."""
    lookup_timeout_s: Positive = 0.25
    """How long a prompt waits for the directory; then it is computed."""
    fetch_timeout_s: Positive = 5.0
    """A fetch that takes longer is given up, and the blocks are computed."""
    max_send_bytes_s: Positive | None = None
    """Bytes a second that one shard sends to others at most; None: no limit."""
    hand_over_s: NotNegative = 5.0
    """How long a replica that is scaled in offers its hottest blocks to the others at most; 0: it stops at
    once."""
    directory_entries: Count = 2_000_000
    """Blocks that the deployment's directory remembers at most, about 88 bytes each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The configuration of one replica: a model, its shards, their pools and the scheduler."""

    model: str
    """A local folder with config.json and *.safetensors, a Hugging Face hub id, or "demo"."""
    weights: Literal["checkpoint", "random"] = "checkpoint"
    """random: the folder needs no more than config.json; for timing, the answers mean nothing."""
    name: str | None = None
    """What requests may call the model, through all its versions. None: as `model`."""
    revision: str = ""
    """Not used by the engine: a deployment with another revision replaces its replicas, for instance because
    the files in the model's folder were replaced."""
    kv: str | Mapping[str, object] = "int8"
    """KV policy: a format's name, a mapping of layers (`kernels/formats.py`), or the path of a policy:
    a folder or JSON file (`replicas/model/policy.py`)."""
    tp: Count = 1
    """Tensor-parallel shards."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and arithmetic; auto: float32 on a CPU, the checkpoint's own on a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_model_tokens: Annotated[int, Meta(ge=2)] | None = None
    """Prompt and output of one sequence together; None: what the model's config allows."""
    generation_defaults: Literal["model", "none"] = "model"
    """Where a request does not set temperature, top_k, top_p, min_p or repetition_penalty: what the
    generation_config.json of the model says, or none of it, which is greedy."""
    shard_timeout_s: Positive = 10.0
    """A shard that does not answer a step for this long is considered dead."""
    threads_per_shard: Annotated[int, Meta(ge=1, le=MAX_THREADS)] | None = None
    """CPU threads of one shard; None: the machine's cores divided by tp."""
    gpu: GpuConfig = field(default_factory=GpuConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    store: StoreConfig = field(default_factory=StoreConfig)

    def __post_init__(self) -> None:
        if self.model == "":
            raise ConfigError('model is empty; give a folder, a Hugging Face hub id or "demo"')

"""The engine's configuration: one frozen tree, checked once, never written back.

Knows nothing of clusters; `cluster/config.py` holds this tree as one of its branches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from quire.kernels.layout import PAGE_TOKENS
from quire.replicas.config_types import check_types
from quire.replicas.errors import ConfigError

MAX_THREADS = 1024
"""More than any machine has cores; OpenMP ends a process that cannot have as many threads as it is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """The pages of one shard."""

    bytes: int | None = None
    """Bytes of memory for KV pages per shard; None: 256 MiB on a CPU, `memory_fraction` of what is free on
    a GPU once the weights are loaded and the largest step has had its workspace."""
    memory_fraction: float = 0.95
    page_tokens: int = 64
    """Tokens per page: 16, 32 or 64."""
    host_bytes: int = 0
    """Bytes of host memory per shard for blocks that make room in the pool; 0: none."""

    def __post_init__(self) -> None:
        check_types(self, "pool.")
        if self.page_tokens not in PAGE_TOKENS:
            raise ConfigError(f"pool.page_tokens is one of {PAGE_TOKENS}, got {self.page_tokens}")
        if self.bytes is not None and self.bytes <= 0:
            raise ConfigError(f"pool.bytes is a positive number of bytes, got {self.bytes}")
        if not 0 < self.memory_fraction <= 1:
            raise ConfigError(f"pool.memory_fraction lies in (0, 1], got {self.memory_fraction}")
        if self.host_bytes < 0:
            raise ConfigError(f"pool.host_bytes is a number of bytes, 0 for none, got {self.host_bytes}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """What one step may hold, and how many may wait."""

    max_running: int = 64
    """Sequences that may hold pages at once."""
    max_step_tokens: int | None = None
    """Token budget of a step: decoding sequences first, then chunks of prompts; None: 512 on a CPU, 8192 on
    a GPU."""
    max_queued: int = 256
    """Requests that may wait; one more is refused with RESOURCE_EXHAUSTED."""

    def __post_init__(self) -> None:
        check_types(self, "scheduler.")
        for name in ("max_running", "max_step_tokens", "max_queued"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ConfigError(f"scheduler.{name} must be at least 1, got {number}")
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
    """How a step runs on a GPU. Both take time at start and save it in every step."""

    compile: bool = True
    """Compile the model with torch.compile; its kernels are kept on disk for the next start."""
    graphs: bool = True
    """Capture steps that only decode in CUDA graphs."""

    def __post_init__(self) -> None:
        check_types(self, "gpu.")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """How replicas of one deployment share blocks. Offline batches share nothing."""

    share: bool = True
    """Fetch blocks that another replica holds, where that is sooner than computing them, and lend one's."""
    min_fetch_blocks: int = 2
    """Fewer missing blocks are computed without asking anybody."""
    lookup_timeout_s: float = 0.25
    """A prompt waits so long for the directory; then it is computed."""
    fetch_timeout_s: float = 5.0
    """A fetch that takes longer is given up, and the blocks are computed."""
    max_send_bytes_s: float | None = None
    """Bytes a second that one shard sends to others at most; None: no bound."""
    hand_over_s: float = 5.0
    """A replica that is scaled in offers its hottest blocks to the others for so long at most; 0: it goes at
    once."""
    directory_entries: int = 2_000_000
    """Blocks that the deployment's directory remembers at most, about 88 bytes each."""

    def __post_init__(self) -> None:
        check_types(self, "store.")
        for name in ("min_fetch_blocks", "directory_entries"):
            if getattr(self, name) < 1:
                raise ConfigError(f"store.{name} must be at least 1, got {getattr(self, name)}")
        if self.hand_over_s < 0:
            raise ConfigError(f"store.hand_over_s is 0 or more, got {self.hand_over_s}")
        for name in ("lookup_timeout_s", "fetch_timeout_s", "max_send_bytes_s"):
            number = getattr(self, name)
            if number is not None and number <= 0:
                raise ConfigError(f"store.{name} must be positive, got {number}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One replica: a model, its shards, their pools and the scheduler."""

    model: str
    """A local folder with config.json and *.safetensors, a Hugging Face hub id, or "demo"."""
    weights: Literal["checkpoint", "random"] = "checkpoint"
    """random: the folder needs no more than config.json; for timing, the answers mean nothing."""
    name: str | None = None
    """What requests may call the model, through all its versions. None: as `model`."""
    revision: str = ""
    """Means nothing to the engine: a deployment with another one replaces its replicas, for instance because
    the files in the model's folder were replaced."""
    kv: str | Mapping[str, object] = "int8"
    """KV policy: a format's name, k8v4, or a mapping as in a policy file (`kernels/formats.py`)."""
    tp: int = 1
    """Tensor-parallel shards."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and arithmetic; auto: float32 on a CPU, the checkpoint's own on a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_model_tokens: int | None = None
    """Prompt and output of one sequence together; None: what the model's config allows."""
    generation_defaults: Literal["model", "none"] = "model"
    """Where a request says nothing of temperature, top_k, top_p, min_p or repetition_penalty: what the
    generation_config.json of the model says, or none of it, which is greedy."""
    shard_timeout_s: float = 10.0
    """A shard that does not answer a step for so long is taken for dead."""
    threads_per_shard: int | None = None
    """CPU threads of one shard; None: the machine's cores divided by tp."""
    gpu: GpuConfig = field(default_factory=GpuConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    store: StoreConfig = field(default_factory=StoreConfig)

    def __post_init__(self) -> None:
        check_types(self)
        if self.tp < 1:
            raise ConfigError(f"tp is the number of shards, at least 1, got {self.tp}")
        if self.shard_timeout_s <= 0:
            raise ConfigError(f"shard_timeout_s must be positive, got {self.shard_timeout_s}")
        if not self.model:
            raise ConfigError('model is empty; give a folder, a Hugging Face hub id or "demo"')
        if self.max_model_tokens is not None and self.max_model_tokens < 2:
            raise ConfigError(
                f"max_model_tokens is a prompt and an output, at least 2, got {self.max_model_tokens}"
            )
        if self.threads_per_shard is not None and not 1 <= self.threads_per_shard <= MAX_THREADS:
            raise ConfigError(
                f"threads_per_shard lies in 1..{MAX_THREADS}, got {self.threads_per_shard}; null: the "
                "machine's cores divided by tp"
            )

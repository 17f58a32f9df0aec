"""What options of vLLM's `LLM` mean here: the same, or nothing, or an option of ours that the error names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.replicas.errors import ConfigError

_SAME = {"tensor_parallel_size": "tp", "max_model_len": "max_model_tokens"}
_ALWAYS_ON = ("enable_prefix_caching", "enable_chunked_prefill")
_OURS = {
    "kv_cache_dtype": 'kv="fp8", or another format',
    "gpu_memory_utilization": "pool=PoolConfig(memory_fraction=...), a share of what the weights leave free",
    "kv_cache_memory_bytes": "pool=PoolConfig(bytes=...)",
    "block_size": "pool=PoolConfig(page_tokens=...)",
    "swap_space": "pool=PoolConfig(host_bytes=...)",
    "max_num_seqs": "scheduler=SchedulerConfig(max_running=...)",
    "max_num_batched_tokens": "scheduler=SchedulerConfig(max_step_tokens=...)",
    "enforce_eager": "gpu=GpuConfig(compile=False, graphs=False)",
    "load_format": 'weights="random" for weights that are not read',
    "generation_config": 'generation_defaults="none" instead of "vllm"',
    "seed": "SamplingParams(seed=...)",
}


def from_vllm(options: Mapping[str, object]) -> dict[str, Any]:
    """Our names and values for options of vLLM. Raises ConfigError for those that mean nothing here."""
    ours = {}
    for name, value in options.items():
        if name in _SAME:
            ours[_SAME[name]] = value
        elif name in _ALWAYS_ON:
            if value is False:
                raise ConfigError(
                    f"{name} is always on: a cache hit gives the same logits as a computed prompt"
                )
        elif name in _OURS:
            raise ConfigError(f"LLM has no option {name}; use {_OURS[name]}")
        else:
            raise ConfigError(f"LLM has no option {name}; `help(quire.replicas.LLM)` lists them")
    return ours

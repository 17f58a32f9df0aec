"""The engine. Runs without Ray; `deployment.py` runs it on a cluster.

Public names are imported on first use, so that clients, which only need `errors` or `request`, do not wait
for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.replicas.config import EngineConfig, GpuConfig, PoolConfig, SchedulerConfig
    from quire.replicas.llm import LLM, Completion, PromptsFailed
    from quire.replicas.request import SamplingParams

__all__ = [
    "LLM",
    "Completion",
    "EngineConfig",
    "GpuConfig",
    "PoolConfig",
    "PromptsFailed",
    "SamplingParams",
    "SchedulerConfig",
]

_HOMES = {
    "LLM": "llm",
    "Completion": "llm",
    "PromptsFailed": "llm",
    "EngineConfig": "config",
    "GpuConfig": "config",
    "PoolConfig": "config",
    "SchedulerConfig": "config",
    "SamplingParams": "request",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{__name__}.{name} needs {error.name}: pip install 'quire[engine]'", name=error.name
        ) from error

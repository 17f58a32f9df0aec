"""One shard: its slice of the weights, its pages, and the forward pass of a step.

Knows nothing of requests or schedules: a step's tokens come in, logits go out.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from quire.kernels.cache_view import AttentionSpec, LayerCache
from quire.kernels.formats import FormatError, LayerFormat, layer_formats
from quire.kernels.layout import PageLayout
from quire.kernels.transform import LayerTransform
from quire.replicas.config import EngineConfig
from quire.replicas.errors import ConfigError
from quire.replicas.model.calibration import calibrated_formats
from quire.replicas.model.checkpoint import (
    WeightSource,
    eos_token_ids,
    find_model,
    generation_values,
    load_config,
)
from quire.replicas.model.compiled import MIN_TOKENS
from quire.replicas.model.context import context_length
from quire.replicas.model.forward import ForwardPass
from quire.replicas.model.generation_defaults import generation_defaults
from quire.replicas.model.invariance import padded
from quire.replicas.model.key_bias import biased_layers
from quire.replicas.model.loading import LoadedModel, Progress, check_servable, load_model
from quire.replicas.model.named_weights import NamedWeights
from quire.replicas.model.policy import open_policy
from quire.replicas.model.random_weights import RandomWeights
from quire.replicas.model.static_transforms import log_choices, static_transforms, whole_key_moments
from quire.replicas.model.step import StepBuilder
from quire.replicas.model.tensor_parallel import shard_config
from quire.replicas.request import ModelInfo, ResolvedSampling
from quire.replicas.runner.capacity import run_largest_step
from quire.replicas.runner.collectives import TensorParallelGroup
from quire.replicas.runner.decode_graphs import DecodeGraphs
from quire.replicas.step_batch import PROMPT_ROWS, StepBatch
from quire.replicas.text.tokenizer_files import open_tokenizer

_LOG = logging.getLogger(__name__)

_CPU_POOL_BYTES = 256 << 20


class Shard:
    """Rank `rank` of `config.tp`. `group` joins the ranks; None when there is one."""

    info: ModelInfo
    layout: PageLayout
    """Of this shard's pages."""
    kv_heads: int
    """Of the whole model, where `layout` has this shard's."""
    num_pages: int
    weights_fingerprint: bytes
    """Part of every block key; the same on all ranks."""
    specs: tuple[AttentionSpec, ...]
    """How each layer attends."""

    def __init__(
        self,
        config: EngineConfig,
        rank: int = 0,
        group: TensorParallelGroup | None = None,
        progress: Progress | None = None,
        all_loaded: Callable[[], None] = lambda: None,
    ) -> None:
        """Load the weights and allocate the pages. Raises UnknownModel, ModelNotServable, ConfigError.

        `all_loaded` is called with the weights in place and returns when those of all ranks are, however long
        that takes: what follows are steps, in which a rank that is late counts as dead.
        """
        if (group is None) != (config.tp == 1):
            raise ValueError(f"tp={config.tp} needs {'no' if config.tp == 1 else 'a'} group")
        self.device = shard_device(config, rank)
        self._rank, self._group = rank, group
        folder, model_config = servable_model(config)
        self.dtype = _dtype(config, model_config, self.device)
        with _weights(config, folder, model_config, self.dtype, self.device) as weights:
            loaded = load_model(
                weights,
                model_config,
                rank=rank,
                tp=config.tp,
                group=group,
                dtype=self.dtype,
                device=self.device,
                progress=progress,
            )
            policy = open_policy(config.kv, len(loaded.layers))
            biased = biased_layers(policy.formats, loaded.calls, model_config, weights, config.tp)
            self.layout = _layout(config, loaded, calibrated_formats(policy.formats, biased))
            self.weights_fingerprint = weights.fingerprint
        self.specs = tuple(heads.spec for heads in loaded.layers)
        # Configs of models that cannot be sharded may lack the number.
        self.kv_heads = self.layout.kv_heads if config.tp == 1 else model_config.num_key_value_heads
        self.max_step_tokens = config.scheduler.step_tokens(self.device.type)
        max_model_tokens = _max_model_tokens(config, model_config)
        all_loaded()
        self._transforms = static_transforms(
            loaded,
            policy,
            self.layout.layers,
            biased,
            kv_heads=self.kv_heads,
            weights=self.weights_fingerprint.hex(),
            group=group,
            max_tokens=max_model_tokens,
        )
        if rank == 0:
            log_choices(self.layout.layers, self._transforms, biased)
        self._forward = ForwardPass(loaded.model, compiled=self._on_one_gpu and config.gpu.compile)
        self._graphs: DecodeGraphs | None = None
        try:
            self._allocate(config, loaded, max_model_tokens)
        except BaseException:
            self._forward.close()
            raise
        self.info = ModelInfo(
            model=config.name or config.model,
            architecture=type(loaded.model).__name__,
            vocab_size=model_config.vocab_size,
            max_model_tokens=max_model_tokens,
            eos_token_ids=eos_token_ids(folder, model_config),
            tp=config.tp,
            page_tokens=self.layout.page_tokens,
            kv_formats=tuple((f.k.codes.value, f.v.codes.value) for f in self.layout.layers),
            bytes_per_token=self.layout.bytes_per_token * config.tp,
            bf16_bytes_per_token=_in_bf16(self.layout).bytes_per_token * config.tp,
            sampling=_sampling_defaults(config, folder),
        )
        _LOG.info("rank %d: %s pages of %s bytes", rank, f"{self.num_pages:,}", f"{self.layout.page_bytes:,}")

    @property
    def transforms_fingerprint(self) -> bytes:
        """Of all layers' static transforms for the whole model's heads; part of every block key."""
        parts = [side.fingerprint for layer in self._transforms for side in (layer.k, layer.v)]
        return hashlib.blake2b(b"".join(parts), digest_size=32).digest()

    @property
    def pool(self) -> Tensor:
        """uint8 [num_pages, page_bytes]: what leaves and enters when pages travel."""
        return self._builder.caches[0].pool_NB

    def forward(self, batch: StepBatch, drawn: Tensor | None = None) -> Tensor:
        """Run a step: its K and V are in the pages afterwards. On a GPU it may still be under way.

        Sequences are sorted by their new tokens, fewest first. `drawn`: what negative token ids stand for.
        Returns fp32 logits [R, vocabulary], good until the next call.
        """
        if self._graphs and (logits_RV := self._graphs.run(batch, drawn)) is not None:
            return logits_RV
        tokens, rows = len(batch.token_ids_T), len(batch.logit_rows_R)
        if self.device.type == "cpu":  # `invariance.py` says why
            inputs = self._builder.build(batch, drawn, tokens=padded(tokens), rows=padded(rows))
        else:
            inputs = self._builder.build(batch, drawn, tokens=MIN_TOKENS)
        return self._forward(inputs)[:rows]

    def close(self) -> None:
        """Give weights and pages back at once. Only what it says of itself is of use afterwards."""
        self._graphs = None
        self._builder.close()
        self._forward.close()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def _on_one_gpu(self) -> bool:
        """Sums over shards are neither compiled nor captured."""
        return self.device.type == "cuda" and self._group is None

    def _allocate(self, config: EngineConfig, loaded: LoadedModel, max_model_tokens: int) -> None:
        """The pages, and what runs over them."""
        pool_bytes = self._pool_bytes(config, loaded, max_model_tokens)
        self.num_pages = pool_bytes // self.layout.page_bytes
        if self.num_pages < 1:
            raise ConfigError(
                f"a pool of {pool_bytes} bytes holds no page of {self.layout.page_bytes}; raise pool.bytes "
                "or pool.memory_fraction"
            )
        self._builder = self._step_builder(loaded, self.num_pages)
        if self._on_one_gpu and config.gpu.graphs:
            max_pages = -(-max_model_tokens // self.layout.page_tokens)
            self._graphs = DecodeGraphs(self._forward, self._builder, config.scheduler.max_running, max_pages)

    def _pool_bytes(self, config: EngineConfig, loaded: LoadedModel, max_model_tokens: int) -> int:
        """As configured; else on a GPU what the largest step leaves, which also compiles what steps need."""
        if self.device.type == "cpu":
            return config.pool.bytes or _CPU_POOL_BYTES
        started = time.monotonic()
        run_largest_step(
            self._forward,
            self._step_builder(loaded, 1),
            tokens=self.max_step_tokens,
            rows=config.scheduler.max_running + PROMPT_ROWS,
            max_model_tokens=max_model_tokens,
        )
        free_bytes = torch.cuda.mem_get_info(self.device)[0]
        _LOG.info("first step in %.1f s, %.2f GB are free", time.monotonic() - started, free_bytes / 1e9)
        if config.pool.bytes is None:
            return math.floor(free_bytes * config.pool.memory_fraction)
        if config.pool.bytes > free_bytes:
            raise ConfigError(
                f"pool.bytes is {config.pool.bytes}, but weights and the largest step leave {free_bytes} "
                "bytes of the GPU; lower it, or leave it out to take pool.memory_fraction of those"
            )
        return config.pool.bytes

    def _step_builder(self, loaded: LoadedModel, num_pages: int) -> StepBuilder:
        heads = self.layout.kv_heads
        first = self._rank * self.kv_heads // (self._group.size if self._group else 1)
        own = [t.of_heads(slice(first, first + heads), self.device) for t in self._transforms]
        caches = _caches(self.layout, loaded, own, num_pages, self.device)
        return StepBuilder(caches, loaded.layers, self.device)

    def key_moments(self, token_ids: Sequence[int]) -> Tensor:
        """Statistics of a text's keys for `quire calibrate`, fp64 [layers, 3, kv heads, head_dim] on the CPU.

        All ranks call it at the same time.
        """
        return whole_key_moments(self._forward.model, token_ids, self.kv_heads, self._group)


def check_config(config: EngineConfig) -> tuple[Path, PreTrainedConfig]:
    """The model's folder and configuration, once all that can be refused without computing has been.

    Files are opened and their names and shapes compared with the model's; no weights are read.
    Raises UnknownModel, ModelNotServable, ConfigError.
    """
    folder, model = servable_model(config)
    generation_values(folder)
    open_tokenizer(folder)
    with _weights(config, folder, model, torch.float32, torch.device("cpu")):
        return folder, model


def servable_model(config: EngineConfig) -> tuple[Path, PreTrainedConfig]:
    """The model's folder and configuration, once all has been refused that config.json alone rules out.

    Raises UnknownModel, ModelNotServable, ConfigError.
    """
    folder = find_model(config.model)
    model = load_config(folder)
    check_servable(model, _max_model_tokens(config, model))
    shard_config(model, config.tp)
    open_policy(config.kv, model.num_hidden_layers)
    return folder, model


def shard_device(config: EngineConfig, rank: int) -> torch.device:
    """Where a rank computes. Raises ConfigError for a GPU that is not there."""
    available = torch.cuda.is_available()
    if config.device == "cpu" or (config.device == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise ConfigError('device is "cuda" but torch sees no GPU; set device to "auto" or "cpu"')
    # A process that was given one GPU of its own calls it 0.
    return torch.device("cuda", rank % torch.cuda.device_count())


def _dtype(config: EngineConfig, model: PreTrainedConfig, device: torch.device) -> torch.dtype:
    if config.dtype != "auto":
        named: torch.dtype = getattr(torch, config.dtype)
        return named
    if device.type == "cpu":
        return torch.float32
    return model.dtype if isinstance(model.dtype, torch.dtype) else torch.bfloat16


def _weights(
    config: EngineConfig, folder: Path, model: PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> AbstractContextManager[WeightSource]:
    if config.weights == "random":
        return nullcontext(RandomWeights.of(folder, model, dtype, device))
    return NamedWeights.open(folder, model)


def _max_model_tokens(config: EngineConfig, model: PreTrainedConfig) -> int:
    length, asked = context_length(model), config.max_model_tokens
    if asked is None and length.usual is None:
        raise ConfigError("the model's config gives no max_position_embeddings; set max_model_tokens")
    if asked is not None and length.most is not None and asked > length.most:
        raise ConfigError(
            f"max_model_tokens is {asked}, the model allows {length.most}; lower it to that or less"
        )
    return asked or length.usual or 0


def _sampling_defaults(config: EngineConfig, folder: Path) -> ResolvedSampling:
    return generation_defaults(folder) if config.generation_defaults == "model" else ResolvedSampling()


def _layout(config: EngineConfig, loaded: LoadedModel, formats: tuple[LayerFormat, ...]) -> PageLayout:
    heads = loaded.layers[0]
    try:
        return PageLayout(formats, heads.kv_heads, heads.k_dim, config.pool.page_tokens)
    except FormatError as error:
        raise ConfigError(f"kv: {error}") from error


def _in_bf16(layout: PageLayout) -> PageLayout:
    return replace(layout, layers=layer_formats("bf16", len(layout.layers)))


def _caches(
    layout: PageLayout,
    loaded: LoadedModel,
    transforms: Sequence[LayerTransform],
    num_pages: int,
    device: torch.device,
) -> tuple[LayerCache, ...]:
    """One pool of zeros, seen by every layer. Raises ConfigError where a format does not fit the model."""
    pool_NB = torch.zeros(num_pages, layout.page_bytes, dtype=torch.uint8, device=device)
    try:
        caches = tuple(
            LayerCache(pool_NB, layout, i, transform.k, transform.v) for i, transform in enumerate(transforms)
        )
        for heads, cache in zip(loaded.layers, caches, strict=True):
            heads.spec.check(cache)
    except FormatError as error:
        raise ConfigError(f"kv: {error}") from error
    return caches

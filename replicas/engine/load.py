"""From a configuration to an engine that can step: model, shards, tokenizer, block keys."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from quire.kvstore.books.keys import KeySpace
from quire.kvstore.books.pool import PagePool
from quire.kvstore.peers.exchange import Exchange, ExchangeConfig
from quire.kvstore.peers.network import PeerNetwork
from quire.kvstore.peers.peer import Peer
from quire.kvstore.wire.transport import LinkConfig
from quire.replicas.config import EngineConfig
from quire.replicas.engine.engine import Engine
from quire.replicas.engine.prefix_waits import PrefixWaits
from quire.replicas.model.checkpoint import find_model
from quire.replicas.runner.executor import Executor, ShardLauncher
from quire.replicas.runner.shard import Shard, shard_device
from quire.replicas.text.tokenizer_files import fast_tokenizer, open_tokenizer


def load_engine(
    config: EngineConfig,
    launcher: ShardLauncher | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    host: str = "127.0.0.1",
    network: PeerNetwork | None = None,
    wake: Callable[[], None] = lambda: None,
) -> tuple[Executor, Engine]:
    """Load all shards; blocking. `host`: the address at which other shards and replicas reach this process.

    `network`: the way to the replicas that the engine shares blocks with; `wake` is called when they report.

    Raises: ConfigError, UnknownModel, ModelNotServable, ReplicaDied.
    """
    tokenizer = load_tokenizer(config.model)
    links = LinkConfig.on(shard_device(config, 0)) if network else None
    executor = Executor(config, launcher, progress, host=host, links=links)

    keys = _key_space(executor.shard)

    def share(pool: PagePool) -> PrefixWaits:
        assert network is not None
        return _waits(pool, executor, network, config, keys, wake)

    engine = Engine(
        executor=executor,
        info=executor.shard.info,
        keys=keys,
        scheduler=config.scheduler,
        max_step_tokens=executor.shard.max_step_tokens,
        tokenizer=None if tokenizer is None else fast_tokenizer(tokenizer),
        share=share if network else None,
    )
    return executor, engine


def _waits(
    pool: PagePool,
    executor: Executor,
    network: PeerNetwork,
    config: EngineConfig,
    keys: KeySpace,
    wake: Callable[[], None],
) -> PrefixWaits:
    shard, info = executor.shard, executor.shard.info
    exchange = Exchange(
        pool,
        keys.fingerprint,
        executor.endpoints,
        ExchangeConfig(timeout_s=config.store.fetch_timeout_s),
        kv_heads=shard.kv_heads,
        bf16_ratio=info.bf16_bytes_per_token / info.bytes_per_token,
    )
    return PrefixWaits(
        pool,
        Peer(pool, exchange, executor, network.send, wake),
        network,
        config.store,
        page_tokens=info.page_tokens,
        block_bytes=int(info.bytes_per_token * info.page_tokens),
        wake=wake,
    )


def load_tokenizer(model: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model's weights; None if there is none, as with test models.

    Raises: UnknownModel, ModelNotServable.
    """
    return open_tokenizer(find_model(model))


def _key_space(shard: Shard) -> KeySpace:
    """The arithmetic is part of the model: the same weights in bf16 and fp32 compute different keys."""
    digest = hashlib.blake2b(shard.weights_fingerprint, digest_size=32)
    digest.update(str(shard.dtype).encode())
    return KeySpace(shard.layout.fingerprint, digest.digest(), shard.transforms_fingerprint)

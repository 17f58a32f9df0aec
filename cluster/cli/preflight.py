"""What can be found out about a configuration before anything starts: model files, formats, the port.

What fails here fails in seconds and in one line, where a replica would find it out once Ray is up.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from quire.cluster.cli.room import groups, lack, own_cpus
from quire.cluster.config import ServeConfig
from quire.replicas.errors import ConfigError, UnknownModel


def located(config: ServeConfig) -> ServeConfig:
    """The configuration with its model's folder as an absolute path, for processes that start elsewhere.

    What requests call the model stays. Raises UnknownModel for a path that leads nowhere from here.
    """
    model = config.engine.model
    folder = Path(model).expanduser()
    if model == "demo" or Path(model).is_absolute():
        return config
    if folder.is_dir():
        engine = replace(config.engine, model=os.path.abspath(folder), name=config.engine.name or model)
        return replace(config, engine=engine)
    if model.startswith(("./", "../", "~")):
        raise UnknownModel(f"no such folder: {os.path.abspath(folder)}")
    return config  # an id of the Hugging Face hub


def check(config: ServeConfig, *, here: bool, metrics_port: int | None = None) -> None:
    """Refuse what can never be served. `here`: by this machine; else what is not here may be elsewhere.

    Raises UnknownModel, ModelNotServable, ConfigError, FormatError.
    """
    model = config.engine.model
    if not (here or model == "demo" or Path(model).is_dir()):
        return
    # The code of models takes seconds to load, which commands that start nothing need not wait for.
    from quire.cluster.cli.format_costs import policy_cost
    from quire.cluster.gateway.server import check_port
    from quire.replicas.runner.shard import check_config
    from quire.replicas.text.tokenizer_files import read_tokenizer

    if here:
        check_port(config.gateway.host, config.gateway.port)
        check_port("127.0.0.1", metrics_port or 0)
    folder, _ = check_config(config.engine)
    policy_cost(model, config.engine.kv, name="", page_tokens=config.engine.pool.page_tokens)
    read_tokenizer(folder)
    if here:
        _check_gpus(config)


def _check_gpus(config: ServeConfig) -> None:
    """Refuses more shards than this machine has GPUs for. Raises ConfigError."""
    import torch

    from quire.cluster.app import gpus_per_shard

    gpus = float(torch.cuda.device_count())
    node = {"CPU": float(own_cpus(config)), "GPU": gpus, **config.gateway.resources}
    if reason := lack(groups(config, gpus_per_shard(config, gpus)), [node]):
        raise ConfigError(reason)

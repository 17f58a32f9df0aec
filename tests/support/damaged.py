"""Broken applications: a replica that sends damaged blocks, and weights that are no numbers."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle
from ray_cluster import Cluster
from reweighed import reweighed
from served_app import Served
from torch import Tensor

from quire.cluster import app
from quire.kvstore.peers.mover import Outgoing
from quire.replicas.deployment import Replica

ENGINE = {"tp": 1, "pool": {"bytes": 3 << 20}}


class BadMemory(Replica):
    """A replica that changes one bit of the first chunk of whatever it sends."""

    async def __init__(self, *args: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        read_chunk = Outgoing.read_chunk

        def damaged(source: Outgoing, index: int, buffer: Tensor) -> Tensor:
            chunk = read_chunk(source, index, buffer).clone()
            if index == 0:
                chunk[0] ^= 1
            return chunk

        Outgoing.read_chunk = damaged  # type: ignore[method-assign]
        await super().__init__(*args)  # type: ignore[misc]


@contextmanager
def damaged_pages(cluster: Cluster) -> Iterator[Served]:
    """An application whose prefill replica sends damaged blocks, on the joined cluster."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import this file
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "Replica", BadMemory)
        prefill = {"count": 1, "least_tokens": 100}
        with cluster.application("pages", engine=ENGINE, prefill=prefill) as served:
            yield served


@contextmanager
def damaged_weights(cluster: Cluster, folder: Path) -> Iterator[Served]:
    """An application whose weights are NaN, on the joined cluster. `folder` takes them."""
    engine = {**ENGINE, "model": str(reweighed(folder, by=math.nan))}
    with cluster.application("weights", engine=engine) as served:
        yield served

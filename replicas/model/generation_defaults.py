"""The sampling that a model's generation_config.json recommends: what a request gets that says nothing.

As in transformers, `do_sample` is false unless it says otherwise, and then the temperature counts for
nothing; `top_k` is used only if the file names one. Other keys (lengths, beams, tokens) are not defaults of a
request here.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from quire.replicas.errors import InvalidRequest
from quire.replicas.model.checkpoint import GENERATION_CONFIG, generation_values
from quire.replicas.request import DEFAULTED, ResolvedSampling

_LOG = logging.getLogger(__name__)

_OF_TRANSFORMERS = {"temperature": 1.0}
"""What it draws with where the file says only `do_sample`."""


def generation_defaults(folder: Path) -> ResolvedSampling:
    """Of the model in `folder`; greedy where there is no such file.

    A value that cannot be is left out with a warning. Raises ModelNotServable for a damaged file.
    """
    path, said = folder / GENERATION_CONFIG, generation_values(folder)
    values = {name: said[name] for name in DEFAULTED if said.get(name) is not None}
    if said.get("do_sample") is True:
        values = _OF_TRANSFORMERS | values
    else:
        values.pop("temperature", None)
    return ResolvedSampling(**{name: value for name, value in values.items() if _may_be(name, value, path)})


def _may_be(name: str, value: Any, path: Path) -> bool:
    try:
        ResolvedSampling(**{name: value})
    except InvalidRequest as error:
        _LOG.warning("%s: %s; the value is ignored", path, error)
        return False
    return True

"""The sampling parameters that a model's generation_config.json recommends: the defaults of a request.

As in transformers, `do_sample` is false by default, and the temperature is then ignored; `top_k` is used only
if the file names one. Other keys (lengths, beams, tokens) are not used.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from quire.replicas.errors import InvalidRequest
from quire.replicas.model.checkpoint import GENERATION_CONFIG, generation_values
from quire.replicas.request import DEFAULTED, ResolvedSampling

_LOG = logging.getLogger(__name__)

_TRANSFORMERS_DEFAULTS = {"temperature": 1.0}
"""Its values where the file says only `do_sample`."""


def generation_defaults(folder: Path) -> ResolvedSampling:
    """Read the defaults of the model in `folder`; greedy where there is no such file.

    Invalid values are ignored with a warning. Raises ModelNotServable for a damaged file.
    """
    path, said = folder / GENERATION_CONFIG, generation_values(folder)
    values = {name: said[name] for name in DEFAULTED if said.get(name) is not None}
    if said.get("do_sample") is True:
        values = _TRANSFORMERS_DEFAULTS | values
    else:
        values.pop("temperature", None)
    return ResolvedSampling(**{name: value for name, value in values.items() if _is_valid(name, value, path)})


def _is_valid(name: str, value: Any, path: Path) -> bool:
    try:
        ResolvedSampling(**{name: value})
    except InvalidRequest as error:
        _LOG.warning("%s: %s; the value is ignored", path, error)
        return False
    return True

"""What can never be served, and is refused before it costs anybody anything. Pure."""

from __future__ import annotations

from quire.replicas.errors import InvalidRequest
from quire.replicas.request import ModelInfo, Request

MAX_PROMPT_LOGPROBS = 2_000_000
"""They travel in one message."""


def check_request(request: Request, info: ModelInfo, *, pool_pages: int, has_tokenizer: bool) -> None:
    """Raises InvalidRequest, which says what to change."""
    params, prompt, last = request.sampling, request.prompt, info.vocab_size - 1
    if not prompt:
        raise InvalidRequest("the prompt is empty; send at least one token")
    if min(prompt) < 0 or max(prompt) > last:
        wrong = next(t for t in prompt if not 0 <= t <= last)
        raise InvalidRequest(f"token id {wrong} is not in the model's vocabulary 0..{last}")
    for token in params.stop_token_ids:
        if not 0 <= token <= last:
            raise InvalidRequest(f"stop_token_ids holds {token}; the vocabulary is 0..{last}")
    if len(prompt) >= info.max_model_tokens:
        raise InvalidRequest(
            f"the prompt has {len(prompt)} tokens; this model serves {info.max_model_tokens} of "
            "prompt and output together. Shorten the prompt or raise max_model_tokens"
        )
    longest = min(len(prompt) + params.max_tokens, info.max_model_tokens)
    capacity = pool_pages * info.page_tokens
    if longest > capacity:
        raise InvalidRequest(
            f"prompt and max_tokens need {longest} tokens of KV; the pool holds {capacity}. "
            "Shorten the prompt, lower max_tokens, or raise pool.bytes"
        )
    entries = len(prompt) * (1 + (params.prompt_logprobs or 0))
    if params.prompt_logprobs is not None and entries > MAX_PROMPT_LOGPROBS:
        raise InvalidRequest(
            f"prompt_logprobs of {len(prompt)} tokens would be {entries} numbers, the limit is "
            f"{MAX_PROMPT_LOGPROBS}; ask for fewer or shorten the prompt"
        )
    if params.stop and not has_tokenizer:
        raise InvalidRequest("stop texts need a tokenizer, and this model has none; use stop_token_ids")

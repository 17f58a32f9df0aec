"""Offline batches without Ray: `LLM(model, kv=..., tp=...).generate(prompts)`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from reprlib import repr as shown
from types import TracebackType
from typing import Literal

from quire.replicas.config import EngineConfig, GpuConfig, PoolConfig, SchedulerConfig
from quire.replicas.errors import InvalidRequest, QuireError
from quire.replicas.load import load_engine, load_tokenizer
from quire.replicas.prompt import Messages, Prompt, as_messages, as_prompts
from quire.replicas.request import (
    EngineStats,
    Failure,
    FinishReason,
    ModelInfo,
    Output,
    Request,
    RequestId,
    SamplingParams,
    Timings,
    TokenLogprob,
    Usage,
)
from quire.replicas.tokenize import PromptTokenizer
from quire.replicas.values import items


@dataclass(frozen=True, slots=True)
class OutputText:
    """One of the n outputs for a prompt."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Completion:
    """All outputs for one prompt."""

    prompt: tuple[int, ...]
    outputs: tuple[OutputText, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    usage: Usage
    timings: Timings

    @property
    def text(self) -> str:
        """The first output's text."""
        return self.outputs[0].text


class LLM:
    """A model in this process (and `tp` - 1 others). A context manager; `close` ends its shards."""

    def __init__(
        self,
        model: str = "demo",
        kv: str | Mapping[str, object] = "int8",
        tp: int = 1,
        *,
        weights: Literal["checkpoint", "random"] = "checkpoint",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        device: Literal["auto", "cpu", "cuda"] = "auto",
        max_model_tokens: int | None = None,
        generation_defaults: Literal["model", "none"] = "model",
        threads_per_shard: int | None = None,
        gpu: GpuConfig | None = None,
        pool: PoolConfig | None = None,
        scheduler: SchedulerConfig | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """See `EngineConfig` for the options. Raises ConfigError, UnknownModel, ModelNotServable."""
        config = EngineConfig(
            model=model,
            weights=weights,
            kv=kv,
            tp=tp,
            dtype=dtype,
            device=device,
            max_model_tokens=max_model_tokens,
            generation_defaults=generation_defaults,
            threads_per_shard=threads_per_shard,
            gpu=gpu or GpuConfig(),
            pool=pool or PoolConfig(),
            scheduler=scheduler or SchedulerConfig(),
        )
        self.tokenizer = load_tokenizer(model)
        self._max_queued = config.scheduler.max_queued
        self._executor, self._engine = load_engine(config, progress=progress)
        self._prompts = None if self.tokenizer is None else PromptTokenizer(self.tokenizer)
        self._requests = 0

    @property
    def info(self) -> ModelInfo:
        return self._engine.info

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def check(self) -> None:
        """The pool's integrity check. Raises IntegrityError."""
        self._engine.check()

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        tenant: str = "",
    ) -> list[Completion]:
        """Continue every prompt (text or token ids), batched together; results in the prompts' order.

        A single prompt gives a list of one.

        Raises: InvalidRequest before anything is computed; ReplicaDied if a shard dies.
        """
        given = as_prompts(prompts)
        params = _params_for(len(given), sampling)
        requests = [self._request(prompt, p, tenant) for prompt, p in zip(given, params, strict=True)]
        for request in requests:
            self._engine.validate(request)
        outputs = self._run(requests)
        return [_completion(request, outputs[request.id]) for request in requests]

    def chat(
        self, messages: Messages, sampling: SamplingParams | None = None, *, tenant: str = ""
    ) -> Completion:
        """The next turn of a chat: `[{"role": "user", "content": ...}, ...]`."""
        turns = as_messages(messages)
        prompt = self._tokenizing().encode_chat(turns, self.info.max_model_tokens)
        return self.generate([prompt], sampling, tenant=tenant)[0]

    def close(self) -> None:
        self._executor.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _request(self, prompt: str | tuple[int, ...], sampling: SamplingParams, tenant: str) -> Request:
        if isinstance(prompt, str):
            prompt = tuple(self._tokenizing().encode(prompt, self.info.max_model_tokens))
        self._requests += 1
        request_id = RequestId(str(self._requests))
        return Request(id=request_id, prompt=prompt, sampling=sampling, tenant=tenant)

    def _tokenizing(self) -> PromptTokenizer:
        if self._prompts is None:
            raise InvalidRequest("this model has no tokenizer; give token ids")
        return self._prompts

    def _run(self, requests: list[Request]) -> dict[RequestId, list[Output]]:
        outputs: dict[RequestId, list[Output]] = {request.id: [] for request in requests}
        left = deque(requests)
        try:
            while left or self._engine.has_work:
                while left and self._engine.queued < self._max_queued:
                    self._engine.add(left.popleft())
                for event in self._engine.step():
                    if isinstance(event, Failure):
                        raise QuireError(event.message)
                    outputs[event.request_id].append(event)
        finally:  # after an error or Ctrl-C nothing may go on in the next call
            for request in requests:
                self._engine.cancel(request.id)
            self._engine.take_events()
        return outputs


def _params_for(prompts: int, sampling: SamplingParams | Seq[SamplingParams] | None) -> Seq[SamplingParams]:
    """The sampling parameters of each prompt. Raises InvalidRequest."""
    if sampling is None or isinstance(sampling, SamplingParams):
        return [sampling or SamplingParams()] * prompts
    params = items("sampling", sampling, "SamplingParams, or SamplingParams for all prompts")
    for at, one in enumerate(params):
        if not isinstance(one, SamplingParams):
            raise InvalidRequest(f"sampling[{at}] must be SamplingParams, got {shown(one)}")
    if len(params) != prompts:
        raise InvalidRequest(f"{prompts} prompts came with {len(params)} sampling parameters")
    return params


def _completion(request: Request, events: list[Output]) -> Completion:
    texts = []
    for index in range(request.sampling.n):
        mine = [event for event in events if event.index == index]
        reason = mine[-1].finish_reason
        assert reason is not None
        texts.append(
            OutputText(
                text="".join(event.text for event in mine),
                token_ids=tuple(t for event in mine for t in event.token_ids),
                logprobs=tuple(p for event in mine for p in event.logprobs),
                finish_reason=reason,
            )
        )
    usage, timings = events[-1].usage, events[-1].timings
    assert usage is not None
    assert timings is not None
    return Completion(request.prompt, tuple(texts), events[0].prompt_logprobs, usage, timings)

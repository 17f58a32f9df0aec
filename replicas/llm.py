"""Offline batches without Ray: `LLM(model, kv=..., tp=...).generate(prompts)`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from quire.replicas.config import EngineConfig, GpuConfig, PoolConfig, SchedulerConfig
from quire.replicas.errors import InvalidRequest, QuireError
from quire.replicas.load import load_engine, load_tokenizer
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
            threads_per_shard=threads_per_shard,
            gpu=gpu or GpuConfig(),
            pool=pool or PoolConfig(),
            scheduler=scheduler or SchedulerConfig(),
        )
        self.tokenizer = load_tokenizer(model)
        self._max_queued = config.scheduler.max_queued
        self._executor, self._engine = load_engine(config, progress=progress)
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
        prompts: Seq[str | Seq[int]],
        sampling: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        tenant: str = "",
    ) -> list[Completion]:
        """Continue every prompt (text or token ids), batched together; results in the prompts' order.

        Raises: InvalidRequest before anything is computed; ReplicaDied if a shard dies.
        """
        params = [sampling or SamplingParams()] * len(prompts) if not isinstance(sampling, Seq) else sampling
        if len(params) != len(prompts):
            raise InvalidRequest(f"{len(prompts)} prompts came with {len(params)} sampling parameters")
        requests = [self._request(prompt, p, tenant) for prompt, p in zip(prompts, params, strict=True)]
        for request in requests:
            self._engine.validate(request)
        outputs = self._run(requests)
        return [_completion(request, outputs[request.id]) for request in requests]

    def chat(
        self, messages: Seq[Mapping[str, str]], sampling: SamplingParams | None = None, *, tenant: str = ""
    ) -> Completion:
        """The next turn of a chat: `[{"role": "user", "content": ...}, ...]`."""
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise InvalidRequest("this model has no chat template; use generate()")
        turns = [dict(message) for message in messages]
        text = str(self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
        prompt: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return self.generate([prompt], sampling, tenant=tenant)[0]

    def close(self) -> None:
        self._executor.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _request(self, prompt: str | Seq[int], sampling: SamplingParams, tenant: str) -> Request:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidRequest("this model has no tokenizer; give token ids")
            prompt = list[int](self.tokenizer.encode(prompt))
        self._requests += 1
        request_id = RequestId(str(self._requests))
        return Request(id=request_id, prompt=tuple(prompt), sampling=sampling, tenant=tenant)

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

"""rollout.engine hf: the trainer's ranks generate, by transformers' own `generate`. Slow and plain: for debugging, and
the oracle of tests.

A rank holds a second, whole copy of the model for it, in the engine's dtype.
"""

import asyncio
import time
from collections.abc import Iterable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessorList

from rlhf_api.job import SamplingSpec
from rlhf_api.run import RunConfig
from rlhf_worker.errors import DeadlineExceeded
from rlhf_worker.experience import Sample
from rlhf_worker.pretrained import load_config, load_tokenizer, location
from rlhf_worker.rollout.environment import Environments, opened
from rlhf_worker.rollout.episode import Episode, Request, Speech, Turn, request_seed
from rlhf_worker.rollout.sampling import first_stop, support

SCORES = 1 << 28  # numbers that `generate` may keep of one batch: one a row, a token and an entry of the vocabulary


class Generator:
    """Answers what an engine's actor answers. `refresh` first."""

    def __init__(self, config: RunConfig, rank: int, device: torch.device) -> None:
        self.config, self.rank, self.device = config, rank, device
        tokenizer, model = load_tokenizer(config.model), load_config(config.model)
        self.lm = AutoModelForCausalLM.from_config(
            model, dtype=getattr(torch, config.model.dtype), trust_remote_code=config.model.trust_remote_code,
        )
        self.lm.to(device).eval()
        self.ends = _ends(location(config.model), tokenizer.eos_token_id)
        named = [tokenizer.pad_token_id, tokenizer.eos_token_id, 0]  # it is masked: any will do
        self.pad: int = next(token for token in named if token is not None)
        self.speech = Speech.of(tokenizer, config)
        self.environments = opened(config, tokenizer)
        self.version = 0
        self._batches = 0

    def refresh(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Weights by transformers' names, all of them; tied ones come once. Raises ValueError for one that the model
        lacks, or that is missing.
        """
        missing, unexpected = self.lm.load_state_dict(dict(weights), strict=False)
        if unexpected or (lacking := set(missing) & dict(self.lm.named_parameters()).keys()):
            raise ValueError(f"hf: the policy's weights do not fit: {unexpected or sorted(lacking)}")
        self.version = version

    def generate(self, requests: list[Request], deadline_seconds: float) -> list[Sample | None]:
        """One completion a request, in order; None for each that the deadline cut off. Raises EnvironmentFailed."""
        end = time.monotonic() + deadline_seconds
        if requests and (environments := self.environments.get(requests[0].evaluation)):
            return asyncio.run(self._play(environments, requests, end))
        episodes = [Episode(request) for request in requests]
        rows = max(1, SCORES // (self.lm.config.vocab_size * max((episode.left for episode in episodes), default=1)))
        for start in range(0, len(episodes), rows):
            batch = episodes[start : start + rows]
            for episode, turn in zip(batch, self._turns(batch, end), strict=True):
                if turn:
                    episode.add(turn)
        if episodes and not any(episode.turns for episode in episodes):
            raise DeadlineExceeded(self._late(f"of {len(episodes)} completions it finished none"))
        return [episode.sample(self.speech) if episode.turns else None for episode in episodes]

    def _late(self, words: str) -> str:
        return (f"trainer rank {self.rank}: {words} in spec.rollout.deadlineSeconds "
            f"({self.config.rollout.deadline_seconds:g}): raise it, or lower rollout.maxTokens")

    async def _play(self, environments: Environments, requests: list[Request], end: float) -> list[Sample | None]:
        async def turn(episode: Episode) -> Turn:
            if made := self._turns([episode], end)[0]:
                return made
            raise DeadlineExceeded(self._late("a turn was cut off"))

        tasks = [asyncio.create_task(environments.play(request, turn)) for request in requests]
        try:
            done, _ = await asyncio.wait(tasks, timeout=max(0.0, end - time.monotonic()))
            return [_finished(task) if task in done else None for task in tasks]
        finally:
            for task in tasks:
                task.cancel()

    @torch.no_grad()
    def _turns(self, episodes: list[Episode], end: float) -> list[Turn | None]:
        """One of each, of the same sampling; None for each that is not finished at `end`."""
        if (seconds := end - time.monotonic()) <= 0:
            return [None] * len(episodes)
        ids, mask = self._padded([episode.context for episode in episodes])
        request, tokens = episodes[0].request, max(episode.left for episode in episodes)
        options = self._options(request, tokens, seconds)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self._seed(episodes[0]))
            penalties = LogitsProcessorList([Penalties(request.sampling, mask)])
            made = self.lm.generate(
                input_ids=ids, attention_mask=mask, generation_config=options, logits_processor=penalties
            )
        # (rows, tokens, vocabulary): of the distributions drawn from
        logprobs = torch.stack(made.scores, 1).float().log_softmax(-1)
        tokens = made.sequences[:, ids.shape[1] :, None]
        likeliest = logprobs.topk(
            min(request.sampling.top_k, logprobs.shape[-1]) if request.wants_support else 0, dim=-1
        )
        token_ids, logprobs = (
            torch.cat([tokens, likeliest.indices], 2), torch.cat([logprobs.gather(2, tokens), likeliest.values], 2),
        )
        rows = zip(episodes, token_ids.cpu().numpy(), logprobs.cpu().numpy(), strict=True)
        return [self._turn(episode, *row) for episode, *row in rows]

    def _padded(self, contexts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, (rows, longest), padded on the left."""
        longest = max(map(len, contexts))
        ids = torch.tensor([[self.pad] * (longest - len(row)) + row for row in contexts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in contexts], device=self.device)
        return ids, mask

    def _options(self, request: Request, tokens: int, seconds: float) -> GenerationConfig:
        spec, given = request.sampling, dict[str, Any](do_sample=request.temperature > 0)
        if request.temperature:
            given |= {
                "temperature": request.temperature, "top_k": spec.top_k, "top_p": spec.top_p,
                "min_p": spec.min_p or None,
            }
        return GenerationConfig(
            **given, max_time=seconds, max_new_tokens=tokens, min_new_tokens=min(spec.min_tokens, tokens) or None,
            eos_token_id=self._ends_of(request) or None, pad_token_id=self.pad,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip

    def _ends_of(self, request: Request) -> list[int]:
        return sorted({*self.ends, *request.sampling.stop_token_ids})

    def _seed(self, episode: Episode) -> int:
        """A batch has one: its first sample's, so that the same batch gives the same samples."""
        self._batches += 1
        seed = episode.seed
        return request_seed(
            self.config.sampling_seed, self.version, str(self.rank), self._batches,
        ) if seed is None else seed

    def _turn(self, episode: Episode, token_ids: NDArray[Any], logprobs: NDArray[Any]) -> Turn | None:
        """token_ids, logprobs (tokens, 1 + n): the drawn one and the n likeliest; what comes after its end too. None
        without an end, unless no token is left.
        """
        request, tokens = episode.request, token_ids[: episode.left, 0].tolist()
        ends = set(self._ends_of(request))
        end = next((index + 1 for index, token in enumerate(tokens) if token in ends), None)
        text = self._stop(episode, tokens if end is None else tokens[: end - 1])
        end, stop = text or (end, "")
        if end is None and len(tokens) < episode.left:
            return None
        tokens = tokens[:end]
        values, sets = logprobs[: len(tokens), 0], None
        if request.wants_support:
            values, sets = support(token_ids[: len(tokens)], logprobs[: len(tokens)])
        return Turn(
            tokens, values.tolist(), [self.version] * len(tokens), "length" if end is None else "stop", stop, sets
        )

    def _stop(self, episode: Episode, tokens: list[int]) -> tuple[int, str] | None:
        """Where a text of sampling.stop ends the turn, in tokens, and which."""
        if not episode.request.sampling.stop:
            return None
        texts = [self.speech.text(episode.context, tokens[:count], "length") for count in range(len(tokens) + 1)]
        return first_stop(texts, episode.request.sampling.stop, episode.least)

    def close(self) -> None:
        for environments in self.environments.values():
            environments.close()


def _finished(play: asyncio.Task[Sample]) -> Sample | None:
    try:
        return play.result()
    except DeadlineExceeded:
        return None


class Penalties:
    """As vLLM's, on logits before the temperature. transformers' own count padding, and are not all of them."""

    def __init__(self, spec: SamplingSpec, mask: Tensor) -> None:
        """mask (rows, P): of the P tokens of the prompts, padded."""
        self.spec, self.mask = spec, mask

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids (rows, P + tokens of the turn), scores (rows, V) -> (rows, V)"""
        spec, prompt = self.spec, self.mask.shape[1]
        if not spec.penalises:
            return scores
        turn = torch.zeros_like(scores).scatter_add(
            1, input_ids[:, prompt:], torch.ones_like(scores[:, :1]).expand(-1, input_ids.shape[1] - prompt)
        )
        seen = turn.scatter_add(1, input_ids[:, :prompt], self.mask.to(scores.dtype)) > 0
        repeated = torch.where(scores > 0, scores / spec.repetition_penalty, scores * spec.repetition_penalty)
        return torch.where(seen, repeated, scores) - spec.frequency_penalty * turn - spec.presence_penalty * (turn > 0)


def _ends(path: str, end: int | None) -> list[int]:
    """Tokens that end a completion, as vLLM takes them: the tokenizer's, and those of the generation config.

    A base model may have none: its completions end by their length.
    """
    try:
        named = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        named = None
    return sorted({end, *(named if isinstance(named, list) else [named])} - {None})

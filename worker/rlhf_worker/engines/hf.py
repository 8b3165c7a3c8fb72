"""rollout.engine hf: the trainer's ranks generate, by transformers' own `generate`. Slow and plain: for debugging, and the oracle of tests.

A rank holds a second, whole copy of the model for it, in the engine's dtype.
"""

import asyncio
import time
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from rlhf_api.run import RunConfig
from rlhf_worker.errors import DeadlineExceeded
from rlhf_worker.experience import Sample
from rlhf_worker.pretrained import load_config, load_tokenizer, location
from rlhf_worker.rollout.environment import Environments
from rlhf_worker.rollout.episode import Episode, Request, Speech, Turn, request_seed

SCORES = 1 << 28  # numbers that `generate` may keep of one batch: one a row, a token and an entry of the vocabulary


class Generator:
    """Answers what an engine's actor answers. `refresh` first."""

    def __init__(self, config: RunConfig, rank: int, device: torch.device) -> None:
        self.config, self.rank, self.device = config, rank, device
        tokenizer, model = load_tokenizer(config.model), load_config(config.model)
        self.lm = AutoModelForCausalLM.from_config(model, dtype=getattr(torch, config.model.dtype), trust_remote_code=config.model.trust_remote_code)
        self.lm.to(device).eval()
        self.ends = _ends(location(config.model), tokenizer.eos_token_id)
        named = [tokenizer.pad_token_id, tokenizer.eos_token_id, 0]  # it is masked: any will do
        self.pad: int = next(token for token in named if token is not None)
        self.speech = Speech.of(tokenizer, config.data)
        spec = config.rollout.environment
        self.environments = None if spec is None else Environments(spec, self.speech)
        self.version = 0
        self._batches = 0

    def refresh(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Weights by transformers' names, all of them; tied ones come once. Raises ValueError for one that the model lacks, or that is missing."""
        missing, unexpected = self.lm.load_state_dict(dict(weights), strict=False)
        if unexpected or (lacking := set(missing) & dict(self.lm.named_parameters()).keys()):
            raise ValueError(f"hf: the policy's weights do not fit: {unexpected or sorted(lacking)}")
        self.version = version

    def generate(self, requests: list[Request], deadline_seconds: float) -> list[Sample]:
        """One completion a request, in order. Raises DeadlineExceeded, EnvironmentFailed."""
        end = time.monotonic() + deadline_seconds
        if self.environments is not None:
            return asyncio.run(self._play(self.environments, requests, end))
        episodes = [Episode(request) for request in requests]
        rows = max(1, SCORES // (self.lm.config.vocab_size * max((episode.left for episode in episodes), default=1)))
        for start in range(0, len(episodes), rows):
            batch = episodes[start : start + rows]
            for episode, turn in zip(batch, self._turns(batch, end), strict=True):
                episode.add(turn)
        return [episode.sample(self.speech) for episode in episodes]

    async def _play(self, environments: Environments, requests: list[Request], end: float) -> list[Sample]:
        async def turn(episode: Episode) -> Turn:
            return self._turns([episode], end)[0]

        return list(await asyncio.gather(*(environments.play(request, turn) for request in requests)))

    @torch.no_grad()
    def _turns(self, episodes: list[Episode], end: float) -> list[Turn]:
        """One of each, of the same temperature."""
        if time.monotonic() > end:
            raise DeadlineExceeded(f"trainer rank {self.rank} did not generate its share in spec.rollout.deadlineSeconds")
        ids, mask = self._padded([episode.context for episode in episodes])
        options = self._options(episodes[0].request.temperature, max(episode.left for episode in episodes))
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self._seed(episodes[0]))
            made = self.lm.generate(input_ids=ids, attention_mask=mask, generation_config=options)
        logprobs = self.lm.compute_transition_scores(made.sequences, made.scores, normalize_logits=True)
        rows = zip(episodes, made.sequences[:, ids.shape[1] :].tolist(), logprobs.tolist(), strict=True)
        return [self._turn(tokens[: episode.left], values) for episode, tokens, values in rows]

    def _padded(self, contexts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, (rows, longest), padded on the left."""
        longest = max(map(len, contexts))
        ids = torch.tensor([[self.pad] * (longest - len(row)) + row for row in contexts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in contexts], device=self.device)
        return ids, mask

    def _options(self, temperature: float, tokens: int) -> GenerationConfig:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
        return GenerationConfig(
            **sampling, max_new_tokens=tokens, eos_token_id=self.ends or None, pad_token_id=self.pad,
            return_dict_in_generate=True, output_scores=True,
        )

    def _seed(self, episode: Episode) -> int:
        """A batch has one: its first sample's, so that the same batch gives the same samples."""
        self._batches += 1
        seed = episode.seed
        return request_seed(self.config.sampling_seed, self.version, str(self.rank), self._batches) if seed is None else seed

    def _turn(self, tokens: list[int], logprobs: list[float]) -> Turn:
        stop = next((index + 1 for index, token in enumerate(tokens) if token in self.ends), None)
        tokens = tokens[:stop]
        return Turn(tokens, logprobs[: len(tokens)], [self.version] * len(tokens), "length" if stop is None else "stop")

    def close(self) -> None:
        if self.environments is not None:
            self.environments.close()


def _ends(path: str, end: int | None) -> list[int]:
    """Tokens that end a completion, as vLLM takes them: the tokenizer's, and those of the generation config.

    A base model may have none: its completions end by their length.
    """
    try:
        named = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        named = None
    return sorted({end, *(named if isinstance(named, list) else [named])} - {None})

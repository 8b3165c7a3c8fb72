"""A language model as judge, behind an OpenAI-compatible chat URL such as vLLM's own server."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_api.job import RewardSpec
from rlhf_worker.errors import BadSpec
from rlhf_worker.experience import Sample
from rlhf_worker.rewards.attempt import Failure, Judgement, arguments
from rlhf_worker.rewards.http import Service

HOLE = re.compile(r"\{([A-Za-z_]\w*)\}")


class JudgeReward(Service):
    """One question a sample; its value is (score - low) / (high - low). An answer without a score, or out of the scale,
    is asked for again.
    """

    def __init__(self, spec: RewardSpec, backoff: float = 0.5) -> None:
        super().__init__(spec, backoff)
        assert spec.judge is not None
        self.judge, self._pattern = spec.judge, re.compile(spec.judge.pattern)
        if name := spec.judge.api_key_env:
            field, key = f"rewards[{spec.name}].judge.apiKeyEnv", os.environ.get(name, "").strip()
            if not key:
                where = "set it in pods.trainer.env, from a Secret"
                raise BadSpec(f"{field}: {name} is not set in the trainer pods: {where}")
            if not (key.isascii() and key.isprintable()):
                raise BadSpec(f"{field}: {name} holds characters that no header may have: correct the Secret")
            self.headers = {"authorization": f"Bearer {key}"}

    def question(self, batch: Sequence[Sample], attempt: int) -> Mapping[str, Any]:
        # What a judge answers at temperature 0 it would answer again.
        sampling = {"temperature": 1.0 if attempt else 0.0, "max_tokens": self.judge.max_tokens}
        return {
            "model": self.judge.model, "messages": [{"role": "user", "content": self._filled(batch[0])}], **sampling,
        }

    def _filled(self, sample: Sample) -> str:
        """The prompt with its holes filled, once: braces in a completion are text. Raises BadSpec for a hole that the
        row cannot fill.
        """
        row = arguments(sample)
        if not isinstance(row["prompt"], str):  # chat messages
            row["prompt"] = sample.prompt.text

        def fill(hole: re.Match[str]) -> str:
            if (name := hole[1]) not in row:
                raise BadSpec(f"rewards[{self.spec.name}].judge.prompt: the data has no column {name!r}, only "
                    f"{', '.join(map(repr, row))}")
            return row[name] if isinstance(row[name], str) else json.dumps(row[name], default=str)

        return HOLE.sub(fill, self.judge.prompt)

    def values(self, answer: Any, count: int) -> list[Judgement]:
        try:
            text = answer["choices"][0]["message"]["content"]
            matches = list(self._pattern.finditer(text or ""))
        except (KeyError, IndexError, TypeError):
            raise Failure(f"no answer of chat completions: {json.dumps(answer):.300}") from None
        if not matches:
            raise Failure(f"no score by judge.pattern in the judge's answer {text!r:.300}")
        return [Judgement(self._scaled(matches[-1][1], text))]

    def _scaled(self, score: str | None, text: str) -> float:
        low, high = self.judge.low, self.judge.high
        try:
            value = float(score or "")
        except ValueError:
            raise Failure(f"the score {score!r} is no number, in the judge's answer {text!r:.300}") from None
        if not low <= value <= high:  # also NaN
            raise Failure(f"the score {value:g} is not in {low:g} to {high:g}, in the judge's answer {text!r:.300}")
        return (value - low) / (high - low)

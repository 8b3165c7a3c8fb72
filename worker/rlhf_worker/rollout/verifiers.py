"""Environments of `verifiers` packages (their v0 interface, MultiTurnEnv and its kinds) as rollout.environment.

The package says what follows a turn and what the episode is worth; turns are sampled by the run. In `environment.code`:

    from rlhf_worker.rollout.verifiers import environment
    Environment = environment("wordle", max_turns=6)
"""

import asyncio
from typing import Any


def environment(name: str, **options: Any) -> type:
    """What verifiers.load_environment(name, **options) gives, as a class for rollout.environment.

    Raises ImportError where the package is missing, LookupError for an environment that calls tools by the API's own
    field, which a completion's text does not have; or what loading raises.
    """
    try:
        import verifiers
    except ImportError as error:
        raise ImportError(
            f"the image has no python package verifiers: use an image that has it, and the environment {name}"
        ) from error
    loaded, runner = verifiers.load_environment(name, **options), asyncio.Runner()
    if getattr(loaded, "tool_defs", None):
        raise LookupError(f"the environment {name} calls tools by the API's own field: it cannot be used here")

    class Environment:
        """One episode. Its calls share an event loop, since environments keep connections in it."""

        def reset(self, **row: Any) -> None:
            self.episode = VerifiersEpisode(verifiers, loaded)
            runner.run(self.episode.begin(row))

        def step(self, completion: str) -> dict[str, Any]:
            answer: dict[str, Any] = runner.run(self.episode.answer(completion))
            return answer

    return Environment


class VerifiersEpisode:
    """The rollout loop of verifiers, turned inside out: `answer` is what it does between two responses of a model."""

    def __init__(self, verifiers: Any, env: Any) -> None:
        self.verifiers, self.env = verifiers, env

    async def begin(self, row: dict[str, Any]) -> None:
        client = self.verifiers.ClientConfig()  # nothing is asked of it
        state = await self.env.init_state({"example_id": 0, **row}, client, "policy", None)
        self.state = await self.env.setup_state(state) or state
        self.prompt = await self.env.get_prompt_messages(self.state)

    async def answer(self, completion: str) -> dict[str, Any]:
        state, env = self.state, self.env
        said = self.verifiers.AssistantMessage(role="assistant", content=completion)
        turn = {"prompt": self.prompt, "completion": [said], "response": None, "tokens": None, "reward": None}
        about = {"advantage": None, "is_truncated": False, "trajectory_id": state["trajectory_id"], "extras": {}}
        await env.add_trajectory_step(state, {**turn, **about})
        if not await env.is_completed(state):
            messages = await env.get_prompt_messages(state)
            if not await env.is_completed(state):
                observation = "\n\n".join(map(_text, messages[len(self.prompt) + 1 :]))
                self.prompt = messages
                return {"observation": observation, "done": False, "reward": None}
        await env.cleanup(state)
        await env.rubric.score_rollout(state)
        return {"observation": "", "done": True, "reward": state["reward"]}


def _text(message: Any) -> str:
    content = message["content"] if isinstance(message, dict) else message.content
    if not isinstance(content, str):
        raise TypeError(f"an observation is text: {content!r:.200}")
    return content

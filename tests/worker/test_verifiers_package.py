"""The adapter of `verifiers` environments. The package is not installed here: a stand-in has the hooks that are called.
"""

from pathlib import Path
from typing import Any

import pytest

from rlhf_api.job import EnvironmentSpec
from rlhf_worker.errors import BadSpec
from rlhf_worker.rollout.environment import Environments
from tests.worker.test_environment import request, says, speech

CODE = "from rlhf_worker.rollout.verifiers import environment\nEnvironment = environment('guess', max_turns=3)\n"
STAND_IN = '''
class AssistantMessage(dict):
    content = property(lambda self: self["content"])

class ClientConfig: ...

class Rubric:
    async def score_rollout(self, state):
        assert state["cleaned"]
        state["reward"] = 1.0 - 0.25 * len(state["trajectory"])

class Guess:
    tool_defs, rubric = TOOLS, Rubric()
    def __init__(self, max_turns):
        self.max_turns = max_turns
    async def init_state(self, input, client, model, sampling_args):
        return {**input, "trajectory": [], "trajectory_id": "1", "cleaned": False}
    async def setup_state(self, state):
        state["target"] = state["answer"]
    async def add_trajectory_step(self, state, step):
        state["trajectory"].append(step)
    async def is_completed(self, state):
        turns = state["trajectory"]
        right = bool(turns) and turns[-1]["completion"][0].content == str(state["target"])
        return right or len(turns) >= self.max_turns
    async def get_prompt_messages(self, state):
        if not state["trajectory"]:
            return state["prompt"]
        last = state["trajectory"][-1]
        return [*last["prompt"], *last["completion"], {"role": "user", "content": " no"}]
    async def cleanup(self, state):
        state["cleaned"] = True

def load_environment(name, **options):
    assert name == "guess"
    return Guess(**options)
'''


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    import os

    def write(text: str) -> None:
        (tmp_path / "verifiers.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")

    return write


async def played(*turns: str) -> Any:
    table = Environments(EnvironmentSpec.model_validate({"code": CODE, "timeoutSeconds": 60.0, "workers": 1}), speech())
    try:
        wanted = request(answer=5, prompt=[{"role": "user", "content": "2 + 3 ="}])
        return await table.play(wanted, says(*turns))  # type: ignore[arg-type]
    finally:
        table.close()


async def test_an_episode_goes_by_the_packages_hooks_and_is_worth_what_its_rubric_says(stand_in: Any) -> None:
    stand_in(STAND_IN.replace("TOOLS", "[]"))
    sample = await played("4", "5")
    assert (sample.text, sample.episode_reward) == ("4 no5", 0.5)
    assert (await played("1", "2", "3", "4")).episode_reward == 0.25  # its own max_turns


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (STAND_IN.replace("TOOLS", "['search']"), "environment guess calls tools by the API's own field"),
        ("raise ImportError('not here')", "no python package verifiers: use an image that has it, and the environment"),
    ],
)
async def test_what_cannot_be_adapted_is_refused_at_once(stand_in: Any, text: str, words: str) -> None:
    stand_in(text)
    with pytest.raises(BadSpec, match=f"(?s)rollout.environment.code cannot be loaded.*{words}"):
        await played("4")

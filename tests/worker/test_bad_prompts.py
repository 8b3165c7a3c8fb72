"""What users bring as prompts, through the feed's start with a real tokenizer: the driver's exit code and its words."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from rlhf_api.progress import EXIT_BAD_DATA, EXIT_BAD_SPEC, EXIT_OK
from rlhf_worker.feed.feed import Feed
from rlhf_worker.run import guarded
from tests.worker.configs import run_config

EOS = 2
HTTP = {"name": "r", "type": "http", "url": "http://reward"}


@pytest.fixture(scope="module")
def model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, whose tokenizer knows a token more than its embedding, and ends every text with EOS."""
    directory = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(tiny, directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["<new>"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", EOS)]
    )
    tokenizer.save_pretrained(directory)
    return directory


def feed(model: Path, path: Path, rows: list[Any], **data: Any) -> Feed:
    (path / "p.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = {"jsonl": {"path": str(path / "p.jsonl")}, **data}
    spec = {name: value for name, value in data.items() if value is not None}
    return Feed(run_config(model={"path": str(model)}, data=spec, rewards=[HTTP]))


@pytest.mark.parametrize(
    ("rows", "data", "code", "words"),
    [
        ([{"prompt": "a"}, {"prompt": "b<new>"}], {}, EXIT_BAD_DATA, "line 2: the text has token 81, and the model's"),
        ([{"prompt": "a"}, {"prompt": "b\ud83d"}], {}, EXIT_BAD_DATA, r"line 2: character 1 is half a surrogate pair"),
        ([{"prompt": "a"}, {"prompt": [{"role": "user", "content": None}]}], {}, EXIT_BAD_DATA, "line 2: 'prompt' h"),
        ([{"prompt": "a"}, {"prompt": "b", "x": float("nan")}], {}, EXIT_BAD_DATA, "line 2: column 'x' is no JSON"),
        ([{"prompt": "a"}, {"prompt": "bc"}], {"maxPromptTokens": 2}, EXIT_BAD_DATA, "1 of 2 prompts are longer"),
        ([{"prompt": "a"}, {"prompt": "bc"}], {"maxPromptTokens": 2, "overlongPrompts": "drop"}, EXIT_OK, ""),
        ([{"prompt": "a"}], {"chatTemplateText": "{{ messages }}\n\n{{"}, EXIT_BAD_SPEC, "chatTemplateText, line 3: "),
        ([{"prompt": "a"}], {"jsonl": None, "dataset": {"path": "SCRIPT"}}, EXIT_BAD_DATA, "data.dataset: "),
    ],
)  # fmt: skip
def test_prompts_end_a_run_at_its_start_with_their_line(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    rows: list[Any], data: dict[str, Any], code: int, words: str,
) -> None:  # fmt: skip
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text("import datasets\n")
    given = json.loads(json.dumps(data).replace("SCRIPT", str(tmp_path / "script")))
    opened = feed(model, tmp_path, rows, **given)
    assert guarded(opened.open) == code
    assert words in capfd.readouterr().err


def test_no_prompt_ends_in_eos_or_begins_twice(model: Path, tmp_path: Path) -> None:
    opened = feed(model, tmp_path, [{"prompt": "ab"}, {"prompt": "<s>ab"}])
    opened.open()
    alone = AutoTokenizer.from_pretrained(model).encode("ab", add_special_tokens=False)
    assert [prompt.token_ids for prompt in opened.sampler.first(2)] == [[1, *alone]] * 2
    opened.scorer.close()

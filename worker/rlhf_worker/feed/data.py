"""Prompts: rows from a file, a dataset or reasoning-gym, and the sampler that draws, renders and tokenises them.

The order is a function of seed and epoch alone, so a sampler's whole state is two numbers (and a digest that notices other data).
"""

import difflib
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from rlhf_api.job import DataSpec, HubData, JsonlData, ParquetData, ReasoningGymData
from rlhf_worker.errors import BadData, BadSpec
from rlhf_worker.experience import Prompt

Row = dict[str, Any]
DIGEST_ROWS = 16


class Rows(Protocol):
    """A table by row number."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Row: ...


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that rendering needs."""

    @property
    def chat_template(self) -> Any: ...
    def apply_chat_template(self, conversation: list[dict[str, Any]], *, tokenize: bool, add_generation_prompt: bool) -> Any: ...
    def encode(self, text: str, *, add_special_tokens: bool) -> Any: ...


class PromptSource:
    """The rows of `data`, opened once; `place(row)` says where a row is, for error messages.

    Raises BadData for what cannot be read, is empty or lacks the prompt column, BadSpec for a reasoning-gym task that does not exist.
    """

    def __init__(self, spec: DataSpec) -> None:
        self._spec = spec
        self.name, self.rows, self._lines = _open(spec)
        self.prompt_field = "question" if spec.reasoning_gym else spec.prompt_field
        if len(self.rows) == 0:
            raise BadData(f"{self.name}: there are no rows: give at least one prompt")
        self._prompt(0)

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, row: int) -> str:
        if self._spec.jsonl:
            return f"data.jsonl: {self._spec.jsonl.path}, line {self._lines[row]}"
        return f"{self.name}, row {row}"

    def _prompt(self, row: int) -> tuple[Any, Row]:
        fields = self.rows[row]
        prompt = fields.get(self.prompt_field)
        if prompt is None:
            raise BadData(
                f"{self.place(row)}: no {self.prompt_field!r} among {', '.join(map(repr, fields))}: set data.promptField to the prompt's column"
            )
        if not (isinstance(prompt, str) and prompt.strip()) and not _is_chat(prompt):
            raise BadData(
                f"{self.place(row)}: {self.prompt_field!r} must be text or a list of chat messages, and not empty: it is {prompt!r:.80}"
            )
        return prompt, fields

    def read(self, row: int) -> tuple[str | list[dict[str, Any]], Row]:
        """The prompt of a row, and what rewards get: its columns, with the prompt under `prompt`. Raises BadData."""
        prompt, fields = self._prompt(row)
        return prompt, {**{key: value for key, value in fields.items() if key != "completion"}, "prompt": prompt}

    def digest(self) -> str:
        """A short mark of the data: its size and some of its prompts, or how they are made."""
        step = max(1, len(self) // DIGEST_ROWS)
        # Some reasoning-gym tasks iterate over sets, so that another process words the same problem otherwise.
        made = self._spec.reasoning_gym and [self._spec.reasoning_gym.to_dict(), self._spec.seed]
        mark = made or [self.rows[row].get(self.prompt_field) for row in range(0, len(self), step)]
        return hashlib.sha256(json.dumps([len(self), mark], default=str, sort_keys=True).encode()).hexdigest()[:16]


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt)


def _open(spec: DataSpec) -> tuple[str, Rows, list[int]]:
    """Name, rows, and each row's line where the source has lines."""
    if spec.jsonl:
        by_line = _json_lines(spec.jsonl)
        return f"data.jsonl {spec.jsonl.path}", list(by_line.values()), list(by_line)
    if spec.parquet:
        return f"data.parquet {spec.parquet.path}", _Parquet(spec.parquet), []
    if spec.dataset:
        return f"data.dataset {spec.dataset.path}", _dataset(spec.dataset), []
    assert spec.reasoning_gym is not None
    return f"data.reasoningGym {spec.reasoning_gym.task}", _ReasoningGym(spec.reasoning_gym, spec.seed), []


def _json_lines(spec: JsonlData) -> dict[int, Row]:
    """The rows by their lines, read whole, so that a broken line is found before the run begins. Blank lines are skipped."""
    try:
        lines = Path(spec.path).read_bytes().split(b"\n")
    except OSError as error:
        raise BadData(f"data.jsonl.path: {spec.path}: {error.strerror}: is the volume mounted in the pods that read it?") from None
    return {number: _json_row(f"data.jsonl: {spec.path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()}


def _json_row(place: str, line: bytes) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise BadData(f"{place}: not JSON: {error}: correct or remove the line") from None
    if not isinstance(row, dict):
        raise BadData(f'{place}: must be an object, such as {{"prompt": "..."}}, not {line[:40]!r}')
    return row


class _Parquet:
    """A Parquet file, or a directory of them in the order of their names, in memory as one Arrow table."""

    def __init__(self, spec: ParquetData) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not Path(spec.path).exists():
            raise BadData(f"data.parquet.path: {spec.path}: No such file or directory: is the volume mounted in the pods that read it?")
        try:
            self._table = pq.read_table(spec.path)
        except (pa.ArrowException, OSError) as error:
            raise BadData(f"data.parquet.path: {spec.path}: {error}") from None

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int, /) -> Row:
        row: Row = self._table.slice(index, 1).to_pylist()[0]
        return row


def _dataset(spec: HubData) -> Rows:
    """A Hugging Face dataset: what `save_to_disk` wrote, or what `load_dataset` reads. An unreachable hub stays OSError: it may come back."""
    from datasets.exceptions import DatasetsError

    try:
        rows: Rows = _load_dataset(spec)
    except (DatasetsError, FileNotFoundError, NotADirectoryError, ValueError, LookupError) as error:
        reason = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error  # what lies behind "An error occurred"
        if isinstance(reason, OSError) and not isinstance(reason, FileNotFoundError | NotADirectoryError):
            raise reason from None
        where = f"data.dataset: {spec.path} (name {spec.name}, split {spec.split})"
        raise BadData(f"{where}: {type(reason).__name__}: {reason}: correct path, name or split, and give at least one prompt") from None
    return rows


def _load_dataset(spec: HubData) -> Any:
    from datasets import load_dataset, load_from_disk

    path = Path(spec.path)
    if (path / "dataset_dict.json").exists():
        return load_from_disk(spec.path)[spec.split]
    if (path / "state.json").exists():
        return load_from_disk(spec.path)
    return load_dataset(spec.path, spec.name, split=spec.split)


class _ReasoningGym:
    """Problems of a reasoning-gym task. Each row carries what the task's own verifier needs (rewards/reasoning_gym.py)."""

    def __init__(self, spec: ReasoningGymData, seed: int) -> None:
        from reasoning_gym.factory import DATASETS, create_dataset

        if spec.task not in DATASETS:
            close = difflib.get_close_matches(spec.task, DATASETS, n=3, cutoff=0.5)
            raise BadSpec(f"data.reasoningGym.task: there is no {spec.task!r}" + (f"; did you mean {' or '.join(close)}?" if close else ""))
        try:
            self._problems = create_dataset(spec.task, seed=seed, size=spec.size, **spec.config)
        except (TypeError, ValueError, AssertionError) as error:
            raise BadSpec(f"data.reasoningGym.config: {spec.task} refuses {spec.config}: {error}") from None
        self._verifier = {"task": spec.task, "config": spec.config}

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, index: int, /) -> Row:
        return {**self._problems[index], "verifier": self._verifier}


class PromptSampler:
    """Draws prompts: every row once an epoch, in an order made from seed and epoch."""

    def __init__(self, source: PromptSource, tokenizer: Tokenizer, spec: DataSpec) -> None:
        self._source, self._tokenizer, self._spec = source, tokenizer, spec
        self._chat = spec.chat_template and tokenizer.chat_template is not None
        if spec.system_prompt and not self._chat:
            raise BadSpec("data.systemPrompt needs a chat template: remove it, or set data.chatTemplate with a tokenizer that has one")
        self._digest = source.digest()
        self._drawn = 0

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts, over as many epochs as they take. Raises BadData; then none is consumed."""
        prompts = [self._prompt(*self._locate(index)) for index in range(self._drawn, self._drawn + count)]
        self._drawn += count
        return prompts

    def first(self, count: int | None) -> list[Prompt]:
        """The first rows (None: all) in the order of the source, of epoch 0. Consumes nothing. Raises BadData."""
        return [self._prompt(0, row) for row in range(len(self._source))[:count]]

    def again(self, uids: Sequence[str]) -> list[Prompt]:
        """Prompts that were drawn before, by their uids. Consumes nothing. Raises BadData."""
        return [self._prompt(*map(int, uid.split(":"))) for uid in uids]

    def check(self, count: int) -> None:
        """Render the rows of the next `count` prompts, each once, without consuming them: a run's bad row fails it at its start."""
        ahead = range(self._drawn, self._drawn + min(count, 2 * len(self._source)))  # two epochs hold one whole
        for row in sorted({self._locate(index)[1] for index in ahead}):
            self._prompt(0, row)

    def state(self) -> dict[str, Any]:
        epoch, position = divmod(self._drawn, len(self._source))
        return {"epoch": epoch, "position": position, "data": self._digest, "seed": self._spec.seed}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state()` was taken. Raises BadData if the data or the seed is another."""
        if (state["data"], state["seed"]) != (self._digest, self._spec.seed):
            raise BadData(
                f"{self._source.name}: the checkpoint was made with other data or another data.seed: restore them, or start with an empty checkpoint.path"
            )
        self._drawn = state["epoch"] * len(self._source) + state["position"]

    def _locate(self, index: int) -> tuple[int, int]:
        """Epoch and row of the run's prompt `index`."""
        epoch, position = divmod(index, len(self._source))
        return epoch, _permutation(self._spec.seed, epoch, len(self._source))[position]

    def _prompt(self, epoch: int, row: int) -> Prompt:
        prompt, fields = self._source.read(row)
        text, token_ids = self._render(row, prompt)
        if len(token_ids) > self._spec.max_prompt_tokens:
            raise BadData(
                f"{self._source.place(row)}: the prompt has {len(token_ids)} tokens, data.maxPromptTokens is {self._spec.max_prompt_tokens}: shorten it or raise the limit"
            )
        return Prompt(uid=f"{epoch}:{row}", epoch=epoch, row=row, token_ids=token_ids, text=text, fields=fields)

    def _render(self, row: int, prompt: str | list[dict[str, Any]]) -> tuple[str, list[int]]:
        if self._chat:
            text = self._apply_template(row, [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
        elif isinstance(prompt, str):
            text = prompt
        else:
            raise BadData(
                f"{self._source.place(row)}: a list of chat messages needs data.chatTemplate and a tokenizer with a chat template"
            )
        token_ids = list(self._tokenizer.encode(text, add_special_tokens=not self._chat))
        if not token_ids:
            raise BadData(f"{self._source.place(row)}: the prompt has no tokens")
        return text, token_ids

    def _apply_template(self, row: int, messages: list[dict[str, Any]]) -> str:
        from jinja2 import TemplateError

        system = [{"role": "system", "content": self._spec.system_prompt}] if self._spec.system_prompt else []
        try:
            return str(self._tokenizer.apply_chat_template([*system, *messages], tokenize=False, add_generation_prompt=True))
        except (TemplateError, TypeError) as error:
            raise BadData(f"{self._source.place(row)}: the chat template refuses the messages: {error}") from None


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, rows: int) -> list[int]:
    order = list(range(rows))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return order

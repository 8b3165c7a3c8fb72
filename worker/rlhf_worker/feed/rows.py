"""Rows from files, datasets and reasoning-gym: what of a row is the prompt, and what rewards and environments get."""

import difflib
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlhf_api.job import HubData, JsonlData, ParquetData, PromptsSpec, ReasoningGymData
from rlhf_worker.errors import BadData, BadSpec, Call, Passing, Verdict, explained, said, verdict
from rlhf_worker.rewards.attempt import no_json
from rlhf_worker.template import Message, Unfit

Row = dict[str, Any]
DIGEST_ROWS = 16
MOUNTED = "is the volume mounted in the pods that read it?"


class Rows(Protocol):
    """A table by row number."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Row: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where rows come from, and who gets them."""

    field: str = "data"  # of the spec
    source: str = ""  # of data.sources
    rewards: tuple[str, ...] | None = None  # that judge it; None: all
    taken: Collection[str] = ()  # names that no column may have
    sent: bool = False  # to a service, as JSON


ALONE = Origin()


class PromptSource:
    """The rows of a source, opened once; `place(row)` says where a row is, for error messages.

    Raises BadData for what cannot be read, is empty or lacks the prompt column, BadSpec for a reasoning-gym task that
    does not exist.
    """

    def __init__(self, spec: PromptsSpec, origin: Origin = ALONE) -> None:
        self._spec, self.origin = spec, origin
        name, self.rows, self._lines = _open(spec, origin.field)
        self.name = f"{origin.field}.{name}"
        self.prompt_field = "question" if spec.reasoning_gym else spec.prompt_field
        if len(self.rows) == 0:
            raise BadData(f"{self.name}: there are no rows: give at least one prompt")
        self._prompt(0)

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, row: int) -> str:
        if self._spec.jsonl:
            return f"{self.origin.field}.jsonl: {self._spec.jsonl.path}, line {self._lines[row]}"
        return f"{self.name}, row {row}"

    def _fields(self, row: int) -> Row:
        with explained(Call.ROW, self.place(row)):
            return self.rows[row]

    def _prompt(self, row: int) -> tuple[str | list[Message], Row]:
        fields = self._fields(row)
        if self.prompt_field not in fields:
            columns = ", ".join(map(repr, fields))
            raise BadData(
                f"{self.place(row)}: no {self.prompt_field!r} among {columns}: "
                f"set {self.origin.field}.promptField to the prompt's column"
            )
        try:
            return _prompt(fields[self.prompt_field]), fields
        except Unfit as error:
            raise BadData(f"{self.place(row)}: {self.prompt_field!r} {error}") from None

    def read(self, row: int) -> tuple[str | list[Message], Row]:
        """The prompt of a row, and what rewards get: its columns, with the prompt under `prompt`. Raises BadData."""
        prompt, fields = self._prompt(row)
        if wrong := sorted(set(self.origin.taken) & fields.keys()):
            names = ", ".join(map(repr, wrong))
            raise BadData(
                f"{self.place(row)}: an environment's reset has a parameter {names}, "
                "so no column can have this name: rename it"
            )
        given = {**{key: value for key, value in fields.items() if key != "completion"}, "prompt": prompt}
        if self.origin.sent and (words := no_json(given)):
            raise BadData(
                f"{self.place(row)}: {words}, and a reward of type http is sent it: "
                "convert the column to text or numbers, or remove it"
            )
        return prompt, given

    @property
    def hidden(self) -> list[str]:
        """Columns of the first row that nobody gets, for the run itself gives rewards and environments these names."""
        names = {"completion"} | ({"prompt"} - {self.prompt_field})
        return sorted(names & self._fields(0).keys())

    def digest(self) -> str:
        """A short mark of the data: its size and some of its prompts, or how they are made."""
        step = max(1, len(self) // DIGEST_ROWS)
        # Some reasoning-gym tasks iterate over sets, so that another process words the same problem otherwise.
        task = self._spec.reasoning_gym and [self._spec.reasoning_gym.to_dict(), self._spec.seed]
        mark = task or [self._fields(row).get(self.prompt_field) for row in range(0, len(self), step)]
        return hashlib.sha256(json.dumps([len(self), mark], default=str, sort_keys=True).encode()).hexdigest()[:16]


def _prompt(value: Any) -> str | list[Message]:
    """Text, or chat messages with their content as text. Raises Unfit."""
    if value is None:
        raise Unfit("is null: give the row a prompt, or remove it")
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and value:
        return [_message(message, number) for number, message in enumerate(value, 1)]
    raise Unfit(f"must be text or a list of chat messages, and not empty: it is {value!r:.80}")


def _message(message: Any, number: int) -> Message:
    """Without its nulls: in a column of structs every message has every key. Only calls of tools need no content."""
    if not (isinstance(message, dict) and isinstance(message.get("role"), str)):
        raise Unfit(
            f"must be text or a list of chat messages with role and content: message {number} is {message!r:.80}"
        )
    kept = {key: value for key, value in message.items() if value is not None}
    content = kept.get("content", "" if kept.get("tool_calls") else None)
    if isinstance(content, list) and content:
        content = "".join(_part(part, number) for part in content)
    if not isinstance(content, str):
        raise Unfit(
            f"has message {number} with content {content!r:.80}: it must be text, or a list of parts of type text"
        )
    return {**kept, "content": content}


def _part(part: Any, number: int) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
    if not isinstance(text, str):
        raise Unfit(f"has message {number} with a part {part!r:.80}: only parts of type text can be trained on")
    return text


def _open(spec: PromptsSpec, field: str) -> tuple[str, Rows, list[int]]:
    """Name, rows, and each row's line where the source has lines."""
    if spec.jsonl:
        by_line = _json_lines(spec.jsonl, f"{field}.jsonl")
        return f"jsonl {spec.jsonl.path}", list(by_line.values()), list(by_line)
    if spec.parquet:
        return f"parquet {spec.parquet.path}", _Parquet(spec.parquet, f"{field}.parquet"), []
    if spec.dataset:
        return f"dataset {spec.dataset.path}", _dataset(spec.dataset, f"{field}.dataset"), []
    assert spec.reasoning_gym is not None
    return (
        f"reasoningGym {spec.reasoning_gym.task}",
        _ReasoningGym(spec.reasoning_gym, spec.seed, f"{field}.reasoningGym"), [],
    )


def _json_lines(spec: JsonlData, field: str) -> dict[int, Row]:
    """The rows by their lines, read whole, so that a broken line is found before the run begins; no blank lines."""
    with _reading(f"{field}.path: {spec.path}", MOUNTED):
        lines = Path(spec.path).read_bytes().split(b"\n")
    return {
        number: _json_row(f"{field}: {spec.path}, line {number}", line)
        for number, line in enumerate(lines, 1)
        if line.strip()
    }


def _json_row(place: str, line: bytes) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise BadData(f"{place}: not JSON: {error}: correct or remove the line") from None
    if not isinstance(row, dict):
        raise BadData(f'{place}: must be an object, such as {{"prompt": "..."}}, not {line[:40]!r}')
    return row


class _Parquet:
    """A Parquet file, or a directory of them in the order of their names, as one Arrow table with all their columns."""

    def __init__(self, spec: ParquetData, field: str) -> None:
        import pyarrow as pa
        import pyarrow.dataset as pads

        with _reading(f"{field}.path: {spec.path}", MOUNTED):
            files = pads.dataset(spec.path, format="parquet", partitioning="hive")
            schemas = [files.schema, *(fragment.physical_schema for fragment in files.get_fragments())]
            schema = pa.unify_schemas(schemas, promote_options="permissive")  # a dataset's own is the first file's
            self._table = files.replace_schema(schema).to_table()

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int, /) -> Row:
        row: Row = self._table.slice(index, 1).to_pylist()[0]
        return row


def _dataset(spec: HubData, field: str) -> Rows:
    """A Hugging Face dataset: what `save_to_disk` wrote, or what `load_dataset` reads. Raises BadData, Passing."""
    fix = "correct path, name or split, and give at least one prompt"
    with _reading(f"{field}: {spec.path} (name {spec.name}, split {spec.split})", fix):
        rows: Rows = _load_dataset(spec)
    return rows


@contextmanager
def _reading(where: str, fix: str) -> Iterator[None]:
    """Raises BadData, or Passing for what is no verdict on the data: an unreachable hub, storage that fails."""
    try:
        yield
    except Exception as error:
        # what lies behind "An error occurred"
        reason = error.__cause__ if "datasets" in type(error).__module__ and error.__cause__ else error
        if verdict(Call.DATASET, reason) is Verdict.AGAIN:
            raise Passing(f"{where}: {said(reason)}") from error
        raise BadData(f"{where}: {said(reason)}: {fix}") from None


def _load_dataset(spec: HubData) -> Any:
    from datasets import DatasetDict, load_dataset, load_from_disk

    path = Path(spec.path)
    if not any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        return load_dataset(spec.path, spec.name, split=spec.split)
    saved = load_from_disk(spec.path)
    return _split(
        dict(saved) if isinstance(saved, DatasetDict) else {"train": saved, str(saved.split or "train"): saved},
        spec.split,
    )


def _split(tables: Mapping[str, Any], split: str) -> Any:
    """Also a slice or a sum of splits, such as train[:1000], as `load_dataset` means it. Raises ValueError."""
    from datasets import ReadInstruction, concatenate_datasets

    parts = ReadInstruction.from_spec(split).to_absolute({name: len(table) for name, table in tables.items()})
    return concatenate_datasets([tables[part.splitname].select(range(part.from_, part.to)) for part in parts])


class _ReasoningGym:
    """Problems of a reasoning-gym task. Each row carries what the task's verifier needs (rewards/reasoning_gym.py)."""

    def __init__(self, spec: ReasoningGymData, seed: int, field: str) -> None:
        from reasoning_gym.factory import DATASETS, create_dataset

        if spec.task not in DATASETS:
            close = difflib.get_close_matches(spec.task, DATASETS, n=3, cutoff=0.5)
            raise BadSpec(
                f"{field}.task: there is no {spec.task!r}" + (f"; did you mean {' or '.join(close)}?" if close else "")
            )
        try:
            self._problems = create_dataset(spec.task, seed=seed, size=spec.size, **spec.config)
        except (TypeError, ValueError, AssertionError) as error:
            raise BadSpec(f"{field}.config: {spec.task} refuses {spec.config}: {error}") from None
        self._verifier = {"task": spec.task, "config": spec.config}

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, index: int, /) -> Row:
        return {**self._problems[index], "verifier": self._verifier}

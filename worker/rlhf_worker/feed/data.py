"""Prompts: rows from files, datasets and reasoning-gym, and the samplers that draw, render and tokenise them.

The order is a function of seed and epoch alone, and the turns of several sources one of how many each has given: so a
sampler's whole state is a few numbers a source (and a digest that notices other data).
"""

import difflib
import hashlib
import json
import math
import random
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from rlhf_api.job import DataSpec, HubData, JsonlData, ParquetData, PromptsSpec, ReasoningGymData
from rlhf_worker.errors import BadData, BadSpec, together
from rlhf_worker.experience import Prompt
from rlhf_worker.template import Message, Template, Tokenizer, Unfit

Row = dict[str, Any]
DIGEST_ROWS = 16
TOLD_FAULTS = 5  # rows that an error names
# What reading one row may raise: of a column that does not decode, or needs a package that the image lacks.
BROKEN_ROW = (ValueError, TypeError, LookupError, ImportError, RuntimeError)


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
        try:
            return self.rows[row]
        except BROKEN_ROW as error:
            raise BadData(f"{self.place(row)}: cannot be read: {type(error).__name__}: {error}") from None

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
        if self.origin.sent and (words := _no_json(given)):
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


def _no_json(fields: Row) -> str:
    for name, value in fields.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            return f"column {name!r} is no JSON ({error})"
    return ""


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
        _ReasoningGym(spec.reasoning_gym, spec.seed, f"{field}.reasoningGym"),
        [],
    )


def _json_lines(spec: JsonlData, field: str) -> dict[int, Row]:
    """The rows by their lines, read whole, so that a broken line is found before the run begins; no blank lines."""
    try:
        lines = Path(spec.path).read_bytes().split(b"\n")
    except OSError as error:
        raise BadData(
            f"{field}.path: {spec.path}: {error.strerror}: is the volume mounted in the pods that read it?"
        ) from None
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

        if not Path(spec.path).exists():
            raise BadData(
                f"{field}.path: {spec.path}: No such file or directory: is the volume mounted in the pods that read it?"
            )
        try:
            files = pads.dataset(spec.path, format="parquet", partitioning="hive")
            schemas = [files.schema, *(fragment.physical_schema for fragment in files.get_fragments())]
            schema = pa.unify_schemas(schemas, promote_options="permissive")  # a dataset's own is the first file's
            self._table = files.replace_schema(schema).to_table()
        except (pa.ArrowException, OSError) as error:
            raise BadData(f"{field}.path: {spec.path}: {error}") from None

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int, /) -> Row:
        row: Row = self._table.slice(index, 1).to_pylist()[0]
        return row


def _dataset(spec: HubData, field: str) -> Rows:
    """A Hugging Face dataset: what `save_to_disk` wrote, or what `load_dataset` reads.

    Raises BadData, and as it is what may pass: an unreachable hub, and what of local files is no verdict on them.
    """
    from datasets.exceptions import DatasetsError

    try:
        rows: Rows = _load_dataset(spec)
    except Exception as error:  # of every reader of every format there is
        reason = (
            error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        )  # what lies behind "An error occurred"
        if _may_pass(reason):
            raise reason from None
        where = f"{field}: {spec.path} (name {spec.name}, split {spec.split})"
        raise BadData(
            f"{where}: {type(reason).__name__}: {reason}: correct path, name or split, and give at least one prompt"
        ) from None
    return rows


def _may_pass(error: BaseException) -> bool:
    """Of the network and the machine, and no verdict on the data."""
    verdicts = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
    return isinstance(error, OSError | MemoryError) and not isinstance(error, verdicts)


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


@dataclass(slots=True)
class Survey:
    """What is wrong with rows that were looked at."""

    seen: int = 0
    long: dict[int, int] = field(default_factory=dict)  # row -> tokens
    faults: list[str] = field(default_factory=list)


class PromptSampler:
    """Draws prompts: every row once an epoch, in an order made from seed and epoch, but for those that are dropped."""

    def __init__(self, source: PromptSource, template: Template, spec: PromptsSpec) -> None:
        self._source, self._template, self._spec = source, template, spec
        self._digest = source.digest()
        self._drawn = self._dropped = 0  # places in the order; those of them that gave no prompt

    @property
    def given(self) -> int:
        """Prompts so far."""
        return self._drawn - self._dropped

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts, over as many epochs as they take. Raises BadData; then none is consumed."""
        prompts, end = list[Prompt](), self._drawn
        while len(prompts) < count:
            prompt = self._prompt(*self._locate(end))
            if self._fits(prompt):
                prompts.append(prompt)
            end += 1
            if end - self._drawn >= 2 * len(self._source) and not prompts:
                raise BadData(self._too_long(Survey(len(self._source), {prompt.row: len(prompt.token_ids)})))
        self._dropped += end - self._drawn - count
        self._drawn = end
        return prompts

    def first(self, count: int | None) -> list[Prompt]:
        """The first rows (None: all) in the order of the source, of epoch 0. Consumes nothing. Raises BadData."""
        survey = Survey()
        rows = range(len(self._source)) if self._spec.overlong_prompts == "drop" else range(len(self._source))[:count]
        prompts = list(islice(self._fitting(((0, row) for row in rows), survey), count))
        self._verdict(survey)
        return prompts

    def again(self, uids: Sequence[str]) -> list[Prompt]:
        """Prompts that were drawn before, by their uids. Consumes nothing. Raises BadData."""
        return [self._prompt(*map(int, uid.split(":")[-2:])) for uid in uids]

    def check(self, count: int) -> str:
        """Render the rows of the next `count` prompts, each once, without consuming them.

        So bad rows fail a run at its start, all of them at once.
        Returns what is to be told of prompts that are dropped; empty when none is. Raises BadData.
        """
        survey = Survey()
        ahead = range(self._drawn, self._drawn + 2 * len(self._source))  # two epochs hold one whole
        places = dict.fromkeys(
            self._locate(index)[1] for index in ahead[: count if self._spec.overlong_prompts == "refuse" else None]
        )
        for _ in islice(self._fitting(((0, row) for row in places), survey), count):
            pass
        self._verdict(survey)
        if not survey.long:
            return ""
        return (
            f"{self._source.name}: {len(survey.long)} of {survey.seen} prompts have more than "
            f"{self._spec.max_prompt_tokens} tokens and are dropped"
        )

    def _fitting(self, places: Iterable[tuple[int, int]], survey: Survey) -> Iterator[Prompt]:
        for place in places:
            survey.seen += 1
            try:
                prompt = self._prompt(*place)
            except BadData as error:
                survey.faults.append(str(error))
                continue
            if len(prompt.token_ids) <= self._spec.max_prompt_tokens:
                yield prompt
            else:
                survey.long[prompt.row] = len(prompt.token_ids)

    def _verdict(self, survey: Survey) -> None:
        """Raises BadData."""
        wrong, more = survey.faults[:TOLD_FAULTS], len(survey.faults) - TOLD_FAULTS
        if more > 0:
            wrong.append(f"and {more} more rows of {self._source.name}")
        if survey.long and (self._spec.overlong_prompts == "refuse" or len(survey.long) == survey.seen):
            wrong.append(self._too_long(survey))
        if wrong:
            raise BadData("\n".join(wrong))

    def _too_long(self, survey: Survey) -> str:
        row, most = min(survey.long), max(survey.long.values())
        others = (
            f"; {len(survey.long)} of {survey.seen} prompts are longer, up to {most} tokens" if survey.seen > 1 else ""
        )
        fix = "" if self._spec.overlong_prompts == "drop" else ", or set data.overlongPrompts to drop"
        return (
            f"{self._source.place(row)}: the prompt has {survey.long[row]} tokens, "
            f"data.maxPromptTokens is {self._spec.max_prompt_tokens}{others}: shorten them or raise the limit{fix}"
        )

    def _fits(self, prompt: Prompt) -> bool:
        """Raises BadData where a longer one is not dropped."""
        if len(prompt.token_ids) <= self._spec.max_prompt_tokens:
            return True
        if self._spec.overlong_prompts == "refuse":
            raise BadData(self._too_long(Survey(1, {prompt.row: len(prompt.token_ids)})))
        return False

    def state(self) -> dict[str, Any]:
        epoch, position = divmod(self._drawn, len(self._source))
        return {
            "epoch": epoch,
            "position": position,
            "dropped": self._dropped,
            "data": self._digest,
            "seed": self._spec.seed,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state()` was taken. Raises BadData if the data or the seed is another."""
        if (state.get("data"), state.get("seed")) != (self._digest, self._spec.seed):
            raise BadData(
                f"{self._source.name}: the checkpoint was made with other data or another data.seed: "
                "restore them, or start with an empty checkpoint.path"
            )
        self._drawn = state["epoch"] * len(self._source) + state["position"]
        self._dropped = state.get("dropped", 0)

    def _locate(self, index: int) -> tuple[int, int]:
        """Epoch and row of the run's prompt `index`."""
        epoch, position = divmod(index, len(self._source))
        return epoch, _permutation(self._spec.seed, epoch, len(self._source))[position]

    def _prompt(self, epoch: int, row: int) -> Prompt:
        prompt, fields = self._source.read(row)
        origin = self._source.origin
        try:
            text = self._text(prompt)
            token_ids = self._template.tokens(text, opening=not self._template.chat)
        except Unfit as error:
            raise BadData(f"{self._source.place(row)}: {error}") from None
        uid = f"{origin.source}:{epoch}:{row}" if origin.source else f"{epoch}:{row}"
        return Prompt(
            uid=uid,
            epoch=epoch,
            row=row,
            token_ids=token_ids,
            text=text,
            fields=fields,
            source=origin.source,
            rewards=origin.rewards,
        )

    def _text(self, prompt: str | list[Message]) -> str:
        """Raises Unfit."""
        if self._template.chat:
            system = [{"role": "system", "content": self._spec.system_prompt}] if self._spec.system_prompt else []
            return self._template.render(
                [*system, *([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)]
            )
        if not isinstance(prompt, str):
            raise Unfit(
                "a list of chat messages needs data.chatTemplate and a tokenizer with a chat template, "
                "or data.chatTemplateText"
            )
        return prompt


class Mixture:
    """Draws from several sources: each prompt is of the one that is furthest behind its share of all so far.

    What `PromptSampler` does for one, it does for each.
    """

    def __init__(self, weights: Mapping[str, float], parts: Mapping[str, PromptSampler]) -> None:
        """By the names of the sources, in one order."""
        self._shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
        self._parts = dict(parts)

    def _turns(self, count: int) -> list[str]:
        """The sources of the next prompts: a function of how many each has given."""
        given = {name: part.given for name, part in self._parts.items()}
        turns: list[str] = []
        for total in range(sum(given.values()) + 1, sum(given.values()) + count + 1):
            turns.append(max(given, key=lambda name: self._shares[name] * total - given[name]))
            given[turns[-1]] += 1
        return turns

    def next(self, count: int) -> list[Prompt]:
        turns = self._turns(count)
        drawn = {name: iter(part.next(turns.count(name))) for name, part in self._parts.items()}
        return [next(drawn[name]) for name in turns]

    def first(self, count: int | None) -> list[Prompt]:
        return [prompt for part in self._parts.values() for prompt in part.first(count)]

    def again(self, uids: Sequence[str]) -> list[Prompt]:
        return [self._parts[uid.partition(":")[0]].again([uid])[0] for uid in uids]

    def check(self, count: int) -> str:
        reach = {name: math.ceil(count * share) + 1 for name, share in self._shares.items()}
        return "\n".join(filter(None, together(partial(part.check, reach[name]) for name, part in self._parts.items())))

    def state(self) -> dict[str, Any]:
        states = {name: part.state() for name, part in self._parts.items()}
        return {"sources": states, "dropped": sum(state["dropped"] for state in states.values())}

    def restore(self, state: Mapping[str, Any]) -> None:
        states = state.get("sources", {})
        if states.keys() != self._parts.keys():
            names = ", ".join(states) or "one source"
            raise BadData(
                f"data.sources: the checkpoint was made with {names}: "
                "restore them, or start with an empty checkpoint.path"
            )
        for name, part in self._parts.items():
            part.restore(states[name])


def sampler(spec: PromptsSpec, tokenizer: Tokenizer, vocabulary: int | None, origin: Origin) -> PromptSampler:
    """Of one source. Raises BadData, BadSpec."""
    template = Template(tokenizer, spec, vocabulary)
    source = PromptSource(spec, origin)
    for name in source.hidden:
        print(
            f"{source.name}: rewards and environments do not get column {name!r}, but the run's own by this name",
            flush=True,
        )
    return PromptSampler(source, template, spec)


def samplers(
    data: DataSpec, tokenizer: Tokenizer, vocabulary: int | None, origins: Mapping[str, Origin]
) -> PromptSampler | Mixture:
    """Of all sources; origins: by their names, "" of a single one. Raises BadData, BadSpec."""
    if data.sources is None:
        return sampler(data, tokenizer, vocabulary, origins[""])
    parts = together(
        partial(sampler, data.of(source), tokenizer, vocabulary, origins[source.name]) for source in data.sources
    )
    names = [source.name for source in data.sources]
    return Mixture({source.name: source.weight for source in data.sources}, dict(zip(names, parts, strict=True)))


@lru_cache(maxsize=64)  # two epochs of each source
def _permutation(seed: int, epoch: int, rows: int) -> "array[int]":
    order = list(range(rows))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return array("q", order)

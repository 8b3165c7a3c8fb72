"""Sources of prompts and the sampler: what is read, what is refused, and that resume is exact."""

import errno
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_api.job import DataSpec, PromptsSpec
from rlhf_worker.errors import BadData, BadSpec, Passing
from rlhf_worker.feed.data import PromptSampler
from rlhf_worker.feed.rows import ALONE, Origin, PromptSource
from rlhf_worker.template import Template

ROWS = [{"prompt": f"say {i}", "answer": i} for i in range(7)]
ORDER = ["0:2", "0:3", "0:1", "0:0", "0:6", "0:5", "0:4", "1:2", "1:3"]


class Characters:
    """A tokenizer of one token a character; with a chat template where asked."""

    def __init__(self, chat: bool = False) -> None:
        self.chat_template = "a template" if chat else None

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        return "of messages"

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> str:
        assert options == {"tokenize": False, "add_generation_prompt": True}
        return "".join(f"<{m['role']}>{m['content']}" for m in conversation) + "<assistant>"

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [1] * add_special_tokens + [ord(c) for c in text]


def jsonl(path: Path, rows: list[Any]) -> dict[str, Any]:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return {"jsonl": {"path": str(path)}}


def spec(**fields: Any) -> DataSpec:
    return DataSpec.model_validate(fields)


def sampler(
    data: PromptsSpec, chat: bool = False, state: dict[str, Any] | None = None, origin: Origin = ALONE
) -> PromptSampler:
    found = PromptSampler(PromptSource(data, origin), Template(Characters(chat), data), data)
    if state is not None:
        found.restore(state)
    return found


@pytest.fixture
def seven(tmp_path: Path) -> DataSpec:
    return spec(**jsonl(tmp_path / "p.jsonl", ROWS))


# Sources


def sources(tmp_path: Path) -> dict[str, dict[str, Any]]:
    import datasets

    half = [ROWS[:4], ROWS[4:]]
    (tmp_path / "parquet").mkdir()
    for i, rows in enumerate(half):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "parquet" / f"{i}.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "one.parquet")
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(str(tmp_path / "disk"))
    datasets.DatasetDict(test=table, train=table.select([0])).save_to_disk(str(tmp_path / "dict"))
    (tmp_path / "folder").mkdir()
    jsonl(tmp_path / "folder" / "train.jsonl", ROWS)
    return {
        "jsonl": jsonl(tmp_path / "p.jsonl", ROWS),
        "parquet": {"parquet": {"path": str(tmp_path / "one.parquet")}},
        "parquet directory": {"parquet": {"path": str(tmp_path / "parquet")}},
        "load_from_disk": {"dataset": {"path": str(tmp_path / "disk")}},
        "load_from_disk, split": {"dataset": {"path": str(tmp_path / "dict"), "split": "test"}},
        "load_dataset": {"dataset": {"path": str(tmp_path / "folder")}},
    }


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("own_cache")
def test_every_source_reads_the_same_rows(tmp_path: Path) -> None:
    for name, source in sources(tmp_path).items():
        opened = PromptSource(spec(**source))
        assert [opened.read(i) for i in range(len(opened))] == [(row["prompt"], row) for row in ROWS], name


def test_reasoning_gym_rows_are_those_of_the_seed_and_carry_their_verifier() -> None:
    task = {"task": "basic_arithmetic", "size": 5, "config": {"min_terms": 2, "max_terms": 2}}
    first, same, other = (PromptSource(spec(reasoning_gym=task, seed=seed)) for seed in (3, 3, 4))
    assert len(first) == 5
    prompt, fields = first.read(0)
    assert fields["prompt"] == fields["question"] == prompt
    assert fields["verifier"] == {"task": "basic_arithmetic", "config": {"min_terms": 2, "max_terms": 2}}
    assert {"answer", "metadata"} <= fields.keys()
    assert first.digest() == same.digest() != other.digest()


def test_the_mark_of_a_task_is_how_it_is_made() -> None:
    """ransom_note and three other tasks word a problem otherwise in another process (sets of strings); that must not
    refuse a checkpoint.
    """
    source = PromptSource(spec(reasoning_gym={"task": "ransom_note", "size": 4}))
    before = source.digest()
    source.rows = [{"question": "another wording"}] * 4
    assert source.digest() == before


def test_the_completion_column_is_not_handed_on_and_the_prompt_has_its_name(tmp_path: Path) -> None:
    source = PromptSource(
        spec(**jsonl(tmp_path / "p.jsonl", [{"q": "say", "completion": "old", "n": 1}]), prompt_field="q")
    )
    assert source.read(0) == ("say", {"q": "say", "n": 1, "prompt": "say"})


def test_blank_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n\n  \n{"prompt": "b"}\r\n')
    source = PromptSource(spec(jsonl={"path": str(path)}))
    assert [source.read(i)[0] for i in range(len(source))] == ["a", "b"]
    assert source.place(1).endswith("p.jsonl, line 4")


# Bad input


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', r"p\.jsonl, line 2: not JSON"),
        ('{"prompt": "a"}\n\n[1]\n', r"p\.jsonl, line 3: must be an object"),
        ('{"prompt": "a"}\n\xff\n', r"p\.jsonl, line 2: not JSON"),
        ("", "there are no rows"),
        ("\n \n", "there are no rows"),
        ('{"text": "a"}', r"line 1: no 'prompt' among 'text': set data\.promptField"),
        ('{"prompt": ""}', "must be text or a list of chat messages, and not empty"),
        ('{"prompt": 3}', "must be text"),
        ('{"prompt": [{"role": "user"}]}', "message 1 with content None: it must be text"),
        ('{"prompt": [{"content": "a"}]}', "chat messages with role and content: message 1 is"),
        ('{"prompt": [{"role": "user", "content": null}]}', "message 1 with content None"),
        ('{"prompt": [{"role": "user", "content": []}]}', r"message 1 with content \[\]"),
        ('{"prompt": [{"role": "user", "content": "a"}, "b"]}', "message 2 is 'b'"),
        ('{"prompt": [{"role": "user", "content": [{"type": "image", "image": "x"}]}]}', "message 1 with a part"),
        ('{"prompt": null, "answer": 1}', r"line 1: 'prompt' is null: give the row a prompt"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(BadData, match=message):
        PromptSource(spec(jsonl={"path": str(tmp_path / "p.jsonl")}))


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"jsonl": {"path": "DIR/none"}}, r"data\.jsonl\.path: .*none.*: is the volume mounted"),
        ({"jsonl": {"path": "DIR"}}, r"data\.jsonl\.path: .*Is a directory"),
        ({"parquet": {"path": "DIR/none"}}, r"data\.parquet\.path: .*none.*: is the volume mounted"),
        ({"parquet": {"path": "DIR/broken.parquet"}}, r"data\.parquet\.path: .*broken"),
        ({"dataset": {"path": "DIR/none"}}, r"data\.dataset: .*none"),
        ({"dataset": {"path": "DIR/folder", "split": "tset"}}, r"split tset.*tset"),
        ({"dataset": {"path": "DIR/folder", "name": "nope"}}, "name nope"),
        ({"dataset": {"path": "DIR/dict", "split": "tset"}}, "split tset.*tset.*test.*train"),
        ({"dataset": {"path": "DIR/disk", "split": "tset"}}, "split tset.*tset.*train"),
    ],
)
def test_what_cannot_be_opened_names_the_field(tmp_path: Path, source: dict[str, Any], message: str) -> None:
    sources(tmp_path)
    (tmp_path / "broken.parquet").write_text("no parquet")
    given_ = json.loads(json.dumps(source).replace("DIR", str(tmp_path)))
    with pytest.raises(BadData, match=message):
        PromptSource(spec(**given_))


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("kind", ["parquet", "parquet directory", "load_from_disk", "jsonl", "load_dataset"])
def test_each_source_without_rows_is_named(tmp_path: Path, kind: str) -> None:
    import datasets

    table = pa.Table.from_pylist(ROWS).slice(0, 0)
    (tmp_path / "dir").mkdir()
    for file in ("a.parquet", "dir/b.parquet"):
        pq.write_table(table, tmp_path / file)
    datasets.Dataset(table).save_to_disk(str(tmp_path / "disk"))
    source: dict[str, Any] = {
        "parquet": {"parquet": {"path": str(tmp_path / "a.parquet")}},
        "parquet directory": {"parquet": {"path": str(tmp_path / "dir")}},
        "load_from_disk": {"dataset": {"path": str(tmp_path / "disk")}},
        "jsonl": jsonl(tmp_path / "p.jsonl", []),
        "load_dataset": {"dataset": {"path": str(tmp_path / "dir")}},
    }[kind]
    with pytest.raises(BadData, match=rf"data\.{next(iter(source))}.* {tmp_path}/.*: .*give at least one prompt"):
        PromptSource(spec(**source))


def test_storage_that_fails_is_no_bad_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = jsonl(tmp_path / "p.jsonl", ROWS)

    def fails(path: Path) -> bytes:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "read_bytes", fails)
    with pytest.raises(Passing, match=r"data\.jsonl\.path: .*p\.jsonl: OSError: .*Stale file handle"):
        PromptSource(spec(**given))


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_unreachable_hub_is_no_bad_data(monkeypatch: pytest.MonkeyPatch, wrapped: bool) -> None:
    import datasets

    def unreachable(*_: Any, **__: Any) -> None:
        error = ConnectionError("no route")
        if wrapped:
            raise datasets.exceptions.DatasetGenerationError("An error occurred") from error
        raise error

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(Passing, match=r"data\.dataset: some/where .*: ConnectionError: no route"):
        PromptSource(spec(dataset={"path": "some/where"}))


def test_an_unknown_task_names_close_ones() -> None:
    with pytest.raises(BadSpec, match=r"data\.reasoningGym\.task: there is no 'basic_aritmetic'; did you mean "
        r"basic_arithmetic"):
        PromptSource(spec(reasoning_gym={"task": "basic_aritmetic"}))


@pytest.mark.parametrize("config", [{"max_trems": 2}, {"min_terms": -1}])
def test_wrong_options_of_a_task_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(BadSpec, match=r"data\.reasoningGym\.config: basic_arithmetic refuses"):
        PromptSource(spec(reasoning_gym={"task": "basic_arithmetic", "config": config}))


# The sampler


def uids(found: PromptSampler, count: int) -> list[str]:
    return [prompt.uid for prompt in found.next(count)]


def test_columns_of_later_parquet_files_are_there(tmp_path: Path) -> None:
    (tmp_path / "hidden").mkdir()
    last = {"prompt": "z", "answer": 0.5, "level": "hard"}
    for name, rows in {"a": [{"prompt": "x"}], "b": [{"prompt": "y", "answer": 2}], "c": [last]}.items():
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "hidden" / f"{name}.parquet")
    source = PromptSource(spec(parquet={"path": str(tmp_path / "hidden")}))
    rows_ = [source.read(row)[1] for row in range(len(source))]
    assert [(row["answer"], row["level"]) for row in rows_] == [(None, None), (2, None), (0.5, "hard")]
    pq.write_table(pa.Table.from_pylist([{"prompt": ["no text"]}]), tmp_path / "hidden" / "d.parquet")
    with pytest.raises(BadData, match=r"data\.parquet\.path: .*prompt"):
        PromptSource(spec(parquet={"path": str(tmp_path / "hidden")}))


@pytest.mark.parametrize(
    ("where", "split", "answers"),
    [
        ("dict", "test[:2]", [0, 1]), ("dict", "test[-1:]+train", [6, 0]), ("dict", "test[50%:]", [4, 5, 6]),
        ("disk", "train[2:4]", [2, 3]),
        ("disk", "train", list(range(7))),
    ],
)  # fmt: skip
def test_saved_splits_are_sliced_as_others_are(tmp_path: Path, where: str, split: str, answers: list[int]) -> None:
    sources(tmp_path)
    source = PromptSource(spec(dataset={"path": str(tmp_path / where), "split": split}))
    assert [source.read(row)[1]["answer"] for row in range(len(source))] == answers


@pytest.mark.usefixtures("own_cache")
def test_a_directory_with_a_loading_script_is_bad_data(tmp_path: Path) -> None:
    (tmp_path / "scripted").mkdir()
    (tmp_path / "scripted" / "scripted.py").write_text("import datasets\n")
    with pytest.raises(BadData, match=r"data\.dataset: .*scripted .*correct path"):
        PromptSource(spec(dataset={"path": str(tmp_path / "scripted")}))


@pytest.mark.parametrize("raised", [RuntimeError("scripts"), ZeroDivisionError("it"), PermissionError(13, "denied")])
def test_whatever_a_reader_raises_of_the_data_is_bad_data(monkeypatch: pytest.MonkeyPatch, raised: Exception) -> None:
    import datasets

    def fail(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(BadData, match=type(raised).__name__):
        PromptSource(spec(dataset={"path": "some/where"}))


def test_parts_of_text_are_joined_and_nulls_of_a_struct_left_out(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two", "image": None}]
    tool = {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}
    rows = [{"prompt": [{"role": "user", "content": parts, "name": None}, tool]}]
    prompt, fields = PromptSource(spec(**jsonl(tmp_path / "p.jsonl", rows))).read(0)
    assert prompt == [{"role": "user", "content": "one two"}, {**tool, "content": ""}] == fields["prompt"]


def test_half_a_surrogate_pair_names_its_line(tmp_path: Path) -> None:
    data = spec(**jsonl(tmp_path / "p.jsonl", [{"prompt": "fine"}, {"prompt": "half \ud83d"}]))
    with pytest.raises(BadData, match=r"p\.jsonl, line 2: character 5 is half a surrogate pair"):
        sampler(data).check(2)


def test_tokens_beyond_the_embedding_name_their_row(tmp_path: Path) -> None:
    data = spec(**jsonl(tmp_path / "p.jsonl", [{"prompt": "abc"}, {"prompt": "ab\u00ff"}]))
    small = PromptSampler(PromptSource(data), Template(Characters(), data, 128), data)
    with pytest.raises(BadData, match=r"p\.jsonl, line 2: the text has token 255, .* embedding has 128 rows"):
        small.check(2)


@pytest.mark.parametrize(
    ("origin", "row", "words"),
    [
        (Origin(taken=("self",)), {"self": 1}, r"an environment.s reset has a parameter 'self'"),
        (Origin(sent=True), {"seen": float("nan")}, r"column 'seen' is no JSON"),
    ],
)
def test_columns_that_cannot_be_handed_on_are_named(
    tmp_path: Path, origin: Origin, row: dict[str, Any], words: str
) -> None:
    data = spec(**jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b", **row}]))
    with pytest.raises(BadData, match=f"line 2: {words}"):
        sampler(data, origin=origin).check(2)
    sampler(data).check(2)


@pytest.mark.parametrize("value", [b"bytes", datetime(2026, 1, 1)])
def test_bytes_and_dates_are_refused_by_column_where_a_service_is_sent_them(tmp_path: Path, value: Any) -> None:
    pq.write_table(pa.Table.from_pylist([{"prompt": "a", "when": value}]), tmp_path / "p.parquet")
    data = spec(parquet={"path": str(tmp_path / "p.parquet")})
    with pytest.raises(BadData, match=r"row 0: column 'when' is no JSON .*rewards? of type http"):
        sampler(data, origin=Origin(sent=True)).check(1)
    assert sampler(data).next(1)[0].fields["when"] == value


def test_columns_whose_names_the_run_takes_are_told(tmp_path: Path) -> None:
    rows = [{"q": "say", "prompt": "other", "completion": "old"}]
    assert PromptSource(spec(**jsonl(tmp_path / "p.jsonl", rows), prompt_field="q")).hidden == ["completion", "prompt"]
    assert PromptSource(spec(**jsonl(tmp_path / "p.jsonl", rows))).hidden == ["completion"]


LONG = [*ROWS, {"prompt": "x" * 30}, {"prompt": "y" * 40}]


def test_all_bad_rows_are_told_at_once_and_long_ones_counted(tmp_path: Path) -> None:
    data = spec(**jsonl(tmp_path / "p.jsonl", [*LONG, {"prompt": None}, {"q": 1}]), max_prompt_tokens=20)
    with pytest.raises(BadData) as caught:
        sampler(data).check(100)
    words = str(caught.value)
    for part in ("line 10: 'prompt' is null", "line 11: no 'prompt'", "line 8: the prompt has 31 tokens", "up to 41"):
        assert part in words, part
    assert "2 of 11 prompts are longer" in words
    assert "set data.overlongPrompts to drop" in words


def test_long_prompts_are_dropped_counted_and_exactly_resumed(tmp_path: Path) -> None:
    data = spec(**jsonl(tmp_path / "p.jsonl", LONG), max_prompt_tokens=20, overlong_prompts="drop")
    assert "2 of 9 prompts have more than 20 tokens and are dropped" in sampler(data).check(100)
    whole = sampler(data)
    drawn = whole.next(17)  # two epochs of 7, and 3 more
    assert sorted(prompt.row for prompt in drawn[:7]) == list(range(7)) == sorted(prompt.row for prompt in drawn[7:14])
    assert whole.state()["dropped"] >= 4
    for stop in range(17):
        first = sampler(data)
        before = first.next(stop)
        assert before + sampler(data, state=json.loads(json.dumps(first.state()))).next(17 - stop) == drawn
    assert [prompt.row for prompt in sampler(data).first(8)] == list(range(7))


def test_data_of_long_prompts_alone_is_refused(tmp_path: Path) -> None:
    data = spec(**jsonl(tmp_path / "p.jsonl", LONG[7:]), max_prompt_tokens=20, overlong_prompts="drop")
    for call in (lambda: sampler(data).check(5), lambda: sampler(data).next(1), lambda: sampler(data).first(None)):
        with pytest.raises(BadData, match=r"31 tokens, data\.maxPromptTokens is 20; "):
            call()


def test_a_state_of_before_prompts_could_be_dropped_is_taken(seven: DataSpec) -> None:
    first = sampler(seven)
    before = uids(first, 3)
    state = {name: value for name, value in first.state().items() if name != "dropped"}
    assert before + uids(sampler(seven, state=state), 6) == ORDER


def test_each_epoch_has_every_row_once_in_another_order(seven: DataSpec) -> None:
    drawn = sampler(seven).next(21)
    epochs = [[p.row for p in drawn if p.epoch == e] for e in range(3)]
    assert all(sorted(rows) == list(range(7)) for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) == 3
    assert len({p.uid for p in drawn}) == 21
    assert [p.uid for p in drawn] == [f"{p.epoch}:{p.row}" for p in drawn]


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8), stop=st.integers(0, 8))
def test_resume_anywhere_is_the_uninterrupted_order(
    sizes: list[int], stop: int, tmp_path_factory: pytest.TempPathFactory,
) -> None:
    data = spec(**jsonl(tmp_path_factory.mktemp("rows") / "p.jsonl", ROWS))
    whole = sampler(data).next(sum(sizes))
    first = sampler(data)
    before = [p for size in sizes[:stop] for p in first.next(size)]
    state = json.loads(json.dumps(first.state()))
    second = sampler(data, state=state)
    assert second.state() == state
    assert before + [p for size in sizes[stop:] for p in second.next(size)] == whole


def test_resume_at_every_point_over_two_epochs(seven: DataSpec) -> None:
    whole = uids(sampler(seven), 21)
    for stop in range(21):
        first = sampler(seven)
        before = uids(first, stop)
        assert before + uids(sampler(seven, state=first.state()), 21 - stop) == whole


def test_a_checkpoint_of_other_data_is_refused(seven: DataSpec, tmp_path: Path) -> None:
    state = sampler(seven).state()
    changed = spec(**jsonl(tmp_path / "q.jsonl", [*ROWS[:6], {"prompt": "other"}]))
    for other in (changed, seven.model_copy(update={"seed": 1})):
        with pytest.raises(BadData, match=r"other data or another data\.seed"):
            sampler(other, state=state)


def test_the_seed_decides_the_order(seven: DataSpec) -> None:
    assert uids(sampler(seven), 7) == uids(sampler(seven), 7) != uids(sampler(seven.model_copy(update={"seed": 1})), 7)


def test_the_order_is_this_one_for_ever(seven: DataSpec) -> None:
    """A change here makes every saved checkpoint resume on other prompts."""
    assert uids(sampler(seven), 9) == ORDER


def test_a_long_prompt_names_its_place_and_consumes_nothing(tmp_path: Path) -> None:
    data = spec(**jsonl(tmp_path / "p.jsonl", [*ROWS, {"prompt": "x" * 30}]), max_prompt_tokens=20)
    found = sampler(data)
    with pytest.raises(BadData, match=r"p\.jsonl, line 8: the prompt has 31 tokens, data\.maxPromptTokens is 20"):
        found.next(8)
    assert found.state()["position"] == 0


def test_a_tokenizer_without_a_pad_token_is_enough() -> None:
    """Nothing is padded."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<unk>": 0, "say": 1}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    assert tokenizer.pad_token is None
    data = spec(reasoning_gym={"task": "basic_arithmetic", "size": 3})
    drawn = PromptSampler(PromptSource(data), Template(tokenizer, data), data).next(4)
    assert all(prompt.token_ids for prompt in drawn)


@pytest.mark.parametrize("drawn", [0, 3, 7, 12])
def test_check_finds_a_bad_row_ahead_without_consuming(tmp_path: Path, drawn: int) -> None:
    data = spec(**jsonl(tmp_path / "p.jsonl", [*ROWS, {"answer": 1}, {"prompt": "y"}]))
    found = sampler(data, state={**sampler(data).state(), "epoch": drawn // 9, "position": drawn % 9})
    with pytest.raises(BadData, match=r"line 8: no 'prompt'"):
        found.check(10**9)
    assert (found.state()["epoch"], found.state()["position"]) == divmod(drawn, 9)


def test_check_looks_no_further_than_the_run_goes(tmp_path: Path) -> None:
    data = spec(**jsonl(tmp_path / "p.jsonl", [*ROWS, {"prompt": "x" * 30}]), max_prompt_tokens=20)
    order = [prompt.row for prompt in sampler(data.model_copy(update={"max_prompt_tokens": 99})).next(8)]
    sampler(data).check(order.index(7))
    with pytest.raises(BadData, match="31 tokens"):
        sampler(data).check(order.index(7) + 1)


def test_prompts_are_drawn_again_by_their_uids_without_consuming(seven: DataSpec) -> None:
    found = sampler(seven)
    drawn = found.next(9)
    before = found.state()
    assert found.again([prompt.uid for prompt in drawn[5:]]) == drawn[5:]
    assert [prompt.uid for prompt in found.first(2)] == ["0:0", "0:1"]
    assert len(found.first(None)) == 7
    assert found.state() == before


# Rendering


def test_plain_text_gets_the_tokenizers_special_tokens(seven: DataSpec) -> None:
    (prompt,) = sampler(seven).next(1)
    assert prompt.text == prompt.fields["prompt"]
    assert prompt.token_ids == [1, *map(ord, prompt.text)]


def test_the_chat_template_renders_and_brings_its_own_special_tokens(seven: DataSpec) -> None:
    (prompt,) = sampler(seven.model_copy(update={"system_prompt": "be brief"}), chat=True).next(1)
    assert prompt.text == f"<system>be brief<user>{prompt.fields['prompt']}<assistant>"
    assert prompt.token_ids == list(map(ord, prompt.text))
    assert prompt.fields["answer"] == prompt.row


def test_messages_are_rendered_as_they_are(tmp_path: Path) -> None:
    chat = [
        {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}, {"role": "user", "content": "go"}
    ]
    data = spec(**jsonl(tmp_path / "p.jsonl", [{"prompt": chat}]))
    assert sampler(data, chat=True).next(1)[0].text == "<user>hi<assistant>yes?<user>go<assistant>"
    with pytest.raises(BadData, match=r"line 1: a list of chat messages needs data\.chatTemplate"):
        sampler(data).next(1)


def test_the_chat_template_can_be_left_out(seven: DataSpec) -> None:
    assert sampler(seven.model_copy(update={"chat_template": False}), chat=True).next(1)[0].text.startswith("say")


def test_a_system_prompt_without_a_template_is_refused(seven: DataSpec) -> None:
    with pytest.raises(BadSpec, match=r"data\.systemPrompt needs a chat template"):
        sampler(seven.model_copy(update={"system_prompt": "be brief"}))


def test_a_template_that_refuses_the_messages_names_the_row(seven: DataSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    from jinja2 import TemplateError

    def refuse(*_: Any, **__: Any) -> str:
        raise TemplateError("roles must alternate")

    monkeypatch.setattr(Characters, "apply_chat_template", refuse)
    with pytest.raises(BadData, match=r"line \d: the chat template refuses the messages: roles must alternate"):
        sampler(seven, chat=True).next(1)

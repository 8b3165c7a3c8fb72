"""docs/errors.md: which error of a library has which verdict, printed into the page between its marks."""

from itertools import groupby

from rlhf_worker.errors import ANY, EVERY, TABLE, Call, Meaning

BEGIN, END = "<!-- table -->\n", "<!-- end -->\n"
OF = {  # as the page's reader knows them
    Call.CONFIG: "config", Call.TOKENIZER: "tokenizer", Call.MODEL: "model", Call.WEIGHTS: "weights",
    Call.EXPORT: "export", Call.ENGINE: "vLLM", Call.DATASET: "data set", Call.ROW: "row", Call.HUB: "hub",
    Call.CHECKPOINT: "checkpoint",
}  # fmt: skip


def with_table(page: str) -> str:
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}{table()}{END}{rest.split(END)[1]}"


def table() -> str:
    """In the order of TABLE, in which the first that fits counts; neighbours that differ in the error alone are one."""
    lines = [
        f"| {', '.join(map(_name, rows))} | {of} | {verdict.name} |\n"
        for (verdict, of), rows in groupby(TABLE, lambda row: (row.verdict, calls(row)))
    ]
    return "\n| Error | Of | Verdict |\n|---|---|---|\n" + "".join(lines) + "\n"


def _name(row: Meaning) -> str:
    return "any other" if row.error == ANY else f"`{row.error}`"


def calls(row: Meaning) -> str:
    """The shorter of those that it is of and those that it is not."""
    missing = [OF[call] for call in Call if call in EVERY - row.calls]
    if not missing:
        return "all"
    named = [OF[call] for call in Call if call in row.calls]
    return f"all but {', '.join(missing)}" if len(missing) < len(named) else ", ".join(named)

"""`kubectl rlhf convert`: a configuration of TRL, verl or OpenRLHF as an RLHFJob, and what of it is none."""

import math
from pathlib import Path
from typing import Any

import yaml

from rlhf_cli.convert_read import number, options
from rlhf_cli.convert_rules import FRAMEWORKS, Conversion, common
from rlhf_cli.exits import Wrong
from rlhf_client.errors import nearest

Raw = dict[str, Any]


def framework_of(given: Raw) -> str:
    """By the options that are a framework's own. Raises Wrong."""
    known = {name: {*table, *special} for name, (table, special, _) in FRAMEWORKS.items()}
    counts = {name: len(options & set(given)) for name, options in known.items()}
    best = max(counts, key=lambda name: counts[name])
    if not counts[best]:
        raise Wrong(f"no configuration of {', '.join(FRAMEWORKS)}: none of its options is one of theirs")
    return best


def convert(framework: str, given: Raw, gpus: int | None) -> Conversion:
    """Raises Wrong for a framework that is none of these."""
    if framework not in FRAMEWORKS:
        raise Wrong(f"--from {framework}{nearest(framework, list(FRAMEWORKS))}: one of {', '.join(FRAMEWORKS)}")
    table, _, finish = FRAMEWORKS[framework]
    made = Conversion(framework, dict(given), gpus)
    for name, to in table.items():
        value = made.given.get(name)
        if value is None or (to.values is not None and value not in to.values):
            continue
        made.set(to.path, to.values[value] if to.values is not None else number(value))
        del made.given[name]
    finish(made)
    common(made)
    return made


def manifest(made: Conversion, name: str) -> tuple[str, list[str]]:
    """YAML, and every word about it: what was not carried over, what to look at, and what is not valid yet."""
    from rlhf_api.parse import InvalidJob, parse_job

    raw = {"apiVersion": "rlhf.dev/v1alpha1", "kind": "RLHFJob", "metadata": {"name": name}, "spec": ordered(made.spec)}
    left = (f"not carried over: {one} = {value}" for one, value in made.given.items() if _counts(value))
    words = [*made.notes, *left]
    try:
        parse_job(raw)
    except InvalidJob as error:
        words += [f"not valid yet: {problem}" for problem in error.problems]
    comments = "".join(f"# {line}\n" for word in words for line in str(word).splitlines())
    return f"# From {made.framework}.\n{comments}{yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)}", words


def _counts(value: Any) -> bool:
    """Whether it says anything: null and empty do not."""
    return value is not None and value != {} and value != [] and not (isinstance(value, float) and math.isnan(value))


def ordered(spec: Raw) -> Raw:
    """As the reference page has the fields."""
    from rlhf_api.job import RLHFJobSpec

    names = [field.alias or name for name, field in RLHFJobSpec.model_fields.items()]
    return {name: spec[name] for name in names if name in spec}


def verb(path: Path, framework: str | None, gpus: int | None, name: str, out: Path | None) -> None:
    """Raises Wrong."""
    from rlhf_cli.cluster_verbs import say

    given = options(path)
    text, words = manifest(convert(framework or framework_of(given), given, gpus), name)
    for line in words:
        say(line)
    write(text, out)


def write(text: str, out: Path | None) -> None:
    """To a file, which must not be there, or standard output. Raises Wrong."""
    if out is None:
        print(text, end="")
        return
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise Wrong(f"--out {out}: is there already: remove it, or take another name") from None
    except OSError as error:
        raise Wrong(f"--out {out}: {error.strerror}") from None
    print(out)

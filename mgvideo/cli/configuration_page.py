"""Write docs/configuration.md: every key and option, from the dataclasses and the YAML files that declare them.

Run it by `make docs`. The text above `MARKER` in the page is kept.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from importlib import import_module
from pathlib import Path

from . import doctor, export, features, plan, predict, prepare, reproduce
from .benchmark import BENCHMARKS
from .help import GROUPS, default_of, format_value, options_in
from .schema import RunKeys
from .yaml_keys import CONFIGS, YamlKey, find_option, read_choices, read_file_keys, read_option_keys, read_summary

PAGE = Path(__file__).parents[2] / "docs/configuration.md"
MARKER = "<!-- `make docs` writes everything below from the code and the YAML files. Edit those. -->"
TABLE_GROUPS = ("table", "table/preset")  # groups that `reproduce` reads
PROGRAM_KEYS = {
    "plan": plan.PlanKeys,
    **{f"prepare {name}": command.keys for name, command in prepare.COMMANDS.items()},
    "predict": predict.PredictKeys,
    "features": features.FeatureKeys,
    "export": export.ExportKeys,
    "reproduce": reproduce.ReproduceKeys,
    "doctor": doctor.DoctorKeys,
}


def main() -> None:
    """Write the page again."""
    PAGE.write_text(make_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def make_page(old_page: str) -> str:
    """Return the page: the text above `MARKER` in `old_page`, then the tables of keys and options."""
    head = old_page.partition(MARKER)[0].rstrip()
    return "\n".join([head, "", MARKER, "", *_run_section(), "", *_group_sections(), *_program_sections()]) + "\n"


def _run_section() -> Iterator[str]:
    """Yield the lines on the keys of a run outside the groups."""
    yield from ("## Keys of a run", "")
    yield "Recipes and experiments set some of these keys; `--cfg job` prints the values of a command."
    yield from ("", *_key_table([field for field in fields(RunKeys) if field.metadata.get("help")]))
    for field in fields(RunKeys):
        block = default_of(field)
        if is_dataclass(block):
            yield from ("", f"### {field.name}", "", (type(block).__doc__ or "").strip(), "")
            yield from _key_table(fields(block), f"{field.name}.")


def _key_table(entries: Iterable[Field], prefix: str = "") -> Iterator[str]:
    """Yield a table of dataclass fields: name, type, default, meaning."""
    run_values = read_file_keys(CONFIGS / "run.yaml") if not prefix else {}
    yield from _header("key", "type", "default", "meaning")
    for field in entries:
        default = default_of(field)
        shown = "set by the recipe" if default == "???" else _code(format_value(default))
        if default == "???" and field.name in run_values:
            shown = _code(run_values[field.name].value)
        yield _row(_code(f"{prefix}{field.name}"), _type_text(field), shown, _prose(field.metadata["help"]))


def _type_text(field: Field) -> str:
    """Describe the values that a key takes: choices, or a type with its limits."""
    limits = field.metadata["limits"]
    kind = limits.get("kind", str(field.type))
    text = re.sub(r"list\[(\w+)\]", r"list of \1", kind.removesuffix(" | None"))
    if "length" in limits:
        text = text.replace("list of", f"list of {limits['length']}")
    if "choices" in limits:
        text = ", ".join(_code(format_value(choice)) for choice in limits["choices"])
    text += f" ≥ {limits['least']}" if "least" in limits else ""
    text += f" ≤ {limits['most']}" if "most" in limits else ""
    text += f" > {limits['above']}" if "above" in limits else ""
    return f"{text} or null" if kind.endswith(" | None") else text


def _group_sections() -> Iterator[str]:
    """Yield the lines on each group: its options, and their keys."""
    defaults = read_choices(CONFIGS / "run.yaml")
    yield from ("## Groups", "", "An option is a file of `configs/`. The keys of an option exist if it is chosen.", "")
    for group in (*GROUPS, *TABLE_GROUPS):
        options = [name for name in options_in(CONFIGS / group) if not (group == "table" and "/" in name)]
        default = f" Default: {_code(defaults[group])}." if group in defaults else ""
        program = " For `tools/reproduce.py`." if group in TABLE_GROUPS else ""
        count = f"{len(options)} option{'s' * (len(options) > 1)}."
        yield from (f"### {group.rpartition('/')[2]}=", "", f"{count}{default}{program}", "")
        yield from _option_table(group, options)
        yield ""
        if group not in ("experiment", *TABLE_GROUPS):
            keys = {option: read_option_keys(f"{group}/{option}") for option in options}
            yield from _option_key_table(keys, with_meaning=group != "recipe")  # recipes set keys of a run


def _option_table(group: str, options: Sequence[str]) -> Iterator[str]:
    """Yield a table of the options of a group; for experiments, with what each sets."""
    sets = ("sets",) if group == "experiment" else ()
    yield from _header("option", "what it is", *sets)
    for option in options:
        file = find_option(f"{group}/{option}")
        assert file is not None
        values = {
            **read_choices(file),
            **{key.name: key.value for key in read_option_keys(f"{group}/{option}").values()},
        }
        words = [_code(f"{name}={value}") for name, value in values.items()]
        yield _row(_code(option), _prose(read_summary(file)), *([" ".join(words)] if sets else []))


def _option_key_table(keys_by_option: Mapping[str, Mapping[str, YamlKey]], with_meaning: bool) -> Iterator[str]:
    """Yield a table of the keys of all options. With meanings, a key has a row for each."""
    rows: dict[str, dict[str, dict[str, str]]] = {}  # name → comment → value by option
    for option, keys in keys_by_option.items():
        for key in keys.values():
            comment = key.comment if with_meaning else ""
            rows.setdefault(key.name, {}).setdefault(comment, {})[option] = key.value
    if not rows:
        return
    yield from _header("key", "value", *(["meaning"] if with_meaning else []))
    for name, comments in rows.items():
        for comment, values in comments.items():
            shown = _values_text(values, len(keys_by_option))
            yield _row(_code(name), shown, *([_prose(comment)] if with_meaning else []))
    yield ""


def _values_text(values: Mapping[str, str], num_options: int) -> str:
    """List the values of a key with the options that have them. The most frequent one omits them if all have it."""
    parts = []
    for rank, (value, _) in enumerate(Counter(values.values()).most_common()):
        shown = "required" if value == "???" else _code(value)
        options = ", ".join(option for option, other in values.items() if other == value)
        parts.append(shown if rank == 0 and len(values) == num_options else f"{shown}: {options}")
    return "; ".join(parts)


def _program_sections() -> Iterator[str]:
    """Yield the lines on the keys of the programs other than `run`."""
    yield "## Keys of other programs"
    yield ""
    yield "Each takes the groups and keys of a run too. `--help` prints the same."
    keys_by_program = {
        **PROGRAM_KEYS,
        **{f"benchmark {name}": import_module(f"mgvideo.cli.benchmark.{name}").Keys for name in BENCHMARKS},
    }
    for program, keys_class in keys_by_program.items():
        yield from ("", f"### {program}", "", *_key_table(fields(keys_class)))


def _header(*names: str) -> tuple[str, str]:
    return _row(*names), _row(*["---"] * len(names))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _code(text: str) -> str:
    return f"`{_escape(text)}`"


def _prose(text: str) -> str:
    """Return text for a table cell, in which only parts in backticks are Markdown."""
    parts = _escape(text).split("`")
    return "`".join(part if number % 2 else re.sub(r"([*<])", r"\\\1", part) for number, part in enumerate(parts))


def _escape(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


if __name__ == "__main__":
    main()

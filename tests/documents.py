"""Find the commands and names that the project's pages, comments and strings show to users."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from training import ROOT

from mgvideo.cli import PROGRAMS

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "models/README.md", *sorted(ROOT.glob("docs/**/*.md"))]
CONFIGS = sorted(ROOT.glob("configs/**/*.yaml"))
SOURCES = [path for folder in ("mgvideo", "models", "datasets", "tools") for path in ROOT.glob(f"{folder}/**/*.py")]
SCRIPT = ROOT / "tools/slurm/train.sbatch"
# first words of commands; if a code block starts with one, all of its lines are commands
SHELL = (
    r"python3?|mgvideo|torchrun|sbatch|srun|scancel|scontrol|make|tensorboard|pip3?|git|cd|docker|kubectl|conda|uv|ffmpeg"
    r"|apt-get|curl|wget|export|source|bash|sh|(?:\./|\.venv/|tools/)\S+"
)
COMMAND_START = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:{SHELL})(?= |$)")
# the start of one of our commands in prose and in strings, and the words that continue it
OUR_COMMAND = re.compile(
    rf"(?:python )?tools/\w+\.py(?= |$)|mgvideo (?:{'|'.join(PROGRAMS)})\b(?!:)|torchrun(?= --)|sbatch(?= --)"
)
ARGUMENT = re.compile(r"\d[\d.]*|--?\w[\w-]*(?:=\S*)?|[\w.@~+/-]+=\S*|…|\[\S+\]|[A-Z]+…?|tools/\S+\.(?:py|sbatch)")


class ShownCommand(NamedTuple):
    """A command and the file that shows it."""

    where: str
    text: str


def blocks(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the language and the lines of each code block of a page, fenced or indented."""
    language, lines, indented = None, [], []
    for line in [*text.splitlines(), ""]:
        fence = re.match(r"\s*```(\w*)", line)
        if language is not None:
            if fence:
                yield language, lines
                language = None
            else:
                lines.append(line if language == "python" else line.strip())
            continue
        if line.startswith("    ") and line.strip():
            indented.append(line.strip())
            continue
        if indented and line.strip():
            yield "", indented
            indented = []
        if fence:
            language, lines = fence[1], []
    if indented:
        yield "", indented


def spans(text: str) -> list[str]:
    """List the inline code of a page, outside its code blocks."""
    prose = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.M | re.S)
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]


def join_continued_lines(lines: Sequence[str]) -> list[str]:
    """Drop comment lines, and join each line that ends in a backslash with the next one."""
    text = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def commands_in_text(text: str) -> Iterator[str]:
    """Yield our commands in prose; a command ends before the first word that cannot be an argument."""
    place = 0
    while match := OUR_COMMAND.search(text, place):
        words, place = [match[0]], match.end()
        subcommand = re.compile(r" ([a-z]+)(?= |$)").match(text, place)
        if subcommand and re.search(r"(?:benchmark|prepare)\b|prepare_data", match[0]):
            words, place = [*words, subcommand[1]], subcommand.end()
        while (word := re.compile(r"\s+(\S+)").match(text, place)) and "\n\n" not in word[0]:
            argument = word[1].rstrip("`'\").,:;")
            if not ARGUMENT.fullmatch(argument):
                break
            words, place = [*words, argument], word.end()
        yield " ".join(words)


def commands_on_page(path: Path) -> Iterator[str]:
    """Yield the commands of a page: lines of code blocks, and inline code with several words."""
    text = path.read_text(encoding="utf-8")
    for language, lines in blocks(text):
        if language != "python" and lines and COMMAND_START.match(lines[0]):
            yield from join_continued_lines(lines)
    yield from (span for span in spans(text) if " " in span and COMMAND_START.match(span))


def commands_in_comments(path: Path) -> Iterator[str]:
    """Yield the commands in the comments of a YAML file or a script."""
    comments = (line.partition("#")[2].strip() for line in path.read_text(encoding="utf-8").splitlines() if "#" in line)
    yield from commands_in_text("\n\n".join(comments))


def commands_in_strings(path: Path) -> Iterator[str]:
    """Yield the commands in the strings of a module, with `…` for each value of an f-string."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    f_strings = [node for node in nodes if isinstance(node, ast.JoinedStr)]
    inside = {id(part) for node in f_strings for part in ast.walk(node)}
    texts = [
        "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        for node in f_strings
    ]
    texts += [node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in inside]
    for text in texts:
        yield from commands_in_text(text) if isinstance(text, str) else ()


def all_shown_commands() -> list[ShownCommand]:
    """List each command once, with the first file that shows it."""
    places = [(page, commands_on_page(page)) for page in PAGES]
    places += [(path, commands_in_comments(path)) for path in (*CONFIGS, SCRIPT)]
    places += [(path, commands_in_strings(path)) for path in sorted(SOURCES)]
    first_places: dict[str, Path] = {}
    for path, commands in places:
        for command in commands:
            first_places.setdefault(command, path)
    return [ShownCommand(str(path.relative_to(ROOT)), command) for command, path in first_places.items()]

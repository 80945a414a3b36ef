"""The pages, comments and strings of the project that are for people, and the commands and names that they show."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from training import ROOT

from mgvideo.cli import PROGRAMS, run

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "models/README.md", *sorted(ROOT.glob("docs/**/*.md"))]
CONFIGS = sorted(ROOT.glob("configs/**/*.yaml"))
SOURCES = [path for folder in ("mgvideo", "models", "datasets", "tools") for path in ROOT.glob(f"{folder}/**/*.py")]
SCRIPT = ROOT / "tools/slurm/train.sbatch"
# words that begin a command; a code block that begins with one holds nothing else
SHELL = (
    r"python3?|mgvideo|torchrun|sbatch|srun|scancel|scontrol|make|tensorboard|pip3?|git|cd|docker|kubectl|conda|uv|ffmpeg"
    r"|apt-get|curl|wget|export|source|bash|sh|(?:\./|\.venv/|tools/)\S+"
)
BEGINS = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:{SHELL})(?= |$)")
# what a command begins with in running text and in strings, and the words that it goes on with
OURS = re.compile(
    rf"(?:python )?tools/\w+\.py(?= |$)|mgvideo (?:{'|'.join(PROGRAMS)})\b(?!:)|torchrun(?= --)|sbatch(?= --)"
)
ARGUMENT = re.compile(r"\d[\d.]*|--?\w[\w-]*(?:=\S*)?|[\w.@~+/-]+=\S*|…|\[\S+\]|[A-Z]+…?|tools/\S+\.(?:py|sbatch)")
CHOICES = SimpleNamespace(model="slowfast_small", dataset="motion")  # of the run whose advice is read


class Shown(NamedTuple):
    """A command and where it is shown."""

    where: str
    text: str


def blocks(text: str) -> Iterator[tuple[str, list[str]]]:
    """Language and lines of each code block of a page, fenced or indented."""
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
    """The inline code of a page, outside its blocks."""
    prose = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.M | re.S)
    return [" ".join(found.split()) for found in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]


def joined(lines: Sequence[str]) -> list[str]:
    """Lines without comments, those that end in a backslash joined to the next."""
    text = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def in_text(text: str) -> Iterator[str]:
    """Our commands in running text: each as far as its words are those of a command."""
    place = 0
    while match := OURS.search(text, place):
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


def on_page(path: Path) -> Iterator[str]:
    """The commands of a page: lines of code blocks, and inline code of several words."""
    text = path.read_text(encoding="utf-8")
    for language, lines in blocks(text):
        if language != "python" and lines and BEGINS.match(lines[0]):
            yield from joined(lines)
    yield from (span for span in spans(text) if " " in span and BEGINS.match(span))


def in_comments(path: Path) -> Iterator[str]:
    """The commands in the comments of a YAML file or a script."""
    comments = (line.partition("#")[2].strip() for line in path.read_text(encoding="utf-8").splitlines() if "#" in line)
    yield from in_text("\n\n".join(comments))


def in_strings(path: Path) -> Iterator[str]:
    """The commands in the strings of a module; what it fills in is a placeholder."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    mixed = [node for node in nodes if isinstance(node, ast.JoinedStr)]
    inside = {id(part) for node in mixed for part in ast.walk(node)}
    texts = [
        "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values) for node in mixed
    ]
    texts += [node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in inside]
    for text in texts:
        yield from in_text(text) if isinstance(text, str) else ()


def advised() -> Iterator[str]:
    """What a run advises at its end."""
    for schedule in ("multigrid", "baseline"):
        yield from (line.split("`")[1] for line in run.advice(CHOICES, schedule))


def all_shown() -> list[Shown]:
    """Each command once, with the first place that shows it."""
    places = [(page, on_page(page)) for page in PAGES]
    places += [(path, in_comments(path)) for path in (*CONFIGS, SCRIPT)]
    places += [(path, in_strings(path)) for path in sorted(SOURCES)]
    places += [(ROOT / "mgvideo/cli/run.py", advised())]
    first_places: dict[str, Path] = {}
    for path, commands in places:
        for command in commands:
            first_places.setdefault(command, path)
    return [Shown(str(path.relative_to(ROOT)), command) for command, path in first_places.items()]

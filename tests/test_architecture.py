"""The house rules that imports show, read from the code's own import statements."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imported(path: Path, package: str) -> Iterator[str]:
    """Absolute names of all modules that a file imports, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def modules(folder: str, package: str) -> Iterator[tuple[Path, str]]:
    for path in (ROOT / folder).rglob("*.py"):
        yield path, ".".join([package, *path.relative_to(ROOT / folder).parent.parts])


def offences(folder: str, package: str, forbidden: tuple[str, ...]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, inside in modules(folder, package)
        if "cli" not in path.relative_to(ROOT / folder).parts[:-1]
        for name in imported(path, inside)
        if any(name == word or name.startswith(f"{word}.") for word in forbidden)
    ]


def test_the_core_knows_neither_models_datasets_configs_nor_hydra() -> None:
    outside = ("mgvideo.models", "mgvideo.datasets", "mgvideo.configs", "mgvideo.cli", "hydra", "omegaconf")
    assert offences("mgvideo", "mgvideo", outside) == []


@pytest.mark.parametrize(
    ("folder", "others"), [("models", ("mgvideo.datasets",)), ("datasets", ("mgvideo.models",))], ids=str
)
def test_models_and_datasets_know_nothing_of_each_other(folder: str, others: tuple[str, ...]) -> None:
    assert offences(folder, f"mgvideo.{folder}", (*others, "mgvideo.configs", "hydra", "omegaconf")) == []


def test_imports_run_downwards() -> None:
    """A folder of the core imports from lower floors only; `errors` and the standard library are below all."""
    floors = (
        ("cpu",),
        ("plan", "layers", "distributed"),
        ("loading", "storage"),
        ("tracking",),
        ("engine", "reproduce"),
    )
    heights = {"errors": -1, "cli": len(floors)} | {room: i for i, rooms in enumerate(floors) for room in rooms}
    rooms = [path.name for path in (ROOT / "mgvideo").iterdir() if (path / "__init__.py").exists()]
    assert set(rooms) == set(heights) - {"errors"}
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for room in rooms
        for path, package in modules(f"mgvideo/{room}", f"mgvideo.{room}")
        for name in imported(path, package)
        if (other := name.split(".")[1:2]) and name.startswith("mgvideo.") and other != [room]
        if heights.get(other[0], -1) >= heights[room]
    ]
    assert not found


def test_plans_need_no_torch() -> None:
    for path, package in modules("mgvideo/plan", "mgvideo.plan"):
        assert not [name for name in imported(path, package) if name.split(".")[0] == "torch"], path


def test_the_rule_would_catch_an_offence(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from ..mgvideo.models import x\n    import hydra.utils\n")
    assert set(imported(bad, "mgvideo")) == {"mgvideo.models.x", "hydra.utils"}


def without_encoding(path: Path) -> Iterator[int]:
    """Lines that read or write text in the encoding of the locale, which is not UTF-8 everywhere."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or "encoding" in {keyword.arg for keyword in node.keywords}:
            continue
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("read_text", "write_text"):
            yield node.lineno
        elif isinstance(node.func, ast.Name) and node.func.id == "open":
            modes = [*node.args[1:2], *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
            if "b" not in "".join(ast.unparse(mode) for mode in modes):
                yield node.lineno


def test_files_of_text_name_their_encoding(tmp_path: Path) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for folder in ("mgvideo", "models", "datasets", "tools")
        for path in (ROOT / folder).rglob("*.py")
        for line in without_encoding(path)
    ]
    assert found == []
    bad = tmp_path / "bad.py"
    bad.write_text(
        "open('x')\nopen('x', 'wb')\nopen('x', mode='a')\np.read_text()\np.write_text('', encoding='utf-8')\n"
    )
    assert list(without_encoding(bad)) == [1, 3, 4]

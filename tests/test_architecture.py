"""The code's import statements keep the rules of the architecture."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imported_names(path: Path, package: str) -> Iterator[str]:
    """Yield the absolute names of everything that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def modules(folder: str, package: str) -> Iterator[tuple[Path, str]]:
    """Yield every Python file of a folder with the package that it belongs to."""
    for path in (ROOT / folder).rglob("*.py"):
        yield path, ".".join([package, *path.relative_to(ROOT / folder).parent.parts])


def forbidden_imports(folder: str, package: str, forbidden: tuple[str, ...]) -> list[str]:
    """List the imports of forbidden packages in a folder, except in its `cli` folders."""
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, file_package in modules(folder, package)
        if "cli" not in path.relative_to(ROOT / folder).parts[:-1]
        for name in imported_names(path, file_package)
        if any(name == module or name.startswith(f"{module}.") for module in forbidden)
    ]


def test_core_imports_no_models_datasets_configs_or_hydra() -> None:
    outside = ("mgvideo.models", "mgvideo.datasets", "mgvideo.configs", "mgvideo.cli", "hydra", "omegaconf")
    assert forbidden_imports("mgvideo", "mgvideo", outside) == []


@pytest.mark.parametrize(
    ("folder", "others"), [("models", ("mgvideo.datasets",)), ("datasets", ("mgvideo.models",))], ids=str
)
def test_models_and_datasets_do_not_import_each_other(folder: str, others: tuple[str, ...]) -> None:
    assert forbidden_imports(folder, f"mgvideo.{folder}", (*others, "mgvideo.configs", "hydra", "omegaconf")) == []


def test_imports_run_downwards() -> None:
    """A folder of the core imports only from folders of lower levels; `errors` is below all of them."""
    levels = (
        ("cpu",),
        ("plan", "layers", "distributed"),
        ("loading", "storage"),
        ("tracking",),
        ("engine", "reproduce"),
    )
    level_of = {"errors": -1, "cli": len(levels)} | {name: i for i, names in enumerate(levels) for name in names}
    folders = [path.name for path in (ROOT / "mgvideo").iterdir() if (path / "__init__.py").exists()]
    assert set(folders) == set(level_of) - {"errors"}
    upward_imports = [
        f"{path.relative_to(ROOT)} imports {name}"
        for folder in folders
        for path, package in modules(f"mgvideo/{folder}", f"mgvideo.{folder}")
        for name in imported_names(path, package)
        if (other := name.split(".")[1:2]) and name.startswith("mgvideo.") and other != [folder]
        if level_of.get(other[0], -1) >= level_of[folder]
    ]
    assert not upward_imports


def test_plans_need_no_torch() -> None:
    for path, package in modules("mgvideo/plan", "mgvideo.plan"):
        assert not [name for name in imported_names(path, package) if name.split(".")[0] == "torch"], path


def test_imported_finds_relative_imports_and_imports_in_functions(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from ..mgvideo.models import x\n    import hydra.utils\n")
    assert set(imported_names(bad, "mgvideo")) == {"mgvideo.models.x", "hydra.utils"}


def lines_without_encoding(path: Path) -> Iterator[int]:
    """Yield the numbers of lines that read or write text in the locale's encoding, which is not UTF-8 everywhere."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or "encoding" in {keyword.arg for keyword in node.keywords}:
            continue
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("read_text", "write_text"):
            yield node.lineno
        elif isinstance(node.func, ast.Name) and node.func.id == "open":
            modes = [*node.args[1:2], *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
            if "b" not in "".join(ast.unparse(mode) for mode in modes):
                yield node.lineno


def test_text_files_are_opened_with_an_encoding(tmp_path: Path) -> None:
    places = [
        f"{path.relative_to(ROOT)}:{line}"
        for folder in ("mgvideo", "models", "datasets", "tools")
        for path in (ROOT / folder).rglob("*.py")
        for line in lines_without_encoding(path)
    ]
    assert places == []
    bad = tmp_path / "bad.py"
    bad.write_text(
        "open('x')\nopen('x', 'wb')\nopen('x', mode='a')\np.read_text()\np.write_text('', encoding='utf-8')\n"
    )
    assert list(lines_without_encoding(bad)) == [1, 3, 4]

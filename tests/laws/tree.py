"""The source files of the project, parsed: what the laws are checked on."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FOLDERS = ("infinillm", "kernels", "deploy", "bench", "tests")


class Source(NamedTuple):
    """One file, and its dotted name as it is imported: kernels/x.py is infinillm.kernels.x."""

    path: Path
    module: str
    tree: ast.Module
    lines: int

    @property
    def room(self) -> str:
        """The part of the package it belongs to, such as core or wire; empty outside the package."""
        parts = self.module.split(".")
        return "" if parts[0] != "infinillm" else parts[1] if len(parts) > 1 else "__init__"


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or path.name == "__pycache__":
            continue
        if path.is_dir():
            yield from _walk(path)
        elif path.suffix == ".py" and not path.name.endswith("_pb2.py"):
            yield path


@cache
def sources() -> tuple[Source, ...]:
    found = [ROOT / "setup.py"]
    for folder in FOLDERS:
        if (ROOT / folder).is_dir():
            found += _walk(ROOT / folder)
    return tuple(parse(path.read_text(encoding="utf-8"), path) for path in found)


def parse(text: str, path: Path) -> Source:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("infinillm", *parts) if parts[0] == "kernels" else parts
    return Source(
        path.relative_to(ROOT),
        ".".join(parts).removesuffix(".__init__"),
        ast.parse(text, str(path)),
        len(text.splitlines()),
    )


def product() -> tuple[Source, ...]:
    """The files of the package itself."""
    return tuple(each for each in sources() if each.module.split(".")[0] == "infinillm")


def imports(source: Source) -> Iterator[tuple[int, str]]:
    """Every module a file imports, wherever in the file: its line and full name."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = source.module if source.path.name == "__init__.py" else source.module.rpartition(".")[0]
            for _ in range(node.level - 1):
                package = package.rpartition(".")[0]
            base = f"{package}.{node.module}".rstrip(".") if node.level else (node.module or "")
            yield from ((node.lineno, f"{base}.{name.name}") for name in node.names)


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == each or name.startswith(each + ".") for each in packages)

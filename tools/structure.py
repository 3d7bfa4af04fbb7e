"""The house in numbers: rooms, imports that run upwards, circles, lines, parameters, comments.

    python tools/structure.py [CHECKOUT]

A room is a folder or a top-level file of src/dither.  The layers are import-linter's, from pyproject.toml; an import
between rooms that does not go to a lower layer counts as running upwards.  A function counts as public where it is one
of `dither.__all__` or a command of the command line; parameters of kernels (`codecs/kernels`) are not counted.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

COMMENTED = ("solvers", "codecs/kernels", "planning")


def main(checkout: Path) -> None:
    source = checkout / "src" / "dither"
    trees = {path: ast.parse(path.read_text()) for path in sorted(source.rglob("*.py"))}
    rooms = sorted({room_of(path, source) for path in trees})
    arrows = {(path, target) for path, tree in trees.items() for target in imported(tree, source)}
    between = {(room_of(a, source), room_of(b, source)) for a, b in arrows} - {(room, room) for room in rooms}
    layers = layers_of(checkout)
    upwards = sorted((a, b) for a, b in between if layers.get(b, -1) >= layers.get(a, len(layers)))
    wide = sorted(((count, name, is_public) for count, name, is_public in parameters(trees, source)), reverse=True)
    print(f"rooms                                  {len(rooms)}")
    print(f"imports between rooms                  {len(between)}")
    print(f"imports from below to above            {len(upwards)} {upwards or ''}")
    print(f"circles of rooms; of files             {circles(between)}; {circles(arrows)}")
    print(f"lines of Python                        {sum(len(path.read_text().splitlines()) for path in trees)}")
    for title, public in (("private", False), ("public", True)):
        found = [(count, name) for count, name, is_public in wide if is_public is public][:4]
        print(f"most parameters of a {title:<18}{', '.join(f'{count} {name}' for count, name in found)}")
    for room in COMMENTED:
        lines = [line for path in trees if source / room in path.parents for line in path.read_text().splitlines()]
        own = sum(line.lstrip().startswith("#") for line in lines)
        print(f"own-line comments per 1,000 lines      {1000 * own / len(lines):.0f} in {room}")


def room_of(path: Path, source: Path) -> str:
    return path.relative_to(source).parts[0].removesuffix(".py")


def imported(tree: ast.Module, source: Path) -> Iterator[Path]:
    """The files of ours that a module imports: at its top, inside functions, or for type checking alone."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == "dither":
                yield file_of(name.split(".")[1:], source)


def file_of(parts: list[str], source: Path) -> Path:
    """The module that a dotted name stands for; its last part may be a name inside it."""
    for stop in (len(parts), len(parts) - 1):
        path = source.joinpath(*parts[:stop])
        if path.with_suffix(".py").is_file() and stop:
            return path.with_suffix(".py")
        if (path / "__init__.py").is_file():
            return path / "__init__.py"
    return source / "__init__.py"


def layers_of(checkout: Path) -> dict[str, int]:
    """Room → height of its layer, as pyproject.toml states them; the face and `python -m dither` stand on top."""
    stated = re.search(r"^layers = \[\n(.*?)^\]", (checkout / "pyproject.toml").read_text(), re.M | re.S)
    assert stated, "pyproject.toml states no layers"
    rows = re.findall(r'"(.+?)"', stated.group(1))
    found = {room.strip().split(".")[1]: -at for at, row in enumerate(rows) for room in row.split("|")}
    return {**found, "__init__": 1, "__main__": 2}


def circles(arrows: set[tuple[Path, Path]] | set[tuple[str, str]]) -> int:
    """How many groups of two or more reach each other along the arrows."""
    after: dict[object, set[object]] = defaultdict(set)
    for a, b in arrows:
        after[a].add(b)
    reached = {start: reach(start, after) for start in list(after)}
    groups = {frozenset(b for b in found if a in reached.get(b, ())) for a, found in reached.items()}
    return sum(len(group) > 1 for group in groups)


def reach(start: object, after: Mapping[object, set[object]]) -> set[object]:
    seen: set[object] = set()
    todo = [start]
    while todo:
        for following in after.get(todo.pop(), ()):
            if following not in seen:
                seen.add(following)
                todo.append(following)
    return seen


def parameters(trees: Mapping[Path, ast.Module], source: Path) -> Iterator[tuple[int, str, bool]]:
    face = (source / "__init__.py").read_text()
    public = set(re.findall(r"import \w+(?: as (\w+))?", face)) | set(re.findall(r"\w+", face))
    for path, tree in trees.items():
        where = path.relative_to(source)
        if "kernels" in where.parts:
            continue
        top = {id(node) for node in tree.body}
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                count = len(names) - (names[:1] in (["self"], ["cls"]))
                shown = id(node) in top and (node.name in public or where.parts[0] == "cli")
                yield count, f"{where}:{node.name}", shown


if __name__ == "__main__":
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("checkout", type=Path, nargs="?", default=Path(__file__).parents[1])
    main(reader.parse_args().checkout)

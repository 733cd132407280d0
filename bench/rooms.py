"""Print the rooms of voltforge: what each is for, its modules and lines, and the rooms that it imports from.

With a commit, print that commit's: ``python bench/rooms.py d2c77a3``.
"""

import argparse
import ast
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support import rooms


def show(root):
    graph = rooms.read(root)
    lines = {module: len(path(root, module).read_text().splitlines()) for module in graph}
    arrows = rooms.between_rooms(graph)
    for name, floor in sorted(rooms.floors(arrows).items(), key=lambda item: (-item[1], item[0])):
        sentence = ast.get_docstring(ast.parse((root / f"voltforge/{name}/__init__.py").read_text()))
        modules = sorted(module for module in graph if rooms.room(module) == name)
        print(f"floor {floor}  {name}: {sentence}")
        print(f"         imports from {', '.join(sorted(arrows[name])) or 'no room'}")
        print(f"         {listed(modules, lines)}")
    outside = [module for module in graph if not rooms.room(module) and module.split(".")[-1] not in arrows]
    print(f"outside of rooms: {listed(outside, lines)}")
    longest = max(rooms.floors(graph).values())
    print(f"{len(graph)} modules, {sum(lines.values())} lines; the longest chain of imports has {longest} modules")


def listed(modules, lines):
    return ", ".join(f"{module.split('.')[-1]} {lines[module]}" for module in modules)


def path(root, module):
    plain = root.joinpath(*module.split("."))
    return plain / "__init__.py" if plain.is_dir() else plain.with_suffix(".py")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit", nargs="?", help="default: the files of this checkout")
    commit = parser.parse_args().commit
    if commit:
        with tempfile.TemporaryDirectory() as folder:
            archive = subprocess.run(["git", "archive", commit, "voltforge"], cwd=ROOT, capture_output=True, check=True)
            subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
            show(Path(folder))
    else:
        show(ROOT)

"""The files to start a pattern from; as written they are whole, and their tests pass."""

from __future__ import annotations

import importlib.resources
import keyword
import re
from pathlib import Path

from fxopt.errors import FxoptError
from fxopt.pipeline import ALL

FILES = {
    "kernel.py.txt": "{name}_kernel.py",
    "pattern.py.txt": "{name}_pattern.py",
    "test.py.txt": "test_{name}.py",
    "benchmark.py.txt": "{name}_benchmark.py",
    "page.md.txt": "{name}.md",
}


def write_skeleton(name: str, out: Path) -> list[Path]:
    """Write the files of a pattern called `name` to the folder `out/name`, which must not exist; return their paths.

    Raises:
        FxoptError: not a name, one of the library's, or the folder is there already or cannot be made.
    """
    is_word = name.isascii() and name.isidentifier() and not keyword.iskeyword(name)
    if not is_word or name != name.lower():
        raise FxoptError(
            f"new-pattern: expected a name of a-z, 0-9 and _ that Python can import, got {name!r}\n"
            "try fxopt new-pattern my_norm"
        )
    if name.startswith("test"):  # pytest would take the kernel's file and functions for tests
        raise FxoptError(
            f"new-pattern: expected a name that pytest takes for no test, got {name!r}\nuse another name"
        )
    if name in {pattern.name for pattern in ALL}:
        raise FxoptError(
            f"new-pattern: {name} is a pattern of the library already, expected a new name\nuse another name"
        )
    skeleton = importlib.resources.files("fxopt.authoring") / "skeleton"
    texts = {target: (skeleton / source).read_text(encoding="utf-8") for source, target in FILES.items()}
    code = (text for target, text in texts.items() if target.endswith(".py"))
    if any(re.search(rf"\b{name}\b", text) for text in code):
        raise FxoptError(
            f"new-pattern: {name} means something else in the files that would be written, expected a new name\n"
            "use another name"
        )
    folder = out / name
    try:
        folder.mkdir(parents=True)
        paths: list[Path] = []
        for target, text in texts.items():
            paths.append(folder / target.format(name=name))
            paths[-1].write_text(text.replace("NAME", name))
    except FileExistsError as error:
        raise FxoptError(
            f"new-pattern: {folder} is there already, expected a new folder\ngive another --out"
        ) from error
    except OSError as error:
        raise FxoptError(
            f"new-pattern: {folder} cannot be written: {error.strerror}\ngive another --out"
        ) from error
    return paths

"""Where a command's plot goes: checked before the work is done that it is for."""

from __future__ import annotations

from pathlib import Path

from fxopt.errors import FxoptError

ENDINGS = (".png", ".pdf", ".svg")


def check_plot_file(path: Path, default: str) -> None:
    """Check that `path`, given as --out in place of `default`, names a plot in a folder that exists.

    Raises:
        FxoptError: it does not.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FxoptError(
            f"--out: expected a file in a folder that exists, got {path}: no such folder: {folder}\n"
            f"make that folder, or leave --out away to write {default} here"
        )
    if path.is_dir():
        raise FxoptError(f"--out: expected a file to write, got the folder {path}")
    if path.suffix not in ENDINGS:
        raise FxoptError(
            f"--out: expected a file name that ends in one of {', '.join(ENDINGS)}, got {path}\n"
            f"it is for a plot: {default}, say"
        )

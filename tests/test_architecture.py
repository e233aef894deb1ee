"""Import directions: each floor of the house imports only from the floors below it.

`ALLOWED` maps a part of fxopt to the parts it may import; a part may always import itself, except where
the files of one folder are apart from each other (`APART`).
"""

from __future__ import annotations

import ast
import collections
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
FOLDERS = {"patterns": ROOT / "patterns", "kernels": ROOT / "kernels", "": ROOT / "fxopt"}

RECORDS = "report.records"
UNITS = "report.units"
PLAN = {"report.plan", "report.plan_table"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "sentences": {"errors"},
    "report": {"errors"},
    "kernels": set(),
    "options": {"errors"},
    "graph": {"errors", RECORDS},
    "capture": {"graph", "options", "errors", "sentences", "kernels.launch", "kernels.launcher", RECORDS},
    "rewriting": {"graph", "options", "errors", "sentences", RECORDS},
    "remat": {"graph", "options", "errors", RECORDS, UNITS, *PLAN},
    "sites": {"rewriting", "graph", RECORDS},
    "reporting": {"capture", RECORDS},
    "timed_values": {"graph", "remat"},
    "gpu_clock": {"remat"},
    "timing": {"gpu_clock", "timed_values", "capture", "graph", "remat", "kernels.launcher"},
    "spreading": {"capture", "remat"},
    "planning": {
        "spreading",
        "timing",
        "capture",
        "remat",
        "kernels.launch",
        "options",
        "errors",
        RECORDS,
        UNITS,
        *PLAN,
    },
    "patterns": {"rewriting", "graph", "kernels", "errors"},
    "runner": {"sites", "capture", "rewriting", "graph", "options", RECORDS},
    "installing": {"planning", "capture", "options"},
    "probing": {"installing", "planning", "reporting", "capture", "remat", "options", RECORDS},
    "strictness": {"errors", RECORDS},
    "restoring": {"capture", "errors"},
    "pipeline": {
        "kernels.launcher",
        "patterns",
        "runner",
        "installing",
        "probing",
        "strictness",
        "planning",
        "capture",
        "rewriting",
        "remat",
        "graph",
        "options",
        *PLAN,
    },
    "explaining": {"pipeline", "probing", "reporting", "capture", "options", "errors", "report"},
    "surveying": {"pipeline", "probing", "planning", "capture", "rewriting", "remat", "options", *PLAN},
    "backend": {"pipeline", "capture", "options", RECORDS},
    "bisection": {"pipeline", "installing", "capture", "graph", "rewriting", "options", "errors"},
    "__init__": {
        "bisection",
        "pipeline",
        "explaining",
        "surveying",
        "restoring",
        "capture.callback",
        "rewriting",
        "remat",
        "options",
        "errors",
        "report",
    },
    "demo": {"__init__", "errors", "report"},
    "coverage": {"demo", "__init__", "errors", RECORDS},
    "offline": {
        "coverage",
        "demo",
        "capture.small_inputs",
        "explaining",
        "surveying",
        "reporting",
        "planning",
        "remat",
        "options",
        "errors",
        "report",
    },
    "authoring": {"coverage", "demo", "pipeline", "probing", "rewriting", "graph", "options", "errors"},
    "cli": {"authoring", "offline", "coverage", "demo", "__init__", "bisection", "errors", "report"},
}
APART = {
    "patterns": {
        "dropped",
        "expert_units",
        "experts_cases",
        "logits",
        "rotations",
        "attention_cases",
        "rope_cases",
        "route_cases",
        "route_groups",
        "norm_rope_cases",
    },
    "kernels": {
        "activations",
        "dequantize_4bit",
        "glu",
        "launch",
        "launcher",
        "rms_norm",
        "rope",
        "row_loss",
    },
}
"""Folders whose files never import each other, but for the shared ones named; `__init__` gathers them.

The kernels of rms_norm also serve add_rms_norm, its tiles layer_norm; parts of both rms_norm and rope norm_rope;
lora_linear decodes the four-bit weights that it multiplies by; experts computes a unit between two products.
"""

HUGGING_FACE = {"transformers", "peft", "bitsandbytes", "accelerate", "huggingface_hub"}
TERMINAL = {"rich", "typer"}
THIRD_PARTY: dict[str, set[str]] = {
    "errors": set(),
    "sentences": set(),
    "options": {"torch"},
    "report": {"jinja2"},
    "kernels": {"torch", "triton"},
    "graph": {"torch"},
    "capture": {"torch", "functorch", "triton", *HUGGING_FACE},
    "rewriting": {"torch"},
    "remat": {"torch", "networkx", "numpy"},
    "sites": {"torch"},
    "reporting": set(),
    "timed_values": {"torch"},
    "gpu_clock": {"torch"},
    "timing": {"torch"},
    "spreading": {"torch"},
    "planning": {"torch"},
    "patterns": {"torch"},
    "runner": {"torch"},
    "installing": {"torch"},
    "probing": {"torch"},
    "strictness": set(),
    "restoring": {"torch"},
    "pipeline": {"torch"},
    "explaining": {"torch"},
    "surveying": {"torch"},
    "backend": {"torch"},
    "bisection": {"torch"},
    "__init__": set(),
    "demo": {"torch", "tokenizers", "matplotlib", *HUGGING_FACE, *TERMINAL},
    "coverage": {"torch", "tqdm", *HUGGING_FACE},
    "authoring": {"torch", "tqdm"},
    "offline": {"torch", "matplotlib", *HUGGING_FACE},
    "cli": {"tqdm", *TERMINAL},
}


def modules() -> Iterator[tuple[str, Path]]:
    """Yield the dotted name below `fxopt` and the path of every module, links left out."""
    for prefix, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            relative = path.relative_to(folder)
            if not prefix and relative.parts[0] in ("patterns", "kernels"):
                continue
            parts = (*filter(None, (prefix,)), *relative.with_suffix("").parts)
            name = ".".join(parts)
            yield name.removesuffix(".__init__"), path


def part_of(name: str) -> str:
    return name.split(".")[0]


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """Yield every module that `path` imports, also inside functions and for type checking, and the line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import, expected an absolute one"
            module = node.module or ""
            for alias in node.names:
                dotted = f"{module}.{alias.name}"
                is_module = module == "fxopt" or module.startswith("fxopt.")
                yield (dotted if is_module and dotted in MODULES else module), node.lineno


MODULES = {f"fxopt.{name}" for name, _ in modules()} | {"fxopt"}


def inside(imported: str) -> str | None:
    """Return the name below `fxopt` that `imported` names, "__init__" for fxopt itself, None for others."""
    if imported == "fxopt":
        return "__init__"
    return imported.removeprefix("fxopt.") if imported.startswith("fxopt.") else None


def violations() -> Iterator[str]:
    for name, path in modules():
        part = part_of(name)
        where = path.relative_to(ROOT)
        if part not in ALLOWED:
            yield f"{where}: {part} is on no floor, expected one of {', '.join(ALLOWED)}"
            continue
        for imported, line in imports_of(path):
            target = inside(imported)
            if target is None:
                package = imported.split(".")[0]
                if package not in sys.stdlib_module_names and package not in THIRD_PARTY[part]:
                    yield f"{where}:{line}: {part} imports {package}"
            elif part_of(target) == part:
                if part in APART and name != part and target != part:
                    file = target.split(".")[1]
                    if file != name.split(".")[1] and file not in APART[part]:
                        yield f"{where}:{line}: files of {part}/ are apart, but it imports {imported}"
            elif target not in ALLOWED[part] and part_of(target) not in ALLOWED[part]:
                yield f"{where}:{line}: {part} imports {imported}"


def test_every_import_goes_down() -> None:
    assert list(violations()) == []


def test_only_the_pipeline_imports_patterns() -> None:
    users = {
        part_of(name)
        for name, path in modules()
        for imported, _ in imports_of(path)
        if (target := inside(imported)) is not None and part_of(target) == "patterns"
    }
    assert users - {"patterns"} <= {"pipeline"}


def test_the_floors_have_no_cycle() -> None:
    done: set[str] = set()

    def visit(part: str, above: tuple[str, ...]) -> None:
        assert part not in above, f"{' -> '.join((*above, part))} is a cycle"
        if part not in done:
            for lower in ALLOWED[part]:
                visit(part_of(lower), (*above, part))
            done.add(part)

    for part in ALLOWED:
        visit(part, ())


NOT_OF_TORCH = {
    "_asdict": "a public method of named tuples",
    "_getframe": "of sys, documented",
    "_active_collector": "of transformers",
    "_gradient_checkpointing_func": "of transformers",
    "_model_mapping": "of transformers",
    "_from_config": "of transformers",
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def own_names(trees: dict[str, ast.Module]) -> set[str]:
    """Return all names that fxopt itself defines or sets, attributes included."""
    found: set[str] = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    return found


def private_parts(tree: ast.Module, own: set[str]) -> Iterator[tuple[int, str]]:
    """Yield the lines that name something private of another library, and what they name.

    Ops of torch's registry, `torch.ops.aten._name`, are told by their schemas and are tested there.
    """
    stock = (torch.nn.Linear(1, 1), torch.Tensor, torch._C, torch)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            if not ast.unparse(node).startswith("torch.ops."):
                yield node.lineno, node.attr
        elif isinstance(node, ast.Import | ast.ImportFrom):
            source = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                dotted = [*source.split("."), *alias.name.split(".")]
                if dotted[0] != "fxopt" and any(map(is_private, dotted)):
                    yield node.lineno, ".".join(filter(None, dotted))
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and is_private(node.value)
            and any(hasattr(holder, node.value) for holder in stock)
        ):
            yield node.lineno, node.value


def is_for_private_parts(name: str) -> bool:
    """Return whether the file of module `name` is one of those that touch private parts of torch."""
    return name.rpartition(".")[2].startswith("torch_")


def test_private_parts_of_torch_are_touched_in_files_named_so_and_tested() -> None:
    trees = {name: ast.parse(path.read_text()) for name, path in modules()}
    own = own_names(trees)
    found = collections.defaultdict(list)
    for name, tree in trees.items():
        for line, part in private_parts(tree, own):
            if part not in NOT_OF_TORCH:
                found[name].append(f"{name}:{line}: {part}")
    private = {name for name in trees if is_for_private_parts(name)}
    assert private - set(found) == set(), "a file is named torch_*.py that touches nothing private"
    others = [line for name in set(found) - private for line in found[name]]
    assert others == [], "wrap these in a file named torch_*.py, with a test of the same name"
    tests = {path.stem for path in (ROOT / "tests").rglob("test_torch_*.py")}
    assert {f"test_{name.rpartition('.')[2]}" for name in private} - tests == set()


def folders_in(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"]


def test_the_folder_of_patterns_is_flat() -> None:
    assert folders_in(FOLDERS["patterns"]) == []


def test_a_folder_of_kernels_is_one_op_and_is_packaged() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    for folder in folders_in(FOLDERS["kernels"]):
        assert f"fxopt.kernels.{folder.name}" in packages
        assert (folder / "__init__.py").exists()
        assert folders_in(folder) == []


def test_the_kernels_package_holds_only_a_docstring() -> None:
    # Hugging Face's package of that name may be looked for while this folder is on the path.
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    assert [type(node) for node in body] == [ast.Expr]

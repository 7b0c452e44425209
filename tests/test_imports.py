"""Who may import what: the contracts of pyproject.toml, and what import-linter cannot state."""

import ast
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import flax_layers
import jax_mxfp4

ROOT = Path(__file__).parents[1]
CORE = Path(jax_mxfp4.__file__).parent
MODULES = sorted([*CORE.rglob("*.py"), *Path(flax_layers.__file__).parent.rglob("*.py")])
OUTSIDE_THE_CORE = {
    "flax",
    "gguf",
    "hypothesis",
    "optax",
    "orbax",
    "pytest",
    "rich",
    "safetensors",
    "tokenizers",
    "typer",
}


def run_python(program: str) -> subprocess.CompletedProcess[str]:
    """Run `program` in a new interpreter that finds the packages that this one finds."""
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {[str(CORE.parent)]!r}\n{program}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def imported_by(statement: str) -> set[str]:
    """Top-level packages in memory after `statement`."""
    process = run_python(
        f"{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})",
    )
    assert process.returncode == 0, process.stderr
    return set(process.stdout.split())


def test_contracts_of_pyproject() -> None:
    process = run_python(
        "from importlinter.cli import lint_imports\nsys.exit(lint_imports(no_cache=True))"
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert "Contracts: 6 kept, 0 broken." in process.stdout


def test_core_needs_jax_and_numpy_only() -> None:
    loaded = imported_by("import jax_mxfp4")
    assert {"jax", "numpy", "jax_mxfp4"} <= loaded
    assert not loaded & (OUTSIDE_THE_CORE | {"flax_layers"})


def test_layers_need_flax_but_no_files_and_no_command() -> None:
    loaded = imported_by("import flax_layers")
    assert {"flax", "jax_mxfp4"} <= loaded
    assert not loaded & {"safetensors", "tokenizers", "typer"}


def test_checkpoints_need_no_flax_and_no_command() -> None:
    loaded = imported_by("import jax_mxfp4.checkpoints")
    assert not loaded & {"flax", "tokenizers", "typer", "rich"}


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(CORE.parent)))
def test_only_ffi_touches_the_native_module_and_jax_ffi(file: Path) -> None:
    if file == CORE / "ffi.py":
        return
    used = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            used |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            used.add(ast.unparse(node))
    assert not {name for name in used if name.startswith("jax.ffi") or "_native" in name}


def test_the_command_is_installed_where_the_package_is() -> None:
    names = {script.name: script.value for script in entry_points(group="console_scripts")}
    if "jax-mxfp4" not in names:
        pytest.skip("runs from a source tree: the package is not installed")
    assert names["jax-mxfp4"] == "jax_mxfp4.cli:main"

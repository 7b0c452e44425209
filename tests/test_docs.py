"""The documents keep their promises: examples run, figures are the measured ones, links lead."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from jax_mxfp4 import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NAMES = [
    "mxfp4-research.md",
    "mxfp4-validation-framework.md",
    "mxfp4-precision-analysis.md",
    "mxfp4-hardware-support.md",
    "mxfp4-implementation-guide.md",
    "mxfp4-sources-bibliography.md",
]
BIBLIOGRAPHY = "mxfp4-sources-bibliography.md"


def read(name: str) -> str:
    return (DOCS / name).read_text()


def figures_module(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, DOCS / "figures" / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def examples(name: str) -> Iterator[tuple[int, str]]:
    """Line number and text of each python block."""
    text = read(name)
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S):
        yield text.count("\n", 0, match.start(1)), match[1]


def anchors(path: Path) -> set[str]:
    """What a link to `path` can end in: GitHub's names of headings, and explicit ids."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    headings = (re.sub(r"[^\w\- ]", "", h).strip() for h in re.findall(r"^#+ (.*)$", text, re.M))
    ids = re.findall(r'<a id="([^"]+)">', text)
    assert len(ids) == len(set(ids))
    return {h.lower().replace(" ", "-") for h in headings} | set(ids)


def links(text: str) -> list[str]:
    inline = re.findall(r"\]\(([^)\s]+)\)", text)
    return inline + re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.M)


@pytest.mark.parametrize("name", [name for name in NAMES if "```python" in read(name)])
def test_examples_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": name}
    for line, source in examples(name):
        # Blank lines in front make a traceback name the line of the document.
        exec(compile("\n" * line + source, name, "exec"), namespace)
    # What a document says that its examples print is what they print.
    printed = capsys.readouterr().out
    for shown in re.findall(r"^```output\n(.*?)^```$", read(name), re.M | re.S):
        assert shown in printed


def test_most_documents_have_examples():
    assert sum(1 for name in NAMES if any(examples(name))) >= 5


def test_tables_hold_the_measured_figures():
    tables = figures_module("tables")
    marked = []
    for name in NAMES:
        text = read(name)
        assert tables.fill(text) == text, f"run python docs/figures/tables.py ({name})"
        marked += [found[2] for found in tables.MARKED.finditer(text)]
    assert set(marked) == set(tables.TABLES)


def test_plots_are_drawn_and_shown(tmp_path):
    figures_module("plots").main(tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (DOCS / "figures").glob("*.svg")}
    text = "".join(map(read, NAMES))
    assert all(f"](figures/{name})" in text for name in drawn)


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    for link in links(read(name)):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = DOCS / file if file else DOCS / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("name", NAMES)
def test_reference_links_are_defined_and_used(name):
    text = read(name)
    defined = set(re.findall(r"^\[([^\]]+)\]: ", text, re.M))
    used = set(re.findall(r"\]\[([^\]]+)\]", text))
    assert used == defined


@pytest.mark.parametrize("name", NAMES)
def test_named_files_and_tests_exist(name):
    pattern = (
        r"`((?:benchmarks|tests|docs|cuda|jax_mxfp4|flax_layers|examples)/[\w./-]*)(?:::(\w+))?`"
    )
    for path, test in re.findall(pattern, read(name)):
        assert (ROOT / path).exists(), path
        if test:
            assert f"def {test}(" in (ROOT / path).read_text(), f"{path}::{test}"


def test_every_source_is_used_and_every_citation_has_a_source():
    keys = set(re.findall(r'<a id="([^"]+)">', read(BIBLIOGRAPHY)))
    cited = set()
    for name in NAMES:
        cited |= set(re.findall(rf"{re.escape(BIBLIOGRAPHY)}#([\w-]+)", read(name)))
    assert cited == keys


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_those_of_the_program(name):
    known = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    known |= {group.name for group in cli.app.registered_groups}
    assert set(re.findall(r"jax-mxfp4 ([a-z]+)\b", read(name))) <= known

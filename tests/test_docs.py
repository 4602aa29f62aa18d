"""What the documentation says is run: the examples in docstrings, and the Python in Markdown.

In a Markdown file, blocks that are fenced as ``python`` run in the order of the page, in one
namespace and an empty directory; blocks fenced as ``pycon`` are doctests in that namespace, whose
output must be as printed. What can't run is fenced as something else, such as ``text``.
"""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

import distckpt

_ROOT = Path(__file__).parent.parent
_PAGES = [_ROOT / "README.md", *sorted((_ROOT / "docs").rglob("*.md"))]
_MODULES = sorted(
    found.name
    for found in pkgutil.walk_packages(distckpt.__path__, "distckpt.")
    if "._pb" not in found.name and not found.name.endswith(".__main__")
)

# A fence may be indented, as in a list; it ends with as many backticks or more.
_FENCE = re.compile(
    r"^(?P<indent> *)(?P<ticks>`{3,})(?P<language>[\w-]+)[^\n`]*\n"
    r"(?P<text>.*?)^(?P=indent)(?P=ticks)`*[ ]*$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the page that it begins on."""

    language: str
    text: str
    line: int


def blocks_of(page):
    """Find the fenced blocks of a page that are run."""
    found = []
    for fence in _FENCE.finditer(page):
        indent = len(fence["indent"])
        text = "".join(line[indent:] for line in fence["text"].splitlines(keepends=True))
        line = page.count("\n", 0, fence.start("text")) + 1
        found.append(Block(fence["language"], text, line))
    return [block for block in found if block.language in {"python", "pycon"}]


def run_page(page, name):
    """Run a page's blocks in order; errors point at its lines."""
    space = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.language == "python":
            padded = "\n" * (block.line - 1) + block.text
            exec(compile(padded, name, "exec", dont_inherit=True), space)
        else:
            test = doctest.DocTestParser().get_doctest(
                block.text, space, name, name, block.line - 1
            )
            said = []
            doctest.DocTestRunner().run(test, out=said.append, clear_globs=False)
            space |= test.globs
            assert not said, "".join(said)


@pytest.mark.parametrize("name", _MODULES)
def test_examples_in_docstrings_do_what_they_say(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Not pkgutil's own: `distckpt.match` is also a function's name.
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module)
    assert not failed


@pytest.mark.parametrize("path", _PAGES, ids=lambda path: str(path.relative_to(_ROOT)))
def test_python_on_a_page_runs_in_its_order(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(path.read_text(encoding="utf-8"), str(path))


# ----------------------------------------------------------------------------- the machinery itself


def test_blocks_share_a_namespace_and_what_is_no_python_is_left_alone():
    page = [
        "Text.\n```python\na = 1\n```\n",
        "```text\nnot python\n```\n",
        "- item\n  ```python\n  assert a == 1\n  b = 2\n  ```\n",
        "```pycon\n>>> a + b\n3\n```\n",
        "````python\nassert b == 2\n````\n",
    ]
    assert len(blocks_of("".join(page))) == 4
    run_page("".join(page), "page.md")


def test_an_error_in_a_block_points_at_its_line():
    with pytest.raises(ZeroDivisionError) as caught:
        run_page("# Title\n\n```python\nx = 1\n1 / 0\n```\n", "page.md")
    assert caught.tb.tb_next.tb_next.tb_lineno == 5


def test_printed_output_that_differs_is_an_error():
    with pytest.raises(AssertionError, match=r"Expected:\s+3\s+Got:\s+2"):
        run_page("```pycon\n>>> 1 + 1\n3\n```\n", "page.md")


def test_the_pages_and_modules_are_found():
    assert _PAGES[0].name == "README.md"
    assert {"distckpt.api", "distckpt.match", "distckpt.codec.plain", "distckpt.plan.write"} <= {
        *_MODULES
    }

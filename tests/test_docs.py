"""The docs say what is true: code blocks run, links lead somewhere, every public name and every page is to be found.

Whether the site can be built, and every heading that is linked to is there, `make docs` shows.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from multiproc.harness import Worker

import ft_transport
import ft_transport.distributed
import ft_transport.testing
from ft_transport.bench import __main__ as bench

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What mkdocstrings shows the docstrings of.
DIRECTIVE = re.compile(r"^::: ft_transport\.([\w.]+)$", re.MULTILINE)
IN_THE_NAV = re.compile(r"^ +- .*: ([\w-]+\.md)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if FENCE.search(page.read_text())], ids=name)
def test_code_blocks_run(page: Path) -> None:
    blocks = FENCE.findall(page.read_text())
    assert {language for language, _ in blocks} == {"python"}, "a block in another language would not be tested"
    # The blocks of a page build on each other, as a reader would type them.
    code = "\n".join(block for _, block in blocks)
    # In a process of its own, forked from one that has imported torch.
    reader = Worker(page.name)
    try:
        reader.call(as_main, code)
    finally:
        reader.end()


def as_main(code: str) -> None:
    """Run a program as if it had been given to Python, from the root, silently."""
    os.chdir(ROOT)
    for descriptor in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    sys.modules["__main__"] = main = ModuleType("__main__")
    exec(compile(code, "<docs>", "exec"), vars(main))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [target for target in LINK.findall(page.read_text()) if "://" not in target]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def test_the_pages_of_the_site_link_to_its_pages_alone() -> None:
    # The site is docs/: what lies beside it is on nobody's server.
    site = ROOT / "docs"
    targets = {target for page in site.glob("*.md") for target in LINK.findall(page.read_text())}
    outside = {target for target in targets if "://" not in target and site not in (site / target).resolve().parents}
    assert outside == set()


def test_every_page_is_in_the_nav_once() -> None:
    nav = IN_THE_NAV.findall((ROOT / "mkdocs.yml").read_text())
    assert sorted(nav) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


# ------------------------------------------------------------------------------------------------- API

SHOWN = [name for page in (ROOT / "docs").glob("*.md") for name in DIRECTIVE.findall(page.read_text())]
NAMES = [
    *(name for name in ft_transport.__all__ if name != "__version__"),
    *(f"{module.__name__.partition('.')[2]}.{name}" for module in (ft_transport.distributed, ft_transport.testing)
      for name in module.__all__),
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_of_every_public_name_is_shown_once(name: str) -> None:
    # Where a function has the name of its file, mkdocstrings takes the shorter one for the file's.
    assert [shown for shown in SHOWN if shown in (name, f"{name}.{name}")] in ([name], [f"{name}.{name}"])


def test_nothing_else_is_shown() -> None:
    assert {name for name in SHOWN if name not in NAMES} == {"state_digest.state_digest"}


def test_the_options_of_the_benchmark_are_shown() -> None:
    page = (ROOT / "docs" / "api-bench.md").read_text()
    actions = [action for action in bench._parser()._actions if action.dest != "help"]
    for action in actions:
        # Without the default, which has a column of its own.
        assert action.help is not None
        says = re.sub(r" \(%\(default\)\w\)$", "", action.help)
        option = " ".join(filter(None, [action.option_strings[0], action.metavar]))
        assert re.search(rf"^\| `{re.escape(option)}` \| .*\| {re.escape(says)} \|$", page, re.MULTILINE), option
    assert page.count("| `--") == len(actions)


# ------------------------------------------------------------------------------- docstrings on the site


@pytest.fixture(scope="module")
def to_markdown() -> Callable[[str, dict[str, str]], str]:
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "docs" / "assets" / "docstrings.py")
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[[str, dict[str, str]], str] = module.to_markdown
    return found


def linked(name: str) -> str:
    return f'<autoref optional identifier="ft_transport.{name}"><code>{name}</code></autoref>'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("See :class:`Kind`, not :func:`other`.", f"See {linked('Kind')}, not `other`."),
        ("See :class:`~ft_transport.Kind`.", f"See {linked('Kind')}."),
        ("As ``Kind.check``, with ``strict``.", f"As {linked('Kind.check')}, with `strict`."),
        ("see ``docs/faults.md``", "see [faults](faults.md)"),
        (
            "Raises:\n    ValueError: It is.\nAfter an error: nothing\n    is left.\nThreading: any.",
            "Raises:\n    ValueError: It is.\n\n**After an error:** nothing is left.\n\n**Threading:** any.",
        ),
        ("So::\n\n    with ``x``:\n        pass\n\nThen.", "So:\n\n```python\nwith ``x``:\n    pass\n```\n\nThen."),
        ("So. ::\n\n    a\n\n    b", "So.\n\n```python\na\n\nb\n```"),
    ],
)
def test_docstrings_are_markdown_on_the_site(
    to_markdown: Callable[[str, dict[str, str]], str], text: str, expected: str
) -> None:
    # Blank lines more or less change nothing.
    assert re.sub("\n\n+", "\n\n", to_markdown(text, {"Kind": "ft_transport.Kind"})).strip() == expected

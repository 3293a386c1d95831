"""Every Python code block of the README and of the pages in docs/ runs, and every link between them leads somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import ft_transport

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WORD = re.compile(r"\w+")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if FENCE.search(page.read_text())], ids=name)
def test_code_blocks_run(page: Path) -> None:
    blocks = FENCE.findall(page.read_text())
    assert {language for language, _ in blocks} == {"python"}, "a block in another language would not be tested"
    # The blocks of a page build on each other, as a reader would type them.
    code = "\n".join(block for _, block in blocks)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [target for target in LINK.findall(page.read_text()) if "://" not in target]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("public", ft_transport.__all__)
def test_every_public_name_is_on_a_page(public: str) -> None:
    assert any(public in WORD.findall(page.read_text()) for page in PAGES if page.parent.name == "docs")

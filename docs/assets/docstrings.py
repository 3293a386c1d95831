"""How docstrings get onto the site: an extension of griffe's, which reads the sources for mkdocstrings.

Docstrings are written to be read in the sources and by ``help()``: Sphinx's roles, and sections that Google's style
does not know. Signatures name defaults and types that are private, where a reader wants what they are.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

try:
    import griffe
except ModuleNotFoundError:  # the tests call to_markdown alone, and need no more than the package does
    griffe = None

__all__ = ["to_markdown"]

_ROLE = re.compile(r":[a-z]+:`~?([^`]+)`")
_CODE = re.compile(r"``([^`\n]+)``")
_PAGE = re.compile(r"docs/([a-z-]+)\.md")
# What follows a title on its line, and what is indented below it.
_SECTION = re.compile(r"^(After an error|Threading): (.*(?:\n    .*)*)", re.MULTILINE)
_BLOCK = re.compile(r"^(.*)::\n\n((?:    .*\n|\n)*    .*)$", re.MULTILINE)


def to_markdown(text: str, public: Mapping[str, str]) -> str:
    """A docstring of ours as mkdocstrings takes it.

    Args:
        text: In Google's style, with Sphinx's roles.
        public: Full path of each public name, to link it.
    """

    def link(found: re.Match[str]) -> str:
        if page := _PAGE.fullmatch(found[1]):
            return f"[{page[1]}]({page[1]}.md)"
        name = found[1].removeprefix("ft_transport.").removeprefix("testing.")
        head, _, rest = name.partition(".")
        if head not in public:
            return f"`{found[1]}`"
        path = public[head] + (f".{rest}" if rest else "")
        # Optional: what is public has no entry of its own where it is inherited from what is not documented.
        return f'<autoref optional identifier="{path}"><code>{name}</code></autoref>'

    def code(found: re.Match[str]) -> str:
        # As reStructuredText has it: two colons behind a word leave one, and behind a space none.
        before = found[1].rstrip() if found[1].endswith(" ") else found[1] and f"{found[1]}:"
        lines = re.sub("^    ", "", found[2], flags=re.MULTILINE)
        return (before and f"{before}\n\n") + f"```python\n{lines}\n```"

    blocks: list[str] = []

    def aside(found: re.Match[str]) -> str:
        # What is code already is taken out of the way of the rest.
        blocks.append(code(found))
        return f"\0{len(blocks) - 1}\0"

    text = _BLOCK.sub(aside, text)
    text = _SECTION.sub(lambda found: f"\n**{found[1]}:** " + re.sub(r"\n +", " ", found[2]) + "\n", text)
    text = _CODE.sub(link, _ROLE.sub(link, text))
    return re.sub("\0(\\d+)\0", lambda found: blocks[int(found[1])], text)


class Docstrings(griffe.Extension if griffe else object):  # type: ignore[misc]
    """Changes what griffe has read of this package, once all of it is there."""

    def on_package(self, *, pkg: Any, loader: Any, **kwargs: Any) -> None:
        public = {name: _path(module, name) for module in (pkg["testing"], pkg) for name in module.exports or ()}
        known = loader.modules_collection
        for obj in _all_below(pkg):
            if obj.is_class and obj.docstring and _is_given(obj.docstring.value):
                obj.members.pop("__init__", None)
                obj.decorators = []  # or griffe makes one for a dataclass
            if obj.docstring:
                obj.docstring.value = to_markdown(obj.docstring.value, public)
            if obj.is_function:
                _spell_out(obj, lambda path: _behind(known, path, public))
            elif obj.is_attribute:
                obj.annotation = _replaced(obj.annotation, lambda path: _behind(known, path, public))
                if obj.name in public:
                    obj.value = _replaced(obj.value, lambda path: _behind(known, path, public))


def _is_given(docstring: str) -> bool:
    """Whether users get objects of a class, and make none: it says what they hold, and not what they are made with."""
    return "Attributes:" in docstring and "Args:" not in docstring


def _path(module: Any, name: str) -> str:
    # Where a function has the name of the file that it is in, griffe finds the file.
    member = module.members.get(name)
    return f"{module.path}.{name}" + (f".{name}" if member is not None and member.is_module else "")


def _all_below(obj: Any) -> Any:
    yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from _all_below(member)


def _spell_out(function: Any, behind: Callable[[str], Any]) -> None:
    """Put what a private name stands for in its place, in a signature."""
    own = function.parameters[0].annotation if len(function.parameters) else None
    for parameter in function.parameters:
        parameter.annotation = _replaced(parameter.annotation, behind)
        parameter.default = _replaced(parameter.default, behind)
    function.returns = _replaced(function.returns, behind)
    if own is not None and function.parameters[0].name == "self":
        # A type variable that says: of the class that it is called on.
        function.parameters[0].annotation = None
        if str(function.returns) == str(own):
            function.returns = griffe.ExprName("Self")


def _behind(known: Any, path: str, public: Mapping[str, str]) -> Any:
    """The value of a private constant or alias of a type, None for all else."""
    name = path.rpartition(".")[2]
    if not path.startswith("ft_transport.") or name in public:
        return None
    try:
        found = known[path]
        while found.is_alias:
            found = found.target
    except (KeyError, griffe.AliasResolutionError, griffe.CyclicAliasError):
        return None
    # A type variable is a call, and says less than its name.
    if not found.is_attribute or isinstance(found.value, griffe.ExprCall):
        return None
    return found.value


def _replaced(expression: Any, behind: Callable[[str], Any]) -> Any:
    """An expression with each private name in it replaced, as deep as it goes."""
    if isinstance(expression, list):
        return [_replaced(each, behind) for each in expression]
    if not (griffe and isinstance(expression, griffe.Expr)):
        return expression
    if isinstance(expression, griffe.ExprName | griffe.ExprAttribute):
        value = behind(expression.canonical_path)
        return expression if value is None else _replaced(value, behind)
    changes = {
        field.name: _replaced(getattr(expression, field.name), behind)
        for field in dataclasses.fields(expression)
        if field.init
    }
    return dataclasses.replace(expression, **changes)

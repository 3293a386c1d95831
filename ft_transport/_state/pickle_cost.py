"""What a pickle from a peer would cost, found out before it is unpickled.

An allow-list decides what a pickle may name, not what it costs: forty bytes make a key whose hash takes years (a tuple
of twice a tuple of twice a tuple …, each fetched from the memo), or one nested so deep that hashing it overruns the
C stack. So the opcodes are walked through once, with costs on the stack in the place of values. What is called must
have been named by the pickle itself, where the allow-list sees it, and the harmless functions of ``_state.pickles``
must be called as an honest pickle calls them: ``Counter`` of a range of 2^62 is small, too.

Not here: what is named (the allow-list), and what an allowed class does when it is built or hashed.
"""

from __future__ import annotations

import pickletools
from typing import Any

__all__ = ["MAX_COST", "MAX_DEPTH", "check_cost"]

# Bounds the values that hashing and building walk through, what comes from the memo counted each time: under a second.
MAX_COST = 1 << 24
# Bounds the nesting; Python's own pickler gives up at about 500 levels.
MAX_DEPTH = 1_000
# Bounds the keys of one dict or set that are not text, see ``_state.values.MAX_UNSALTED_KEYS``.
MAX_KEYS = 1 << 14

# What each opcode leaves on the stack, as costs: the interpreter below has a page for what pickle has a thousand lines
# for, because nothing is made.
_TEXT = {"str", "bytes", "unicode", "bytes_or_str"}
_PUT = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GET = {"GET", "BINGET", "LONG_BINGET"}
# Change what lies below their arguments; in some of them all arguments, in others every second, are keys.
_CHANGE = {"APPEND": 0, "APPENDS": 0, "BUILD": 0, "SETITEM": 2, "SETITEMS": 2, "ADDITEMS": 1}


class _Cell:
    """A value on the stack: what walking through it costs, how deep it is, how many keys of it are not text.

    ``made_by`` is the opcode that made it, ``called`` the name of what a call made it with; ``what`` the parts of a
    tuple, or a text, or a name.
    """

    __slots__ = ("called", "cost", "depth", "is_text", "made_by", "num_keys", "what")

    def __init__(self, is_text: bool = False, made_by: str = "", what: Any = None, called: str = "") -> None:
        self.made_by = made_by
        self.called = called
        self.what = what
        self.cost = 1
        self.depth = 0
        self.num_keys = 0
        self.is_text = is_text

    def take(self, parts: list[_Cell], keys: list[_Cell]) -> None:
        self.cost += sum(part.cost for part in parts)
        self.depth = max(self.depth, *(part.depth + 1 for part in parts), 0)
        self.num_keys += sum(not key.is_text for key in keys)
        if self.depth > MAX_DEPTH:
            raise ValueError(f"a pickle nested deeper than {MAX_DEPTH} levels")
        if self.num_keys > MAX_KEYS:
            raise ValueError(f"a pickled container with more than {MAX_KEYS} keys that are not text")


def check_cost(data: bytes) -> None:
    """Check that unpickling ``data`` takes time and stack in proportion to its size, and that torch's weights-only
    unpickler can do it, as far as the classes that it names have no say in it.

    Raises:
        ValueError: It does not, or ``data`` is no pickle.
    """
    machine = _Machine()
    for opcode, arg, _ in pickletools.genops(data):
        machine.step(opcode, arg)
        if machine.cost > MAX_COST:
            raise ValueError(f"a pickle of more than {MAX_COST} values")


_LOAD = {"PERSID", "BINPERSID"}
_NAME = {"GLOBAL", "STACK_GLOBAL"}
_CALL = {"REDUCE", "NEWOBJ", "NEWOBJ_EX"}


def _name_of(function: _Cell) -> str:
    name = function.what
    return name.replace(" ", ".") if isinstance(name, str) else ".".join(map(str, name or ()))


def _check_call(function: _Cell, args: _Cell) -> None:
    """A function comes from the pickle, and a harmless one gets what it gets from honest picklers."""
    if function.made_by not in _NAME:
        raise ValueError("a pickle that calls what it does not name")
    name = _name_of(function)
    given = args.what if isinstance(args.what, list) else []
    wanted = _ARGUMENTS.get(name)
    if wanted is not None and not ("TUPLE" in args.made_by and wanted(given)):
        raise ValueError(f"a pickle that calls {name} with something else than its own arguments")


# What those of ``_state.pickles.HARMLESS`` are called with.
_ARGUMENTS: dict[str, Any] = {
    "collections.OrderedDict": lambda given: not given,
    "collections.Counter": lambda given: all("DICT" in part.made_by for part in given) and len(given) < 2,
    "_codecs.encode": lambda given: [part.what for part in given[1:]] == ["latin1"] and given[0].is_text,
}


def _is_list(cell: _Cell) -> bool:
    return cell.made_by in ("EMPTY_LIST", "LIST")


def _is_dict(cell: _Cell) -> bool:
    return cell.made_by in ("EMPTY_DICT", "DICT") or cell.called in ("collections.OrderedDict", "collections.Counter")


# What the weights-only unpickler puts items into: of exactly these classes.
_TAKEN_BY = {"APPEND": _is_list, "APPENDS": _is_list, "SETITEM": _is_dict, "SETITEMS": _is_dict}


class _Machine:
    def __init__(self) -> None:
        self.cost = 0
        self._stack: list[_Cell] = []
        self._marks: list[int] = []
        self._memo: dict[int, _Cell] = {}

    def step(self, opcode: Any, arg: Any) -> None:
        name = opcode.name
        self.cost += 1
        if name == "MARK":
            self._marks.append(len(self._stack))
        elif name in _PUT:
            self._memo[len(self._memo) if arg is None else arg] = self._top()
        elif name in _GET:
            self._push(self._memo[arg])
        elif name == "DUP":
            self._push(self._top())
        elif name == "POP" and self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        elif name in _CHANGE:
            parts = self._pop(opcode.stack_before[1:])
            if name == "BUILD" and self._top().made_by in _LOAD:
                raise ValueError("a pickle that changes what it was given")
            if name in _TAKEN_BY and not _TAKEN_BY[name](self._top()):
                raise ValueError(f"a pickle that puts items into a {self._top().called}, which cannot be read")
            step = _CHANGE[name]
            self._top().take(parts, parts[::step] if step else [])
            self.cost += sum(part.cost for part in parts)
        else:
            self._make(opcode, arg)

    def _make(self, opcode: Any, arg: Any) -> None:
        """Any other opcode takes some values and puts others, made of them, in their place."""
        parts = self._pop(opcode.stack_before)
        if opcode.name in _CALL:
            _check_call(*parts[:2])
        what = (
            parts if "TUPLE" in opcode.name else [part.what for part in parts] if opcode.name == "STACK_GLOBAL" else arg
        )
        self.cost += sum(part.cost for part in parts)
        called = _name_of(parts[0]) if opcode.name in _CALL else ""
        for made in opcode.stack_after:
            cell = _Cell(made.name in _TEXT, opcode.name, what, called)
            cell.take(parts, parts if opcode.name == "FROZENSET" else parts[::2] if opcode.name == "DICT" else [])
            self._stack.append(cell)

    def _top(self) -> _Cell:
        if len(self._stack) <= self._floor():
            raise ValueError("a pickle that takes more than it has")
        return self._stack[-1]

    def _push(self, cell: _Cell) -> None:
        self.cost += cell.cost
        self._stack.append(cell)

    def _pop(self, before: list[Any]) -> list[_Cell]:
        if any(kind.name == "mark" for kind in before):
            begin = self._marks.pop() if self._marks else -1
        else:
            begin = len(self._stack) - len(before)
        if begin < self._floor():
            raise ValueError("a pickle that takes more than it has")
        parts = self._stack[begin:]
        del self._stack[begin:]
        return parts

    def _floor(self) -> int:
        """What lies below the last mark is out of reach."""
        return self._marks[-1] if self._marks else 0

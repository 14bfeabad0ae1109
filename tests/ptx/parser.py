# SPDX-License-Identifier: Apache-2.0
"""PTX text into typed instructions: a module holds variables and functions, a function holds its
registers, its variables and one flat list of instructions with the labels resolved to indices.

Braces open scopes: nvcc pastes inline assembly with declarations of its own, and two pastes may
declare the same name. A name is therefore made unique here, once, so that nobody downstream needs
to know about scopes.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


class PtxError(Exception):
    """PTX that cannot be parsed or run; the message quotes the line."""


@dataclass(frozen=True)
class Reg:
    name: str
    negated: bool = False


@dataclass(frozen=True)
class Imm:
    """An integer, or the bits of a float literal with its width in `float_bits`."""

    value: int
    float_bits: int = 0


@dataclass(frozen=True)
class Special:
    name: str


@dataclass(frozen=True)
class Symbol:
    """The address of a variable, a label or a function."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Address:
    base: Reg | Symbol | Imm
    offset: int = 0


@dataclass(frozen=True)
class Vector:
    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """``d|p``: two destinations."""

    first: Operand
    second: Operand


Operand = Reg | Imm | Special | Symbol | Address | Vector | Pair


@dataclass
class Instruction:
    op: str
    mods: tuple[str, ...]
    args: tuple[Operand, ...]
    guard: Reg | None
    line: int
    text: str
    # (file, line) of what it was compiled from, and of the calls that were inlined around it
    source: tuple[tuple[str, int], ...] = ()

    def error(self, why: str) -> PtxError:
        return PtxError(f"PTX line {self.line}: {why}: {self.text}")

    @property
    def full(self) -> str:
        return ".".join((self.op, *self.mods))


@dataclass
class Variable:
    name: str
    space: str
    align: int
    size: int
    data: bytes | None = None
    extern: bool = False


@dataclass
class Function:
    name: str
    is_entry: bool
    params: list[Variable] = field(default_factory=list)
    returns: list[Variable] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    line: int = 0
    max_threads: int = 1024


@dataclass
class Module:
    target: str
    variables: dict[str, Variable]
    functions: dict[str, Function]
    text: str


WIDTH = {"pred": 1, "tf32": 4, "f16x2": 4, "bf16x2": 4, "bf16": 2}
WIDTH.update({f"{k}{n}": n // 8 for k in "busf" for n in (8, 16, 32, 64, 128)})

_SKIPPED = re.compile(r"^\.(version|address_size|file|pragma|section|alias)\b")
_WHOLE_LINE = re.compile(r"^\.(version|target|address_size|file|loc)\b")  # no semicolon ends these
_FILE = re.compile(r'^\s*\.file\s+(\d+) "(.*)"', re.M)
_DECIMAL = re.compile(r"^-?\d+\.\d*([eE][+-]?\d+)?$")
_NUMBER = re.compile(r"^(-?)(0[xX][0-9a-fA-F]+|0[fFdD][0-9a-fA-F]+|0[bB][01]+|\d+)[uU]?$")
_IDENTIFIER = re.compile(r"^[A-Za-z_$%][\w$]*$")
_SPECIAL = re.compile(
    r"^%(n?tid|n?ctaid|laneid|warpid|nwarpid|smid|nsmid|gridid|clock|clock64|clock_hi|globaltimer"
    r"|lanemask_(eq|lt|le|gt|ge)|dynamic_smem_size|total_smem_size)(\.[xyzw])?$"
)
_DECLARATION = re.compile(
    r"^(?:\.visible\s+|\.weak\s+)*(?P<extern>\.extern\s+)?\.(?P<space>global|const|shared|local|param)\s+"
    r"(?:\.align\s+(?P<align>\d+)\s+)?"
    r"\.(?P<type>\w+)\s+(?:\.ptr\s*(?:\.(?:global|shared|const|local)\s*)?(?:\.align\s+\d+\s+)?)?"
    r"(?P<name>[\w$%]+)(?P<dims>(?:\[\d*\])*)\s*(?:=\s*(?P<init>.*))?$",
    re.S,
)
_ENTRY = re.compile(r"\.(?P<kind>entry|func)\s*(?P<ret>\([^)]*\))?\s*(?P<name>[\w$]+)", re.S)


def number(text: str) -> Imm | None:
    """A PTX literal, or None: decimal, hex, binary, 0f (bits of an f32), 0d (bits of an f64)."""
    if _DECIMAL.match(text):
        return Imm(float_bits(float(text)), 64)
    found = _NUMBER.match(text)
    if not found:
        return None
    sign, digits = found.groups()
    kind = digits[:2].lower()
    if kind in ("0f", "0d") and len(digits) == (10 if kind == "0f" else 18):
        bits = 32 if kind == "0f" else 64
        value = int(digits[2:], 16)
        return Imm(value ^ (1 << (bits - 1)) if sign else value, bits)
    base = {"0x": 16, "0b": 2}.get(kind, 10)
    value = int(digits[2:] if base != 10 else digits, base)
    return Imm(-value if sign else value)


def _strip(text: str) -> str:
    """Comments and debug sections become as many empty lines, so line numbers stay true."""

    def blank(found: re.Match[str]) -> str:
        return "\n" * found.group().count("\n")

    text = re.sub(r"/\*.*?\*/|//[^\n]*", blank, text, flags=re.S)
    return re.sub(r"^\s*\.section\s+[.\w]+\s*\{[^}]*\}", blank, text, flags=re.M)


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """(line, statement): statements end at ``;``, or are one of ``{ } label:`` or a header.

    A ``{`` opens a scope when it begins a statement; elsewhere it is a vector or an initialiser.
    """
    line, start_line, buffer, nesting = 1, 1, "", 0
    for c in text:
        if c == "\n":
            line += 1
        stripped = buffer.strip()
        if not stripped and not c.isspace():
            start_line = line
        if c == ";" and nesting == 0:
            yield start_line, stripped
            buffer = ""
        elif c == "{":
            if not stripped:
                yield line, "{"
                buffer = ""
            elif _ENTRY.search(stripped) and stripped.startswith("."):
                yield start_line, stripped
                yield line, "{"
                buffer = ""
            else:
                nesting += 1
                buffer += c
        elif c == "}":
            if nesting:
                nesting -= 1
                buffer += c
            elif stripped:
                raise PtxError(f"PTX line {start_line}: unfinished statement: {stripped[:80]}")
            else:
                yield line, "}"
                buffer = ""
        elif c == ":" and re.match(r"^[\w$%]+$", stripped) and nesting == 0:
            yield start_line, stripped + ":"
            buffer = ""
        elif c == "\n" and nesting == 0 and _WHOLE_LINE.match(stripped):
            yield start_line, stripped
            buffer = ""
        else:
            buffer += c
    if buffer.strip():
        raise PtxError(f"PTX line {start_line}: unfinished statement: {buffer.strip()[:80]}")


def _split(text: str) -> list[str]:
    """Splits at commas outside brackets."""
    parts, depth, current = [], 0, ""
    for c in text:
        depth += (c in "[{(") - (c in "]})")
        if c == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += c
    if current.strip():
        parts.append(current.strip())
    return parts


def _initial(text: str, element: int, kind: str) -> bytes:
    values = _split(text.strip()[1:-1]) if text.strip().startswith("{") else [text.strip()]
    data = b""
    for value in values:
        literal = number(value)
        if literal is None:
            raise PtxError(f"initialiser {value!r} is not a literal")
        data += (literal.value & ((1 << (8 * element)) - 1)).to_bytes(element, "little")
    return data


def variable(text: str, line: int) -> Variable:
    """Parses one declaration of memory, a parameter included."""
    found = _DECLARATION.match(text.strip())
    if not found:
        raise PtxError(f"PTX line {line}: unknown declaration: {text.strip()}")
    element = WIDTH[found["type"]]
    dims = re.findall(r"\[(\d*)\]", found["dims"])
    size = element
    for dim in dims:
        size *= int(dim) if dim else 0
    data = _initial(found["init"], element, found["type"]) if found["init"] else None
    if data is not None:
        size = max(size, len(data))
        data = data.ljust(size, b"\0")
    align = int(found["align"]) if found["align"] else element
    return Variable(found["name"], found["space"], align, size, data, bool(found["extern"]))


class _Body:
    """Parses the statements of one function."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.scopes: list[dict[str, str]] = [{}]
        self.counter = 0
        self.around: dict[str, str] = {}  # a place, and that of the call it was inlined at
        self.source: tuple[tuple[str, int], ...] = ()

    def declare(self, name: str) -> str:
        scope = self.scopes[-1]
        unique = name if len(self.scopes) == 1 else f"{name}@{self.counter}"
        scope[name] = unique
        return unique

    def lookup(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return name

    def place(self, text: str, files: dict[str, str]) -> None:
        """What follows is of this line. Of the calls around it only the next is told, and of a line
        that several calls have inlined, the last one told counts."""
        here, *outer = re.findall(r"\d+ \d+ \d+", text)
        if outer:
            self.around[here] = outer[0]
        else:
            self.around.pop(here, None)
        chain = [here]
        while self.around.get(chain[-1], chain[0]) not in chain:
            chain.append(self.around[chain[-1]])
        pairs = (place.split()[:2] for place in chain)
        self.source = tuple((files[file], int(line)) for file, line in pairs)

    def open(self) -> None:
        self.counter += 1
        self.scopes.append({})

    def registers(self, text: str) -> None:
        found = re.match(r"^\.reg\s+(?:\.v[24]\s+)?\.(\w+)\s+(.*)$", text, re.S)
        assert found
        for name in _split(found[2]):
            ranged = re.match(r"^(.*)<(\d+)>$", name)
            names = [f"{ranged[1]}{i}" for i in range(int(ranged[2]))] if ranged else [name]
            for each in names:
                self.function.registers[self.declare(each)] = found[1]

    def declare_variable(self, text: str, line: int) -> None:
        declared = variable(text, line)
        declared.name = self.declare(declared.name)
        self.function.variables.append(declared)

    def operand(self, text: str, line: int) -> Operand:
        literal = number(text)
        if literal is not None:
            return literal
        if text.startswith("{"):
            return Vector(tuple(self.operand(t, line) for t in _split(text[1:-1])))
        if text.startswith("["):
            return self.address(text[1:-1].strip(), line)
        if "|" in text:
            first, second = text.split("|")
            return Pair(self.operand(first.strip(), line), self.operand(second.strip(), line))
        if text.startswith("!"):
            return Reg(self.lookup(text[1:].strip()), negated=True)
        if _SPECIAL.match(text):
            return Special(text[1:])
        if text == "WARP_SZ":
            return Imm(32)
        if text == "_":
            return Reg("_")
        base, plus, offset = text.partition("+")
        unique = self.lookup(base.strip())
        if unique in self.function.registers:
            return Reg(unique)
        if not _IDENTIFIER.match(base.strip()):
            raise PtxError(f"PTX line {line}: unknown operand {text!r}")
        return Symbol(unique, int(offset) if plus else 0)

    def address(self, text: str, line: int) -> Address:
        found = re.match(r"^([\w$%@]+)\s*(?:\+\s*(-?\w+))?$", text)
        if not found:
            raise PtxError(f"PTX line {line}: unknown address [{text}]")
        offset = number(found[2]) if found[2] else Imm(0)
        base = self.operand(found[1], line)
        if offset is None or not isinstance(base, Reg | Symbol | Imm):
            raise PtxError(f"PTX line {line}: unknown address [{text}]")
        return Address(base, offset.value)

    def instruction(self, text: str, line: int) -> None:
        original = " ".join(text.split())
        guard = None
        found = re.match(r"^@(!?)([\w$%]+)\s+(.*)$", text, re.S)
        if found:
            guard = Reg(self.lookup(found[2]), negated=bool(found[1]))
            text = found[3]
        head, _, rest = text.strip().partition(" ")
        if "\t" in head or "\n" in head:
            head, rest = re.split(r"\s", text.strip(), maxsplit=1)
        op, *mods = head.replace("::", "__").split(".")
        if op == "call":
            args: tuple[Operand, ...] = tuple(self.call(rest, line))
        else:
            args = tuple(self.operand(t, line) for t in _split(rest.strip()))
        self.function.code.append(
            Instruction(op, tuple(mods), args, guard, line, original, self.source)
        )

    def call(self, rest: str, line: int) -> Iterator[Operand]:
        """The operands of a call: (returns), function, (arguments)."""
        parts = [p if p.startswith("(") else f"={p}" for p in _split(rest)]
        names = [p[1:] for p in parts if p.startswith("=")]
        lists = [_split(p[1:-1]) for p in parts if p.startswith("(")]
        has_return = parts[0].startswith("(")
        returns = lists.pop(0) if has_return else []
        yield Vector(tuple(self.operand(t, line) for t in returns))
        yield Symbol(names[0])
        yield Vector(tuple(self.operand(t, line) for t in (lists[0] if lists else [])))

    def label(self, name: str) -> None:
        self.function.labels[self.declare(name)] = len(self.function.code)

    def targets(self, name: str, text: str) -> None:
        self.function.tables[self.declare(name)] = [
            self.lookup(t) for t in _split(text.partition(" ")[2])
        ]


def _header(text: str, line: int) -> Function:
    found = _ENTRY.search(text)
    assert found
    function = Function(found["name"], found["kind"] == "entry", line=line)
    rest = text[found.end() :].strip()
    if rest.startswith("("):
        depth, end = 0, 0
        for end, c in enumerate(rest):  # noqa: B007 - the index is what we look for
            depth += (c == "(") - (c == ")")
            if depth == 0:
                break
        function.params = [variable(t, line) for t in _split(rest[1:end])]
    limit = re.search(r"\.(?:maxntid|reqntid)\s+([\d,\s]+)", rest)
    if limit:
        function.max_threads = math.prod(int(n) for n in limit[1].split(",") if n.strip())
    if found["ret"]:
        function.returns = [variable(t, line) for t in _split(found["ret"][1:-1])]
    return function


def parse(text: str) -> Module:
    """Parses a whole PTX module."""
    module = Module("", {}, {}, text)
    files = {n: Path(name).name for n, name in _FILE.findall(text)}
    body: _Body | None = None
    previous_label: str | None = None
    for line, statement in _statements(_strip(text)):
        if not statement or _SKIPPED.match(statement):
            continue
        if statement.startswith(".target"):
            module.target = statement.split()[1].rstrip(",")
        elif statement.startswith(".") and _ENTRY.search(statement) and body is None:
            pending = _header(statement, line)  # a prototype, unless a body follows
        elif re.match(r"\.loc\s", statement):
            if body:
                body.place(statement, files)
        elif body is None:
            if statement == "{":
                body = _Body(pending)
                module.functions[pending.name] = pending
            else:
                declared = variable(statement, line)
                module.variables[declared.name] = declared
        elif statement == "{":
            body.open()
        elif statement == "}":
            body.scopes.pop()
            if not body.scopes:
                body = None
        elif statement.endswith(":"):
            body.label(statement[:-1])
            previous_label = statement[:-1]
            continue
        elif statement.startswith(".reg"):
            body.registers(statement)
        elif statement.startswith(".branchtargets") and previous_label:
            body.targets(previous_label, statement)
        elif statement.startswith("."):
            body.declare_variable(statement, line)
        else:
            body.instruction(statement, line)
        previous_label = None
    return module


def float_bits(value: float) -> int:
    """The bits of `value` as an f64."""
    return int.from_bytes(struct.pack("<d", value), "little")

# SPDX-License-Identifier: Apache-2.0
"""What ``nvdisasm -c`` prints, as instructions, basic blocks, natural loops and an instruction mix.

Loops are found as compilers find them (Aho, Sethi, Ullman; dominators after Cooper, Harvey and
Kennedy, "A Simple, Fast Dominance Algorithm"): a back edge goes to a block that dominates its
source, and its loop is what reaches the source without passing the header.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

_SECTION = re.compile(r"^\s*\.section\s+(?:\.text\.([^,\s]+)|\S+),")
_LABEL = re.compile(r"^([.$\w]+):\s*$")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"`\(([^)]+)\)")
_TARGETS = re.compile(r"\.L[\w.]+")  # of a jump through a register, in a comment
_ALWAYS = ("", "@PT", "@UPT")

CLASSES = {
    "LDSM": "LDSM MOVM STSM",
    "LDGSTS": "LDGSTS UBLKCP UTMALDG UTMASTG",
    "FP32": "FFMA FMUL FADD FMNMX FSEL FSETP FSET FCHK FSWZADD FFMA32I FMUL32I FADD32I FFMA2 FMUL2 "
    "FADD2 FMNMX3",
    "FP16": "HFMA2 HADD2 HMUL2 HMNMX2 HSET2 HSETP2 HADD2_32I HFMA2_32I HMUL2_32I",
    "FP64": "DFMA DADD DMUL DSETP",
    "MUFU": "MUFU",
    "F2FP": "F2FP F2F F2I F2IP I2F I2FP FRND",
    "integer": "IADD IADD3 IADD32I IMAD IMUL IDP IABS IMNMX ISETP ISCADD LEA LOP LOP3 LOP32I SHF "
    "SHL SHR SEL PRMT MOV MOV32I S2R S2UR CS2R R2UR P2R R2P P2UR R2UP PLOP3 PSETP SGXT BMSK BREV "
    "POPC FLO LDC LDCU VIADD VIMNMX VIMNMX3 VIADDMNMX VABSDIFF I2I GETLMEMBASE",
    "LDS/STS": "LDS STS ATOMS",
    "LDG/STG": "LDG STG LD ST ATOM ATOMG RED REDG",
    "LDL/STL": "LDL STL",  # local memory: a spill, or an array that is indexed
    "SHFL/VOTE": "SHFL VOTE VOTEU MATCH REDUX CREDUX ELECT",
    "control": "BRA BRX JMP JMX CALL RET EXIT KILL BPT BSSY BSYNC BREAK BMOV RPCMOV WARPSYNC YIELD "
    "NANOSLEEP BAR DEPBAR LDGDEPBAR MEMBAR ERRBAR FENCE CCTL SYNCS ARRIVES ACQBULK",
}
_CLASS_OF = {op: name for name, ops in CLASSES.items() for op in ops.split()}
TENSOR, COPY, OTHER = "HMMA", "LDGSTS", "other"


class SassError(ValueError):
    """The text is not what is expected of nvdisasm."""


@dataclass(frozen=True)
class Instruction:
    """``@guard opcode operands``; the opcode is ``op`` and its modifiers."""

    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def op(self) -> str:
        return self.opcode.partition(".")[0]


@dataclass
class Function:
    """A kernel with the subroutines it calls: their code lies in its section."""

    name: str
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # index of the instruction


def parse(text: str) -> dict[str, Function]:
    """The kernels of a disassembly by name."""
    functions: dict[str, Function] = {}
    function = None
    for line in text.splitlines():
        if section := _SECTION.match(line):
            name = section[1]
            function = functions.setdefault(name, Function(name)) if name else None
        elif function is None:
            continue
        elif label := _LABEL.match(line):
            function.labels[label[1]] = len(function.code)
        elif found := _INSTRUCTION.match(line):
            address, guard, opcode, operands = found.groups()
            function.code.append(Instruction(int(address, 16), guard or "", opcode, operands))
        elif line.lstrip().startswith("/*"):
            raise SassError(f"{function.name}: not an instruction: {line.strip()}")
    return functions


def class_of(instruction: Instruction) -> str:
    """The class an instruction is counted in."""
    op = instruction.op
    if op.endswith("MMA"):  # HMMA, and its kin for other types
        return TENSOR
    return _CLASS_OF.get(op) or _CLASS_OF.get(op.removeprefix("U"), OTHER)


def mix(code: Iterable[Instruction]) -> Counter[str]:
    """Instructions by class. NOPs only align, and are left out."""
    return Counter(class_of(i) for i in code if i.op != "NOP")


@dataclass
class Graph:
    """Basic blocks: ``starts[b]`` to ``starts[b + 1]``, block 0 is the entry."""

    function: Function
    starts: list[int]
    successors: list[list[int]]
    order: list[int] = field(init=False)  # what the entry reaches, in reverse postorder
    dominator: dict[int, int] = field(init=False)  # the immediate one

    def __post_init__(self) -> None:
        self.order = self._reverse_postorder()
        self.dominator = self._dominators()

    def code(self, block: int) -> list[Instruction]:
        return self.function.code[self.starts[block] : self.starts[block + 1]]

    def predecessors(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {b: [] for b in self.order}
        for b in self.order:
            for successor in self.successors[b]:
                found[successor].append(b)
        return found

    def dominates(self, a: int, b: int) -> bool:
        while b != a and b != 0:
            b = self.dominator[b]
        return a == b

    def _reverse_postorder(self) -> list[int]:
        done: list[int] = []
        seen = {0}
        stack = [(0, iter(self.successors[0]))]
        while stack:
            block, rest = stack[-1]
            following = next((s for s in rest if s not in seen), None)
            if following is None:
                done.append(block)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(self.successors[following])))
        return done[::-1]

    def _dominators(self) -> dict[int, int]:
        rank = {b: n for n, b in enumerate(self.order)}
        before = self.predecessors()
        found = {0: 0}
        changed = True
        while changed:
            changed = False
            for block in self.order[1:]:
                known = [p for p in before[block] if p in found]
                common = known[0]
                for other in known[1:]:
                    while common != other:
                        if rank[common] > rank[other]:
                            common = found[common]
                        else:
                            other = found[other]
                if found.get(block) != common:
                    found[block] = common
                    changed = True
        return found


def graph(function: Function) -> Graph:
    """The flow of control of a kernel."""
    code = function.code
    if not code:
        raise SassError(f"{function.name}: no instructions")
    following = [_following(function, n) for n in range(len(code))]
    leaders = {0, *function.labels.values()}
    for n, targets in enumerate(following):
        if targets != [n + 1]:
            leaders.update([*targets, n + 1])
    starts = sorted(n for n in leaders if n < len(code))
    block_of = {start: b for b, start in enumerate(starts)}
    starts.append(len(code))
    successors = [[block_of[n] for n in following[end - 1]] for end in starts[1:]]
    return Graph(function, starts, successors)


def _following(function: Function, n: int) -> list[int]:
    """Indices of the instructions that may come next."""
    instruction = function.code[n]
    op, operands = instruction.op, instruction.operands
    falls = [n + 1] if n + 1 < len(function.code) else []
    if instruction.guard in ("@!PT", "@!UPT"):
        return falls
    conditional = instruction.guard not in _ALWAYS
    if op in ("EXIT", "RET", "KILL"):
        return falls if conditional else []
    if op == "BSYNC":
        targets = [_reconvergence(function, n)]
    elif op in ("BRX", "JMX"):
        targets = [_label(function, name) for name in _TARGETS.findall(operands)]
        if not targets:
            raise SassError(f"{function.name}: targets unknown: {instruction.opcode} {operands}")
    elif op in ("BRA", "JMP", "CALL"):
        named = _TARGET.search(operands)
        if op == "CALL" and not (named and named[1].startswith(".L")):
            return falls  # a subroutine, which returns
        if named is None:
            raise SassError(f"{function.name}: target unknown: {instruction.opcode} {operands}")
        targets = [_label(function, named[1])]
        # `BRA.U UP0, target` has its condition among the operands.
        conditional |= bool(_TARGET.sub("", operands).strip(" ,"))
    else:
        return falls
    return list(dict.fromkeys([*targets, *(falls if conditional else [])]))


def _label(function: Function, name: str) -> int:
    if name not in function.labels:
        raise SassError(f"{function.name}: no label {name}")
    return function.labels[name]


def _reconvergence(function: Function, n: int) -> int:
    """Where the lanes that wait at a BSYNC go on: the target of the BSSY of that barrier."""
    barrier = function.code[n].operands
    for earlier in reversed(function.code[:n]):
        if earlier.op == "BSSY" and earlier.operands.startswith(f"{barrier},"):
            target = _TARGET.search(earlier.operands)
            if target:
                return _label(function, target[1])
    return n + 1


@dataclass(frozen=True)
class Loop:
    """All natural loops of one header."""

    header: int
    blocks: frozenset[int]

    def code(self, flow: Graph) -> list[Instruction]:
        return [i for b in sorted(self.blocks) for i in flow.code(b)]


def natural_loops(flow: Graph) -> list[Loop]:
    """In the order of their headers in the code."""
    before = flow.predecessors()
    bodies: dict[int, set[int]] = {}
    for block in flow.order:
        for header in flow.successors[block]:
            if flow.dominates(header, block):
                body = bodies.setdefault(header, {header})
                pending = [block]
                while pending:
                    b = pending.pop()
                    if b not in body:
                        body.add(b)
                        pending += before[b]
    return [Loop(header, frozenset(body)) for header, body in sorted(bodies.items())]


def main_loop(flow: Graph) -> Loop | None:
    """Of the innermost loops with tensor instructions, the one with most; None if there is none."""

    def tensor(loop: Loop) -> int:
        return mix(loop.code(flow))[TENSOR]

    loops = [loop for loop in natural_loops(flow) if tensor(loop)]
    innermost = [a for a in loops if not any(b.blocks < a.blocks for b in loops)]
    return max(innermost, key=tensor, default=None)


def leanest_iteration(flow: Graph, loop: Loop) -> list[Instruction]:
    """The way once around a loop that leaves nothing out but what is rarely needed.

    Of the ways from the header back to it, those with most tensor instructions; of these, those
    with most asynchronous copies; of these, the shortest. So the copies of the next step count, and
    a rescale or a slow path that a branch skips does not. Loops inside are passed once.
    """
    rank = {b: n for n, b in enumerate(flow.order)}
    before = flow.predecessors()
    best: dict[int, tuple[tuple[int, int, int], list[int]]] = {}
    for block in sorted(loop.blocks, key=rank.__getitem__):
        classes = mix(flow.code(block))
        own = (classes[TENSOR], classes[COPY], -classes.total())
        if block == loop.header:
            best[block] = (own, [block])
            continue
        ways = [best[p] for p in before[block] if rank[p] < rank[block]]
        score, way = max(ways, key=lambda way: way[0])
        best[block] = (_sum(score, own), [*way, block])
    ends = [best[b] for b in loop.blocks if loop.header in flow.successors[b]]
    _, way = max(ends, key=lambda end: end[0])
    return [i for b in way for i in flow.code(b)]


def _sum(a: tuple[int, int, int], b: tuple[int, int, int]) -> tuple[int, int, int]:
    return (a[0] + b[0], a[1] + b[1], a[2] + b[2])

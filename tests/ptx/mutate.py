# SPDX-License-Identifier: Apache-2.0
"""One-instruction mutants of a kernel, and how many of them a test catches.

A mutant is caught if its run has findings, gives other results, does not end or cannot be run. What
survives is listed: either an equivalent program, or something the test does not look at.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from .executor import Program
from .parser import Address, Function, Imm, Instruction, Module, Operand, PtxError, Vector

_OTHER = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "eq": "ne", "ne": "eq"}
_OTHER_OP = {"add": "sub", "sub": "add", "min": "max", "max": "min", "and": "or", "or": "and"}
_ORDERED = ("sub", "selp", "shl", "shr", "div", "rem", "setp", "fma", "mad")
_KEPT = ("bra", "ret", "exit", "nop", "brx", "call")  # dropping these makes another program


@dataclass(frozen=True)
class Mutant:
    """What was done to which instruction."""

    pc: int
    what: str
    before: Instruction
    after: Instruction

    def __str__(self) -> str:
        return f"PTX line {self.before.line}: {self.what}: {self.before.text}"


@dataclass
class Outcome:
    """The result of a mutation run."""

    caught: list[Mutant]
    survivors: list[Mutant]

    @property
    def share(self) -> float:
        return len(self.caught) / max(1, len(self.caught) + len(self.survivors))


def _with_argument(instruction: Instruction, index: int, argument: Operand) -> Instruction:
    args = list(instruction.args)
    args[index] = argument
    return replace(instruction, args=tuple(args))


def variants(instruction: Instruction) -> Iterator[tuple[str, Instruction]]:
    """All mutants of one instruction."""
    op, mods, args = instruction.op, instruction.mods, instruction.args
    if op not in _KEPT:
        yield "dropped", replace(instruction, op="nop", mods=(), args=())
    if instruction.guard is not None:
        flipped = replace(instruction.guard, negated=not instruction.guard.negated)
        yield "guard negated", replace(instruction, guard=flipped)
        yield "guard lost", replace(instruction, guard=None)
    for i, mod in enumerate(mods):
        if op == "setp" and mod in _OTHER:
            changed = (*mods[:i], _OTHER[mod], *mods[i + 1 :])
            yield f"{mod} for {_OTHER[mod]}", replace(instruction, mods=changed)
    if op in _OTHER_OP and "cc" not in mods and "pred" not in mods:
        yield f"{_OTHER_OP[op]} for {op}", replace(instruction, op=_OTHER_OP[op])
    symmetric = "eq" in mods or "ne" in mods
    first = 2 if op in ("fma", "mad") else 1  # the factors of a product may be swapped
    if op in _ORDERED and args[first] != args[first + 1] and not symmetric and "wide" not in mods:
        swapped = (*args[:first], args[first + 1], args[first], *args[first + 2 :])
        yield "operands swapped", replace(instruction, args=swapped)
    for i, arg in enumerate(args):
        if op == "shr" and "s32" in mods and arg == Imm(31):
            continue  # the sign, as any larger shift
        if isinstance(arg, Imm) and not arg.float_bits and op not in ("cp", "shfl", "lop3", "bar"):
            yield "literal off by one", _with_argument(instruction, i, Imm(arg.value + 1))
        if op == "cp" and "wait_group" in mods and isinstance(arg, Imm):
            yield "waits for one group less", _with_argument(instruction, i, Imm(arg.value + 1))
        if isinstance(arg, Address) and "param" not in mods:
            moved = replace(arg, offset=arg.offset + 16)
            yield "address off by 16 bytes", _with_argument(instruction, i, moved)
        if isinstance(arg, Vector) and op in ("mma", "ldmatrix") and len(arg.items) > 1:
            turned = Vector((*arg.items[1:], arg.items[0]))
            yield f"fragment {i} in another order", _with_argument(instruction, i, turned)


def mutants(function: Function, executed: list[bool] | None = None) -> list[Mutant]:
    """All mutants of the instructions that a baseline run executed."""
    return [
        Mutant(pc, what, instruction, after)
        for pc, instruction in enumerate(function.code)
        if executed is None or executed[pc]
        for what, after in variants(instruction)
    ]


def apply(program: Program, kernel: str, mutant: Mutant, step_limit: int) -> Program:
    """A program whose kernel has the mutant in place of the instruction."""
    original = program.kernel(kernel)
    code = list(original.code)
    code[mutant.pc] = mutant.after
    changed = replace(original, code=code)
    functions = {**program.module.functions, original.name: changed}
    module = Module(program.module.target, program.module.variables, functions, "")
    mutated = Program(module)
    mutated.step_limit = step_limit
    return mutated


def run(
    program: Program,
    kernel: str,
    passes: Callable[[Program], bool],
    *,
    count: int = 100,
    seed: int = 0,
    executed: list[bool] | None = None,
    step_limit: int = 20_000,
) -> Outcome:
    """Tries `count` mutants, drawn with `seed`; `passes` runs the kernel's test on a program."""
    found = mutants(program.kernel(kernel), executed)
    random.Random(seed).shuffle(found)
    outcome = Outcome([], [])
    for mutant in found[:count]:
        try:
            survived = passes(apply(program, kernel, mutant, step_limit))
        except PtxError:  # does not end, or makes no sense
            survived = False
        (outcome.survivors if survived else outcome.caught).append(mutant)
    return outcome

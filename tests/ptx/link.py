# SPDX-License-Identifier: Apache-2.0
"""Calls become inline code: a kernel is decoded as one flat list of instructions.

nvcc calls few functions (those marked noinline); a copy of the body per call, with names of its own
and its parameters aliased to the caller's, needs no call stack and keeps lanes free to diverge.
"""

from __future__ import annotations

from dataclasses import replace

from .parser import (
    Address,
    Function,
    Instruction,
    Module,
    Operand,
    Pair,
    PtxError,
    Reg,
    Symbol,
    Vector,
)

MAX_DEPTH = 16


def _rename(operand: Operand, names: dict[str, str]) -> Operand:
    if isinstance(operand, Reg):
        return replace(operand, name=names.get(operand.name, operand.name))
    if isinstance(operand, Symbol):
        return replace(operand, name=names.get(operand.name, operand.name))
    if isinstance(operand, Address):
        base = _rename(operand.base, names)
        assert isinstance(base, Reg | Symbol) or base is operand.base
        return Address(base, operand.offset)
    if isinstance(operand, Vector):
        return Vector(tuple(_rename(x, names) for x in operand.items))
    if isinstance(operand, Pair):
        return Pair(_rename(operand.first, names), _rename(operand.second, names))
    return operand


def inline(module: Module, function: Function, depth: int = 0) -> Function:
    """`function` with every call of a function of the module replaced by that function's body."""
    if not any(i.op == "call" for i in function.code):
        return function
    if depth > MAX_DEPTH:
        raise PtxError(
            f"{function.name}: calls nest deeper than {MAX_DEPTH}; recursion is not known"
        )
    whole = Function(
        function.name,
        function.is_entry,
        function.params,
        function.returns,
        dict(function.registers),
        list(function.variables),
        tables=dict(function.tables),
        line=function.line,
        max_threads=function.max_threads,
    )
    moved: dict[int, int] = {}
    for pc, instruction in enumerate(function.code):
        moved[pc] = len(whole.code)
        callee = _callee(module, instruction)
        if callee is None:
            whole.code.append(instruction)
        else:
            _paste(whole, inline(module, callee, depth + 1), instruction, f"~{depth}.{pc}")
    moved[len(function.code)] = len(whole.code)
    whole.labels.update({name: moved[pc] for name, pc in function.labels.items()})
    return whole


def _callee(module: Module, instruction: Instruction) -> Function | None:
    if instruction.op != "call":
        return None
    name = instruction.args[1]
    return module.functions.get(name.name) if isinstance(name, Symbol) else None


def _paste(whole: Function, callee: Function, call: Instruction, suffix: str) -> None:
    own = [*callee.registers, *callee.labels, *callee.tables, *(v.name for v in callee.variables)]
    names = {name: name + suffix for name in own}
    returns, _, arguments = call.args
    assert isinstance(returns, Vector) and isinstance(arguments, Vector)
    passed = [*zip(callee.returns, returns.items, strict=True)]
    passed += [*zip(callee.params, arguments.items, strict=True)]
    for formal, actual in passed:
        assert isinstance(actual, Symbol)
        names[formal.name] = actual.name
    for name, kind in callee.registers.items():
        whole.registers[names[name]] = kind
    whole.variables += [replace(v, name=names[v.name]) for v in callee.variables]
    for name, targets in callee.tables.items():
        whole.tables[names[name]] = [names[t] for t in targets]
    end = f"end{suffix}@{len(whole.code)}"
    start = len(whole.code)
    if call.guard:
        skip = replace(call.guard, negated=not call.guard.negated)
        whole.code.append(Instruction("bra", (), (Symbol(end),), skip, call.line, call.text))
        start += 1
    for instruction in callee.code:
        args = tuple(_rename(a, names) for a in instruction.args)
        guard = _rename(instruction.guard, names) if instruction.guard else None
        op, mods = instruction.op, instruction.mods
        if op == "ret":
            op, mods, args = "bra", (), (Symbol(end),)
        assert guard is None or isinstance(guard, Reg)
        whole.code.append(replace(instruction, op=op, mods=mods, args=args, guard=guard))
    whole.labels.update({names[n]: start + pc for n, pc in callee.labels.items()})
    whole.labels[end] = len(whole.code)

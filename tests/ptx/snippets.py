# SPDX-License-Identifier: Apache-2.0
"""Small PTX programs for the tests: a few instructions, run by one thread per element."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from .executor import Report, load
from .memory import Buffer, Memory
from .words import DTYPE, Array

HEAD = ".version 8.5\n.target sm_90\n.address_size 64\n"


def kernel(body: str, params: int = 0, variables: str = "", outside: str = "") -> str:
    """A whole module around `body`; parameters are 64-bit and called p0, p1, ..

    Registers need no declaration: %p is a predicate, %h 16 bits, %r 32, %d 64.
    """
    classes = {"p": "pred", "h": "b16", "r": "b32", "d": "b64"}
    names = sorted(set(re.findall(r"%([phrd])(\d+)", body)))
    declared = "\n".join(f".reg .{classes[c]} %{c}{n};" for c, n in names)
    formal = ", ".join(f".param .u64 p{i}" for i in range(params))
    return (
        f"{HEAD}{outside}\n.visible .entry k({formal})\n{{\n{declared}\n{variables}\n{body}\n}}\n"
    )


def run(
    body: str,
    params: tuple[Buffer | int, ...] = (),
    *,
    threads: int | tuple[int, ...] = 32,
    grid: int | tuple[int, ...] = 1,
    memory: Memory | None = None,
    variables: str = "",
    outside: str = "",
    shared: int = 0,
    **options: Any,
) -> Report:
    """Launches `body`."""
    text = kernel(body, len(params), variables, outside)
    return load(text).launch("k", grid, threads, list(params), shared, memory, **options)


def _register(name: str, kind: str, number: int) -> tuple[str, str]:
    """(register, its lines) that hold this lane's element of the buffer pN."""
    width = 1 if kind == "pred" else DTYPE[kind].itemsize
    letter = {1: "h", 2: "h", 4: "r", 8: "d"}[width]
    register = f"%{letter}{20 + number}"
    lines = [
        f"ld.param.u64 %d{90 + number}, [p{number}];",
        f"mad.wide.u32 %d{90 + number}, %r80, {width}, %d{90 + number};",
    ]
    if kind == "pred":
        lines += [
            f"ld.global.u8 {register}, [%d{90 + number}];",
            f"setp.ne.u16 %p{20 + number}, {register}, 0;",
        ]
        return f"%p{20 + number}", "\n".join(lines)
    bits = f"{'s' if kind[0] == 's' else 'u' if width == 1 else 'b'}{8 * width}"
    return register, "\n".join([*lines, f"ld.global.{bits} {register}, [%d{90 + number}];"])


def apply(text: str, out: str | tuple[str, ...], **inputs: tuple[str, Array]) -> Any:
    """Runs `text`, in which {a}, {b}, .. are inputs and {o}, {o1}, .. outputs, on every element.

    Inputs are given as name=(type, values); `out` names the types of the outputs.
    """
    kinds = (out,) if isinstance(out, str) else out
    count = len(next(iter(inputs.values()))[1])
    memory, params, names, before, after = Memory(), [], {}, [], []
    for i, (name, (kind, values)) in enumerate(inputs.items()):
        dtype = np.dtype(np.uint8) if kind == "pred" else DTYPE[kind]
        names[name], lines = _register(name, kind, i)
        params.append(memory.buffer(name, np.asarray(values).astype(dtype)))
        before.append(lines)
    for i, kind in enumerate(kinds):
        number = len(inputs) + i
        width = 4 if kind == "pred" else DTYPE[kind].itemsize
        letter = {1: "h", 2: "h", 4: "r", 8: "d"}[width]
        register = f"%{letter}{60 + i}"
        names["o" if i == 0 else f"o{i}"] = f"%p{60 + i}" if kind == "pred" else register
        params.append(memory.allocate(f"o{i}", count * width))
        after += [
            f"ld.param.u64 %d{90 + number}, [p{number}];",
            f"mad.wide.u32 %d{90 + number}, %r80, {width}, %d{90 + number};",
        ]
        if kind == "pred":
            after.append(f"selp.u32 {register}, 1, 0, %p{60 + i};")
        after.append(f"st.global.b{8 * width} [%d{90 + number}], {register};")
    for name, register in names.items():
        text = text.replace("{" + name + "}", register)
    body = "\n".join(
        [
            "mov.u32 %r80, %tid.x; mov.u32 %r81, %ctaid.x; mov.u32 %r82, %ntid.x;",
            "mad.lo.u32 %r80, %r81, %r82, %r80;",
            f"setp.ge.u32 %p80, %r80, {count};",
            "@%p80 bra END;",
            *before,
            text,
            *after,
            "END: ret;",
        ]
    )
    threads = min(256, -(-count // 32) * 32)
    run(body, tuple(params), threads=threads, grid=-(-count // threads), memory=memory).check()
    results = []
    for buffer, kind in zip(params[len(inputs) :], kinds, strict=True):
        results.append(
            buffer.array(np.uint32) != 0 if kind == "pred" else buffer.array(DTYPE[kind])
        )
    return results[0] if isinstance(out, str) else tuple(results)

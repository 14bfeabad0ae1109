# SPDX-License-Identifier: Apache-2.0
"""Of one-instruction mutants of the kernels of windows, lists and linear attention, how many the
problems of cover.py, cover_routed.py and cover_linear.py catch.

Mutants are drawn with a fixed seed from those of all executed instructions. A survivor counts as
equivalent only if it is in the table below, with the reason; all others count as missed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from . import cover_linear, cover_routed, problems, problems_routed
from .cover import PROBLEMS, Variant, line_of
from .mutants import Recipe, Subject
from .mutate import Mutant

LEAST = 0.9
BF16 = torch.bfloat16


class Equivalent(NamedTuple):
    """Mutants (those that begin with `what`) of a source line that change no result."""

    why: str
    what: str
    line: str
    of: str = ""  # another line that the instruction is of

    def fits(self, mutant: Mutant) -> bool:
        lines = [line_of(*place) for place in mutant.before.source]
        said = f"{mutant.what}: {mutant.before.text}"
        there = all(any(wanted in line for line in lines) for wanted in (self.line, self.of))
        return there and said.startswith(self.what)


EQUIVALENT = (
    Equivalent("lanes past the row's end add zeros", "le for lt", "live && d < w.head_dim_v"),
    Equivalent("the rest of lse is below the rounding of 16 bits", "", "s.rest = isfinite(lse)"),
    Equivalent(
        "the rest of lse is below the rounding of 16 bits", "add for sub", "relative - rest"
    ),
    Equivalent("a whole chunk may be stored by numbers", "literal off by one", "left >= L::kElems"),
    Equivalent("a whole chunk may be stored by numbers", "lt for le", "left >= L::kElems"),
    Equivalent("rows have whole numbers", "lt for le", "e * static_cast<int>(sizeof(T)) < bytes"),
    Equivalent(
        "rows have whole numbers", "literal off by one", "e * static_cast<int>(sizeof(T)) < bytes"
    ),
    Equivalent(
        "no token: which kind is not asked", "literal off by one", "at.kind = Slot::kPhantom"
    ),
    Equivalent(
        "whole rows may be copied like parts", "literal off by one", "bytes_first == kRowBytes"
    ),
    Equivalent(
        "an overflow after a masked step is made good row by row",
        "dropped: add.f32",
        "limit[f][half] = top + kSlack;",
    ),
    Equivalent(
        "half of the lanes have the same 16 rows once more",
        "operands swapped: selp",
        "each.begin = __reduce_max_sync(~0u, use ? begin : INT32_MIN);",
    ),
    Equivalent("all lanes have the same", "", "if (threadIdx.x % 32 == 0) outer[2 * a] = all"),
    Equivalent("only whether it is finite is asked", "sub for add", "bad += (x[f][n][0]"),
    Equivalent(
        "rows that attend all that was walked have the same sums by themselves",
        "or for and: and.b16",
        "if ((masked || sizeof(T) == 4) && !__all_sync(~0u, is_finite(dquery)))",
    ),
    Equivalent(
        "their products with zeros tell whether they are finite, in any order",
        "fragment",
        "const auto b = P::template load_right_transposed<kColumns>(",
    ),
    Equivalent("beside the row's end is a factor of 0", "literal off by one", "elems[e] = T{};"),
    Equivalent(
        "a chunk has no more", "literal off by one: min", "min(max(bytes - chunk * 16, 0), 16)"
    ),
    Equivalent(
        "rows without phantoms may be copied one by one",
        "guard",
        "tile(a).first + axis.dilation * (tile(a).end - 1) >= axis.num_walked",
    ),
    Equivalent(
        "rows without phantoms may be copied one by one",
        "literal off by one: add",
        "tile(a).first + axis.dilation * (tile(a).end - 1) >= axis.num_walked",
    ),
    Equivalent(
        "a step that all rows attend may be masked",
        "operands swapped: setp.lt",
        "one_line &= each.contains(0);",
    ),
    Equivalent(
        "a step that all rows attend may be masked",
        "literal off by one: setp.gt",
        "one_line &= each.contains(0);",
    ),
    Equivalent("the formulas of tanh meet there", "ge for gt: setp.ge.f32", "tanhf(x)"),
    Equivalent("any lane of a quad may have it", "literal off by one", "lane % 4 == 0 ? 1.f : 0.f"),
    Equivalent(
        "rows that start at multiples of 16 bytes end there",
        "operands swapped",
        "aligned && left >= L::kElems",
    ),
    Equivalent("a slot without a token gets any row", "ge for gt", "slot + j < walk.total"),
    Equivalent(
        "without a bias nobody asks where it is",
        "literal off by one: mov.u64",
        "bias = w.bias ? static_cast<const float*>(w.bias)",
    ),
    Equivalent("64 bits divide what 32 do", "dropped: setp.eq.s64", "w.heads / w.kv_heads"),
    Equivalent("rows that are not there are not read", "dropped: mov.u64", "if (live) {"),
    Equivalent(
        "rows that are not there are not read",
        "dropped: mov.u64",
        "const int lanes = static_cast<int>(blockDim.x) / p.rows",
    ),
    Equivalent("its left operand is zeros", "fragment", "P::multiply(x[0], x[1], zeros, b);"),
    Equivalent(
        "whole rows may be copied like parts",
        "dropped: setp",
        "if (!kShort && whole && x.aligned && row_bytes >=",
    ),
    Equivalent(
        "a bit below those of 16",
        "literal off by one: and",
        "high = Number<T>::widen(T{static_cast<uint16_t>(x >> 16)});",
    ),
    Equivalent(
        "bits below 0 are no bits",
        "dropped: max",
        "add(max(i.begin + to_sinks, walk.extra - slot), min(i.end + to_sinks, last));",
    ),
    Equivalent("a slot without a token gets any row", "ge for gt", "at.kind = s < total ?"),
    Equivalent("a slot without a token gets any row", "gt for ge", "at.kind = s < total ?"),
    Equivalent("a look-up that nobody waits for", "ge for gt", "if (slot + 2 * kStep < to) {"),
    Equivalent(
        "rows may be copied number by number", "guard lost", "if (aligned) {", "copy_rows<T, kDim"
    ),
    Equivalent("steps are powers of two", "gt for ge: setp.gt.u32", "while (step > 1) {"),
    Equivalent("weights may be brought down in any step", "dropped: or.pred", "grows |= m > limit"),
    Equivalent(
        "of a step that all rows attend a row has a maximum",
        "dropped: mov.f32",
        "now == -INFINITY ? 1.f",
        "visit(Bool<false>(), stage, numbers, mask);",
    ),
    *(
        Equivalent(
            "all lanes have the same",
            what,
            "if (threadIdx.x % 32 == 0) *reinterpret_cast<Common*>(shared) = mine;",
        )
        for what in ("literal off by one", "ne for eq")
    ),
    Equivalent("all lanes have the same", "dropped: setp", "__syncwarp();  // the last walk's is"),
    Equivalent(
        "the sums of a product begin with zeros",
        "fragment 3 in another order: mma",
        "product<T, kDim, kFrags, kStep,",
    ),
    Equivalent(
        "a step that no rows attend may be walked",
        "dropped: mov.u16",
        "bool full = end <= walk.total, skip = true;",
    ),
    Equivalent(
        "shared memory begins at 0",
        "sub for add: add.s32",
        "walk_tile(stage, operand) + Layout<T, kDim>::at(row0 + i * kAtOnce, chunk);",
    ),
    Equivalent(
        "a step that all rows attend may be masked",
        "dropped: not.b32",
        "if (c.rows & ~rows) return false;",
    ),
    *(
        Equivalent(f"a step that {rows} attend may be {done}", what, line)
        for what in ("ge for gt", "gt for ge", "le for lt", "lt for le")
        for rows, done, line in (
            ("all rows", "masked", "return (c.lo_max <= begin && end <= c.sink_min) ||"),
            ("all rows", "masked", "c.sink_max) <= begin && end <= c.near_hi_min);"),
            ("all rows", "masked", "if (walk.exact) return c.lo_max <= begin"),
            ("all rows", "masked", "return (c.sink_max <= begin && end <= c.near_lo_min) ||"),
            ("all rows", "masked", "c.sink_max) <= begin && end <= c.hi_min);"),
            ("no rows", "walked", "if (end <= c.lo_min || c.hi_max <= begin) return true;"),
            ("no rows", "walked", "(end <= c.near_lo_min || c.near_hi_max <= begin);"),
            ("no rows", "walked", "return !walk.exact && c.near_lo_max <= begin"),
        )
    ),
    Equivalent(
        "other coordinates of a sequence count nothing",
        "dropped: mov.u32",
        "if (p->walk_extent[0] * p->walk_extent[1] == 1) return;",
    ),
    Equivalent(
        "what a row attends that is not there is not asked",
        "literal off by one: mov.u32",
        "return row;",
        "ListRow row = where(r);",
    ),
    Equivalent(
        "no row's index is below 0", "literal off by one: shr.u32", "bool full = end <= walk.total"
    ),
    Equivalent(
        "rows that attend all that was walked have the same sums by themselves",
        "dropped: mov.u16",
        "if (from < to) {",
    ),
    *(
        Equivalent("a step may be masked, or walked", what, "const auto least_of = ")
        for what in ("literal off by one: selp", "dropped: redux.sync.min")
    ),
    Equivalent(
        "what is near to the first head of a group is found once more, head by head",
        "",
        "start_head(kv_head * group);",
        "set_near();",
    ),
    Equivalent(
        "a step that no rows attend may be walked",
        "or for and: and.b32",
        "if (!(c.rows & rows)) return true;",
    ),
    *(
        Equivalent(
            "a sequence is a map of one line",
            what,
            "if (p->walk_extent[0] * p->walk_extent[1] == 1) return;",
        )
        for what in ("dropped: ld.param", "dropped: mul")
    ),
    Equivalent("all rows have one scale", "and for or: or.b32", "spread<kFrags>(mine.lse, lse);"),
    Equivalent(
        "a walk may begin before what its rows attend",
        "dropped: mov.u32",
        "near.begin = max(near.begin, sinks.end);",
    ),
    Equivalent(
        "a walk may begin before what its rows attend",
        "operands swapped: selp",
        "if (first_row <= last_sink) near = {lo,",
    ),
)


def recipe_of_windows(make: Any, variant: Variant) -> Recipe:
    return lambda find: problems.run(make(variant), find, metrics=False)


def recipe_of_lists(make: Any, variant: Variant) -> Recipe:
    return lambda find: problems_routed.run(make(variant), find, metrics=False)


def recipe_of_linear(make: Any, variant: Variant) -> Recipe:
    return lambda find: cover_linear.run(make(variant.dtype), find, metrics=False)


def share(kernel: str, variant: Variant, names: tuple[str, ...], count: int) -> None:
    """Prints the share of mutants that are caught, and holds it to the least."""
    if kernel.startswith("routed"):
        recipes = {n: recipe_of_lists(cover_routed.PROBLEMS[n], variant) for n in names}
    elif kernel.startswith("linear"):
        recipes = {n: recipe_of_linear(cover_linear.PROBLEMS[n], variant) for n in names}
    else:
        recipes = {n: recipe_of_windows(PROBLEMS[n], variant) for n in names}
    subject = Subject(kernel, recipes)
    outcome = subject.run(count)
    missed = [m for m in outcome.survivors if not any(e.fits(m) for e in EQUIVALENT)]
    equivalent = len(outcome.survivors) - len(missed)
    of = count - equivalent
    print(f"{kernel}: {len(outcome.caught)} of {of} caught, {equivalent} equivalent")
    said = "\n".join(f"{m} {m.before.source}" for m in missed)
    assert len(outcome.caught) >= LEAST * of, said


def test_mutants_are_caught() -> None:
    """A few of the kernels whose problems are quick."""
    share("window_statistics_bf16", Variant(BF16, False), ("boxes", "alone", "no step"), 40)


@pytest.mark.heavy
@pytest.mark.sweep
@pytest.mark.parametrize(
    ("kernel", "modified"),
    [
        ("window_forward_bf16_32", False),
        ("window_query_gradient_bf16_32", False),
        ("window_key_gradient_bf16_32", False),
        ("window_merge_bf16", False),
        ("window_forward_bf16_32_modified", True),
        ("window_query_gradient_bf16_32_modified", True),
        ("window_key_gradient_bf16_32_modified", True),
        ("window_bias_gradient_bf16_32", True),
        ("routed_forward_bf16_32", False),
        ("routed_query_gradient_bf16_32", False),
        ("routed_key_gradient_bf16_32", False),
        ("routed_bias_gradient_bf16_32", True),
        ("routed_forward_bf16_32_modified", True),
    ],
)
def test_more_mutants_are_caught(kernel: str, modified: bool) -> None:
    known = cover_routed.PROBLEMS if kernel.startswith("routed") else PROBLEMS
    share(kernel, Variant(BF16, modified), tuple(known), 60)


@pytest.mark.heavy
@pytest.mark.sweep
def test_mutants_of_linear_attention_are_caught() -> None:
    begin = ("plain", "wide", "not causal")
    names = tuple(name for name in cover_linear.PROBLEMS if name.startswith(begin))
    share("linear_scan_bf16_32", Variant(BF16, False), names, 40)

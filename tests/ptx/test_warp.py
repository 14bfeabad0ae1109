# SPDX-License-Identifier: Apache-2.0
"""shfl, vote, match, redux, elect and activemask against loops over the lanes of a warp."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from .snippets import apply
from .words import Array

FULL = "0xffffffff"


def words(count: int = 64) -> Array:
    return np.random.default_rng(7).integers(0, 1 << 32, count, dtype=np.uint32)


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 16, 8])
@pytest.mark.parametrize("amount", [0, 1, 3, 16, 31])
def test_shfl(mode: str, width: int, amount: int) -> None:
    a = words()
    # How CUDA's __shfl_*_sync encode a width: a segment mask, and a clamp that is 0 for up.
    control = (32 - width) << 8 | (0 if mode == "up" else 31)
    text = f"shfl.sync.{mode}.b32 {{o}}|{{o1}}, {{a}}, {amount}, {control}, {FULL};"
    got, valid = apply(text, ("u32", "pred"), a=("u32", a))
    for lane in range(64):
        first = lane // width * width  # of the segment
        source = {
            "up": lane - amount,
            "down": lane + amount,
            "bfly": lane // 32 * 32 + (lane % 32 ^ amount),
            "idx": first + amount % width,
        }[mode]
        if mode == "bfly":  # may look into lower segments, not into higher ones
            inside = source < first + width
        else:
            inside = first <= source < first + width
        assert valid[lane] == inside
        assert got[lane] == a[source if inside else lane]


def test_shfl_takes_amounts_from_registers() -> None:
    a = words()
    b = (np.arange(64) * 7 % 32).astype(np.uint32)
    text = f"shfl.sync.idx.b32 {{o}}, {{a}}, {{b}}, 31, {FULL};"
    got = apply(text, "u32", a=("u32", a), b=("u32", b))
    np.testing.assert_array_equal(got, a[np.arange(64) // 32 * 32 + b])


def test_vote() -> None:
    p = np.concatenate([np.ones(32), np.zeros(32), np.arange(32) % 3 == 0]).astype(bool)
    warps = p.reshape(-1, 32)
    wanted = {"all": warps.all(1), "any": warps.any(1), "uni": warps.all(1) | ~warps.any(1)}
    for mode, want in wanted.items():
        got = apply(f"vote.sync.{mode}.pred {{o}}, {{p}}, {FULL};", "pred", p=("pred", p))
        np.testing.assert_array_equal(got, np.repeat(want, 32))
    got = apply(f"vote.sync.ballot.b32 {{o}}, {{p}}, {FULL};", "u32", p=("pred", p))
    want = (warps * (1 << np.arange(32))).sum(axis=1)
    np.testing.assert_array_equal(got, np.repeat(want, 32))
    got = apply(f"vote.sync.all.pred {{o}}, !{{p}}, {FULL};", "pred", p=("pred", p))
    np.testing.assert_array_equal(got, np.repeat(~warps.any(1), 32))


def test_partial_masks_after_a_branch() -> None:
    """Two halves of a warp vote apart, each with the mask of its own half."""
    p = np.arange(32) % 5 == 0
    text = """
        setp.lt.u32 %p1, %r80, 16;
        @%p1 bra LOW;
        vote.sync.ballot.b32 {o}, {p}, 0xffff0000;
        activemask.b32 {o1};
        bra MEET;
        LOW: vote.sync.ballot.b32 {o}, {p}, 0xffff;
        activemask.b32 {o1};
        MEET:
    """
    got, active = apply(text, ("u32", "u32"), p=("pred", p))
    bits = int((p * (1 << np.arange(32))).sum())
    np.testing.assert_array_equal(got, [bits & 0xFFFF] * 16 + [bits & 0xFFFF0000] * 16)
    np.testing.assert_array_equal(active, [0xFFFF] * 16 + [0xFFFF0000] * 16)


def test_lanes_that_arrive_late_are_waited_for() -> None:
    """One path reaches the same shuffle by a detour; the mask holds the others back."""
    a = words(32)
    text = f"""
        mov.b32 %r1, {{a}};
        setp.lt.u32 %p1, %r80, 8;
        @!%p1 bra MEET;
        bra DETOUR;
        MEET: shfl.sync.bfly.b32 {{o}}, %r1, 31, 31, {FULL};
        bra DONE;
        DETOUR: add.u32 %r1, %r1, 1;
        bra MEET;
        DONE:
    """
    got = apply(text, "u32", a=("u32", a))
    changed = a + (np.arange(32) < 8).astype(np.uint32)
    np.testing.assert_array_equal(got, changed[::-1])


@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_redux(kind: str) -> None:
    a = words().view(np.int32 if kind == "s32" else np.uint32)
    wanted: dict[str, Any] = {"add": np.add, "min": np.minimum, "max": np.maximum}
    for op, ufunc in wanted.items():
        got = apply(f"redux.sync.{op}.{kind} {{o}}, {{a}}, {FULL};", kind, a=(kind, a))
        want = ufunc.reduce(a.reshape(2, 32), axis=1, dtype=a.dtype)
        np.testing.assert_array_equal(got, np.repeat(want, 32))
    for op, ufunc in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
        got = apply(f"redux.sync.{op}.b32 {{o}}, {{a}}, {FULL};", "u32", a=(kind, a))
        want = ufunc.reduce(a.view(np.uint32).reshape(2, 32), axis=1)
        np.testing.assert_array_equal(got, np.repeat(want, 32))


def test_match() -> None:
    a = np.concatenate([words(32) % 4, np.full(32, 9)]).astype(np.uint32)
    got = apply(f"match.any.sync.b32 {{o}}, {{a}}, {FULL};", "u32", a=("u32", a))
    for lane in range(64):
        same = a[lane // 32 * 32 : lane // 32 * 32 + 32] == a[lane]
        assert got[lane] == int((same * (1 << np.arange(32))).sum())
    text = f"match.all.sync.b32 {{o}}|{{o1}}, {{a}}, {FULL};"
    got, every = apply(text, ("u32", "pred"), a=("u32", a))
    np.testing.assert_array_equal(got, [0] * 32 + [0xFFFFFFFF] * 32)
    np.testing.assert_array_equal(every, [False] * 32 + [True] * 32)


def test_elect() -> None:
    text = f"elect.sync {{o}}|{{o1}}, {FULL};"
    lane, leader = apply(text, ("u32", "pred"), a=("u32", words()))
    assert not lane.any()
    np.testing.assert_array_equal(leader, np.arange(64) % 32 == 0)

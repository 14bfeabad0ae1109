# SPDX-License-Identifier: Apache-2.0
"""Who attends whom: the binary's tables against the naive rule and against others' formulas."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import BOUNDARIES, axes

from attnext import geometry, reference
from attnext.geometry import AxisRule
from attnext.reference import Axis


def rule_of(axis: Axis) -> AxisRule:
    return AxisRule(**axis._asdict())


def compare(axis, num_queries, num_keys, intervals=geometry.axis_intervals):
    """The keys of every query, phantoms included, are those of the naive rule."""
    got = intervals(rule_of(axis), num_queries, num_keys)
    assert len(got) == num_queries
    for i, (begin, end) in enumerate(got):
        residue = (i + axis.offset) % axis.dilation
        keys = [residue + axis.dilation * u for u in range(begin, end)]
        assert keys == reference.attended_keys(axis, i, num_keys), (axis, i, num_keys)
        assert begin <= end


def small_rules():
    """Every combination of small parameters, some 5000 rules."""
    for left, right, stride, phase, dilation, causal, boundary, offset in itertools.product(
        (0, 1, 2, 4), (0, 1, 3), (1, 2, 3), (-1, 0, 1, 2), (1, 2, 3), (False, True), BOUNDARIES,
        (-2, 0, 3),
    ):  # fmt: skip
        yield Axis(left, right, stride, phase, dilation, causal, boundary, offset)


def compare_all(intervals=geometry.axis_intervals):
    for axis in small_rules():
        for num_queries, num_keys in ((7, 7), (3, 1), (1, 0), (4, 9)):
            compare(axis, num_queries, num_keys, intervals)


def test_every_small_rule():
    compare_all()


@given(axes())
def test_rule(problem):
    compare(*problem)


@pytest.mark.parametrize(
    "change",
    [
        {"left": 1}, {"left": -1}, {"right": 1}, {"right": -1}, {"stride": 1}, {"stride": -1},
        {"phase": 1}, {"phase": -1}, {"dilation": 1}, {"offset": 1}, {"offset": -1},
        {"is_causal": True}, {"is_causal": False},
        *({"boundary": boundary} for boundary in BOUNDARIES),
    ],
    ids=str,
)  # fmt: skip
def test_one_wrong_constant_is_noticed(change):
    """The comparison above turns red when one parameter of the evaluated rule is off."""

    def mutated(rule, num_queries, num_keys):
        ((name, value),) = change.items()
        if type(value) is int:
            value = max(getattr(rule, name) + value, 1 if name in ("stride", "dilation") else -99)
            value = max(value, 0) if name in ("left", "right") else value
        return geometry.axis_intervals(
            dataclasses.replace(rule, **{name: value}), num_queries, num_keys
        )

    with pytest.raises(AssertionError):
        compare_all(mutated)


@pytest.mark.parametrize("end", [0, 1], ids=["begin", "end"])
@pytest.mark.parametrize("by", [-1, 1])
@pytest.mark.parametrize("query", [0, -1], ids=["first", "last"])
def test_one_wrong_table_entry_is_noticed(query, end, by):
    def mutated(*args):
        table = [list(interval) for interval in geometry.axis_intervals(*args)]
        table[query][end] += by
        return table

    with pytest.raises(AssertionError):
        compare(Axis(2, 2), 9, 9, mutated)


@given(axes())
def test_windows_never_move_left(problem):
    axis, num_queries, num_keys = problem
    intervals = geometry.axis_intervals(rule_of(axis), num_queries, num_keys)
    for first in range(axis.dilation):
        begins, ends = ([x[k] for x in intervals[first :: axis.dilation]] for k in (0, 1))
        assert begins == sorted(begins) and ends == sorted(ends)


@given(axes())
def test_inverse_holds_the_queries_of_each_key(problem):
    axis, num_queries, num_keys = problem
    inverse = geometry.inverse_intervals(rule_of(axis), num_queries, num_keys)
    assert len(inverse) == num_keys
    attends = reference.axis_mask(axis, num_queries, num_keys)
    for j, (begin, end) in enumerate(inverse):
        mine = [i for i in range(num_queries) if (i + axis.offset - j) % axis.dilation == 0]
        assert mine[begin:end] == attends[:, j].nonzero().flatten().tolist()
        assert 0 <= begin <= end <= len(mine)


@given(axes())
def test_axis_mask(problem):
    axis, num_queries, num_keys = problem
    mask = geometry.axis_mask(rule_of(axis), num_queries, num_keys)
    assert torch.equal(mask, reference.axis_mask(axis, num_queries, num_keys))


@given(st.lists(axes(most=6), min_size=1, max_size=3))
def test_dense_mask_is_the_product_of_its_axes(problem):
    rules, queries, keys = zip(*problem, strict=True)
    mask = geometry.dense_mask([rule_of(axis) for axis in rules], queries, keys)
    assert torch.equal(mask, reference.dense_mask(rules, queries, keys))
    points = itertools.product(
        enumerate(itertools.product(*map(range, queries))),
        enumerate(itertools.product(*map(range, keys))),
    )
    for (row, i), (column, j) in itertools.islice(points, 300):
        attended = [
            reference.attended_keys(a, x, n) for a, x, n in zip(rules, i, keys, strict=True)
        ]
        assert mask[row, column] == all(y in seen for y, seen in zip(j, attended, strict=True))


def test_from_kernel_size():
    assert AxisRule.from_kernel_size(7) == AxisRule(3, 3)
    assert AxisRule.from_kernel_size(6) == AxisRule(3, 2)
    assert AxisRule.from_kernel_size(1) == AxisRule(0, 0)
    assert AxisRule.from_kernel_size((2, 5), dilation=3) == AxisRule(2, 5, dilation=3)
    assert AxisRule.from_kernel_size(6, is_causal=True) == AxisRule(5, 0, is_causal=True)


# Other people's formulas, restated


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2, 3, 5])
@pytest.mark.parametrize("kernel", [1, 2, 3, 5, 6])
def test_generalized_neighborhood_attention(kernel, stride, dilation):
    """Hassani et al., arXiv:2504.16922: start and end of a window in a dilation class."""
    if stride > kernel:
        kernel = stride
    for length in range(kernel * dilation, kernel * dilation + 12):
        plain = torch.zeros(length, length, dtype=torch.bool)
        causal = torch.zeros_like(plain)
        before, after = kernel // 2, kernel // 2 + kernel % 2 - 1
        for query in range(length):
            group, i = query % dilation, query // dilation
            n = length // dilation + (1 if group < length % dilation else 0)
            leader = min(i // stride * stride + stride // 2, n - 1)
            start = max(leader - before, 0)
            if leader + after >= n:
                start += n - leader - after - 1
            for u in range(start, start + kernel):
                plain[query, group + dilation * u] = True
            leader = min(i // stride * stride + stride - 1, n - 1)
            for u in range(max(leader - kernel + 1, 0), i + 1):
                causal[query, group + dilation * u] = True
        for expected, is_causal in ((plain, False), (causal, True)):
            rule = AxisRule.from_kernel_size(
                kernel, is_causal=is_causal, stride=stride, dilation=dilation
            )
            assert torch.equal(geometry.axis_mask(rule, length, length), expected)


@pytest.mark.parametrize("length", [1, 2, 5, 16, 23])
def test_sliding_windows(length):
    """A band: window_size counts the query itself, a pair of sides does not."""
    i, j = torch.arange(length)[:, None], torch.arange(length)
    for window in range(1, length + 3):
        rule = AxisRule.from_kernel_size(window, is_causal=True, boundary="truncate")
        expected = (j <= i) & (i - j < window)
        assert torch.equal(geometry.axis_mask(rule, length, length), expected)
        rule = AxisRule(window, window, boundary="truncate")
        expected = (i - j).abs() <= window
        assert torch.equal(geometry.axis_mask(rule, length, length), expected)


@pytest.mark.parametrize("window", [2, 3, 7, 8])
def test_regions_of_shifted_windows(window):
    """Liu et al., arXiv:2103.14030: windows of the rolled axis, cut where the roll joined it."""
    for tiles, shift in itertools.product((1, 2, 3), range(window)):
        length = tiles * window
        where = (torch.arange(length) - shift) % length  # place of a token after the roll
        region = torch.zeros(length)
        region[slice(length - window, length - shift)] = 1
        region[slice(length - shift, length)] = 2
        tile, part = where // window, region[where]
        if not shift:
            part = torch.zeros(length)
        expected = (tile[:, None] == tile) & (part[:, None] == part)
        rule = AxisRule(
            window // 2, window - 1 - window // 2, window, phase=shift, boundary="truncate"
        )
        assert torch.equal(geometry.axis_mask(rule, length, length), expected)


def test_overlapping_windows():
    """Chen et al., arXiv:2205.04437: unfold with zero padding; the phantoms are out of range."""
    tile, box, length = 4, 6, 12
    left = tile // 2 + (box - tile) // 2
    rule = AxisRule(left, box - 1 - left, stride=tile, boundary="zero_pad")
    expected = [(i // tile * tile - 1, i // tile * tile + 5) for i in range(length)]
    assert geometry.axis_intervals(rule, length, length) == expected


# Tile plans


@given(st.lists(axes(most=25), min_size=1, max_size=3), st.integers(1, 16), st.integers(1, 4))
def test_tiles_cover_each_query_once(problem, lanes, vectors):
    rules, queries, keys = zip(*problem, strict=True)
    plan = geometry.tile_plan(
        [rule_of(axis) for axis in rules], queries, keys, lanes=lanes, vectors=vectors
    )
    assert math.prod(plan["box"]) <= lanes
    useful = 1
    for axis, n, m, segments in zip(rules, queries, keys, plan["segments"], strict=True):
        covered = []
        for first, count, begin, end in segments:
            members = [first + axis.dilation * r for r in range(count)]
            covered += members
            for i in members:  # the segment's run of keys holds every key of its queries
                residue = (i + axis.offset) % axis.dilation
                attended = reference.attended_keys(axis, i, m)
                assert {residue + axis.dilation * u for u in range(begin, end)} >= set(attended)
        assert sorted(covered) == list(range(n))
        useful *= sum(len(reference.attended_keys(axis, i, m)) for i in range(n))
    assert plan["useful_pairs"] == useful
    assert plan["computed_pairs"] >= useful
    assert 0 <= plan["useful_fraction"] <= 1
    most = math.prod(len(segments) for segments in plan["segments"])
    assert math.ceil(most / vectors) <= plan["num_tiles"] <= most


def test_tile_plan_of_a_known_problem():
    """A 7 x 7 kernel in 4 x 4 queries drags in 10 x 10 keys."""
    rule = AxisRule.from_kernel_size(7, boundary="truncate")
    plan = geometry.tile_plan([rule, rule], [56, 56], [56, 56], lanes=16, vectors=2)
    assert plan["box"] == [4, 4]
    assert plan["useful_pairs"] == (56 * 7 - 12) ** 2
    assert plan["computed_pairs"] == (14 * 10 - 6) ** 2 * 16


def test_tiles_of_windows_waste_nothing():
    rule = AxisRule(4, 3, stride=8, boundary="truncate")
    plan = geometry.tile_plan([rule, rule], [32, 24], [32, 24], lanes=8, vectors=2)
    assert plan["useful_fraction"] == 1


@pytest.mark.parametrize(
    "options",
    [{"boundary": "wrap"}, {"stride": 0}, {"dilation": 0}, {"left": -1}, {"right": -1}],
    ids=str,
)
def test_rules_that_are_none(options):
    ((name, _),) = options.items()
    with pytest.raises(ValueError, match=name):
        AxisRule(**{"left": 1, "right": 1, **options})

# SPDX-License-Identifier: Apache-2.0
"""Pooling blocks and selecting among them, against loops in float64."""

import contextlib
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnext import Blocks, Windows, block_pool, packed_blocks, reference_routers, select_topk
from attnext import selection as module
from attnext.selection_ops import select_topk_op
from attnext.testing import available_isas, isa, threads

F64 = torch.float64
DTYPES = (torch.float32, F64, torch.bfloat16, torch.float16)


def normal(*shape, dtype=F64, seed=None):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=F64, generator=generator).to(dtype)


def ranges_of(blocks):
    starts, ends = module.bounds_of(blocks, "cpu")
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


# ---- pooling -------------------------------------------------------------------------------------


@st.composite
def geometries(draw):
    """What to pool by, the extents of the tokens, and which tokens that makes, spelled out."""
    kind = draw(st.sampled_from(("size", "box", "windows", "lengths", "boxes of any order")))
    if kind == "windows":
        n = draw(st.integers(0, 40))
        size, stride = draw(st.integers(1, 12)), draw(st.integers(1, 12))
        phase, ragged = draw(st.integers(0, 4)), draw(st.booleans())
        groups, start = [], phase
        while start < n and (ragged or start + size <= n):
            groups.append(list(range(start, min(start + size, n))))
            start += stride
        return Windows(n, size, stride, phase, ragged), (n,), groups
    if kind == "lengths":
        bounds = [0, *itertools.accumulate(draw(st.lists(st.integers(0, 7), max_size=7)))]
        cuts = [list(range(a, b)) for a, b in itertools.pairwise(bounds)]
        offsets = torch.tensor(bounds, dtype=torch.int32)
        return Blocks((bounds[-1],), offsets), (bounds[-1],), cuts
    rank = draw(st.integers(2, 3)) if kind != "size" else 1
    extents = tuple(draw(st.integers(1, 9 if rank > 1 else 40)) for _ in range(rank))
    sizes = tuple(draw(st.integers(1, 5 if rank > 1 else 12)) for _ in range(rank))
    raster = torch.arange(math.prod(extents)).reshape(extents)
    boxes = itertools.product(*(range(0, n, size) for n, size in zip(extents, sizes, strict=True)))
    groups = [
        raster[tuple(slice(a, a + s) for a, s in zip(box, sizes, strict=True))].flatten().tolist()
        for box in boxes
    ]
    by = Blocks.of(extents, sizes) if kind == "boxes of any order" else sizes
    return (sizes[0] if rank == 1 and kind == "size" else by), extents, groups


@given(
    geometry=geometries(), reduce=st.sampled_from(("mean", "sum", "max", "min", "min_max")),
    dtype=st.sampled_from(DTYPES), weighted=st.sampled_from((None, "all", "heads", "batch")),
    strided=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=100)
def test_pooling_is_the_loop(geometry, reduce, dtype, weighted, strided, seed):
    by, extents, groups = geometry
    x = normal(2, *extents, 3, 4, dtype=dtype, seed=seed)
    if strided:  # heads first, and every other feature's neighbour is NaN
        buffer = torch.full((2, 3, *extents, 8), math.nan, dtype=dtype)
        buffer[..., :4] = x.movedim(-2, 1)
        x = buffer.movedim(1, -2)[..., :4]
    weights = None
    if weighted and reduce in ("mean", "sum"):
        shape = (1 if weighted == "heads" else 2, *extents, 1 if weighted == "batch" else 3)
        weights = normal(*shape, seed=seed).abs() + 0.1
    result, counts = block_pool(x, by, reduce, weights=weights, return_counts=True)
    expected = reference_routers.block_pool(x, groups, reduce, weights)
    if result.dim() > 4:
        result = result.flatten(1, -3)
    assert counts.dtype == torch.int32 and counts.flatten().tolist() == [len(g) for g in groups]
    if not groups:
        assert result.shape[:2] == (2, 0)
        return
    assert result.dtype == dtype
    if reduce in ("max", "min", "min_max"):
        assert torch.equal(result.double(), expected)
        return
    size = reference_routers.block_pool(x.abs(), groups, reduce, weights)
    rounding = torch.finfo(dtype).eps / 2
    accumulated = 20 * torch.finfo(F64 if dtype == F64 else torch.float32).eps
    assert ((result.double() - expected).abs() <= rounding * expected.abs() + accumulated * size
            + torch.finfo(dtype).tiny).all()  # fmt: skip


@pytest.mark.parametrize("reduce", ["mean", "sum", "max", "min", "min_max"])
@pytest.mark.parametrize(
    "by",
    [5, Windows(12, 5, 3), Windows(12, 4, 2, phase=1, ragged=False),
     Blocks((12,), torch.tensor([0, 2, 2, 9, 12], dtype=torch.int32)), (2, 3)],
    ids=["size", "windows", "whole windows", "lengths", "boxes"],
)  # fmt: skip
def test_gradcheck_of_pooling(by, reduce):
    extents = (3, 4) if isinstance(by, tuple) else (12,)
    x = normal(2, *extents, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: block_pool(x, by, reduce), x)
    if reduce in ("mean", "sum"):
        weights = (normal(2, *extents, 1).abs() + 0.1).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, w: block_pool(x, by, reduce, weights=w), (x, weights)
        )


def test_gradcheck_in_float32_on_the_fast_sum():
    """The product with ones that the CPU sums float32 by, against the sum in float64."""
    x = normal(2, 13, 3, 4)
    cotangent = normal(2, 3, 3, 4)
    grads = []
    for dtype in (torch.float32, F64):
        leaf = x.to(dtype).requires_grad_()
        block_pool(leaf, 5).backward(cotangent.to(dtype))
        grads.append(leaf.grad.double())
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-6)


def test_bound_of_min_max():
    """Quest: the product is at least that of the query with any key of the block."""
    keys, query = normal(1, 30, 2, 8), normal(1, 5, 2, 8)
    bounds = torch.cat([query.clamp(max=0), query.clamp(min=0)], -1)
    table = reference_routers.scores(bounds, block_pool(keys, 4, "min_max"), "dot")
    dots = torch.einsum("bihd,bjhd->bhij", query, keys)
    for block, part in enumerate(dots.split(4, -1)):
        assert (part <= table[..., block, None] + 1e-12).all()


def test_blocks_of_packed_sequences():
    cu = torch.tensor([0, 5, 5, 12, 13], dtype=torch.int32)
    blocks, first = packed_blocks(cu, 3)
    assert blocks.offsets.tolist() == [0, 3, 5, 8, 11, 12, 13]
    assert first.tolist() == [0, 2, 2, 5, 6]
    x = normal(1, 13, 2, 4)
    pieces = [block_pool(x[:, a:b], 3) for a, b in itertools.pairwise(cu.tolist()) if b > a]
    torch.testing.assert_close(block_pool(x, blocks), torch.cat(pieces, 1))


@given(st.lists(st.integers(0, 9), max_size=5), st.integers(1, 5))
def test_blocks_of_packed_sequences_that_nobody_reads(lengths, size):
    """Of a number that is known beforehand: the same blocks, and empty ones behind them."""
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    blocks, first = packed_blocks(cu, size)
    known, same = packed_blocks(cu, size, num_tokens=sum(lengths))
    assert torch.equal(first, same) and known.extent == blocks.extent
    assert known.num_blocks == sum(lengths) // size + len(lengths)
    offsets = known.offsets.tolist()
    assert offsets[: blocks.num_blocks + 1] == blocks.offsets.tolist()
    assert set(offsets[blocks.num_blocks :]) == {sum(lengths)}
    away = packed_blocks(cu.to("meta"), size, num_tokens=sum(lengths))[0]
    assert away.offsets.shape == known.offsets.shape


# ---- selection -----------------------------------------------------------------------------------


def seen_lists(queries, candidates, causal, count):
    """For each row the candidates it may select, by the definition of the rules."""
    if causal == "none":
        return [list(range(count))] * len(queries[0])
    offset = candidates[1] - queries[1]
    lists = []
    for first, past in queries[0]:
        lists.append([
            c for c, (start, end) in enumerate(candidates[0])
            if (start <= past - 1 + offset if causal == "start" else end - 1 <= first + offset)
        ])  # fmt: skip
    return lists


def as_mask(lists, count):
    mask = torch.zeros(len(lists), count, dtype=torch.bool)
    for i, row in enumerate(lists):
        mask[i, row] = True
    return mask


@st.composite
def selections(draw):
    score = draw(st.sampled_from(module.SCORES))
    causal = draw(st.sampled_from(module.CAUSAL))
    keys = draw(st.integers(1, 40))
    tokens = draw(st.integers(1, 30))
    row = draw(st.integers(1, 5))
    queries = Windows(tokens, row)
    candidates = Windows(keys, draw(st.integers(1, 9)), draw(st.integers(1, 9)),
                         ragged=draw(st.booleans()))  # fmt: skip
    if score == "group_prob" or draw(st.integers(0, 3)) == 0:
        blocks = draw(st.integers(1, 9))
        candidates = draw(st.sampled_from((Windows(keys, blocks), Blocks.of(keys, blocks))))
    first, last = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    way = draw(st.sampled_from(("in torch", *available_isas())))
    return (way, {
        "score": score, "causal": causal, "query_blocks": queries, "candidate_blocks": candidates,
        "force_first": first, "force_last": last,
        "k": max(1, first + last) + draw(st.integers(0, 4)),
        "tie": draw(st.sampled_from(("low", "high"))),
        "order": draw(st.sampled_from(("index", "score"))),
    }), draw(st.sampled_from(DTYPES)), draw(st.booleans()), draw(st.integers(0, 99))  # fmt: skip


@contextlib.contextmanager
def by(way):
    """Selection "in torch", as on a GPU, or by the kernels of an instruction set."""
    if way != "in torch":
        with isa(way):
            yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._Problem, "select", module._Problem.select_in_torch)
        yield


@given(selections(), st.booleans())
@settings(max_examples=200)
def test_selection_is_the_loop(problem, ties):
    """Scores are of small integers, exact in every dtype: ties are ties, and everywhere."""
    (way, options), dtype, excluding, seed = problem
    generator = torch.Generator().manual_seed(seed)
    score, causal = options["score"], options["causal"]
    queries, candidates = options["query_blocks"], options["candidate_blocks"]
    rows = queries.num_tokens if score == "max_q" else queries.num_blocks

    def small(*shape):
        most = 2 if ties else 9
        return torch.randint(-most, most + 1, shape, generator=generator).to(dtype)

    heads, kv_heads = 4, 2
    windows = None
    count = candidates.num_blocks
    if score == "group_prob":
        windows = Windows(candidates.num_tokens, 1 + seed % 6, 1 + seed % 4, ragged=seed % 5 > 0)
        count = windows.num_blocks
    query, table = small(2, rows, heads, 3), small(2, count, kv_heads, 3)
    more, given_more = {}, {}
    if score == "relu_wsum":
        more["weights"] = given_more["weights"] = small(2, rows, heads)
    if score == "group_prob":
        lse = torch.rand(2, rows, heads, generator=generator, dtype=F64) * 4
        given_more = {"lse": lse, "windows": windows, "scale": 0.25}
        starts, ends = map(list, zip(*ranges_of(windows), strict=True)) if count else ([], [])
        share = torch.zeros(count, candidates.num_blocks, dtype=F64)
        for w, (j, (a, b)) in itertools.product(range(count), enumerate(ranges_of(candidates))):
            share[w, j] = max(0, min(b, ends[w]) - max(a, starts[w])) / windows.stride
        more = {"lse": lse, "share": share, "scale": 0.25}
        if causal != "none":
            own = seen_lists((ranges_of(queries), queries.num_tokens),
                             (ranges_of(windows), windows.num_tokens), "end", count)  # fmt: skip
            more["seen"] = as_mask(own, count)
    if score == "max_q":
        more["rows"] = [list(range(a, b)) for a, b in ranges_of(queries)]
        if causal != "none":
            single = ranges_of(Windows(rows, 1))
            own = seen_lists((single, rows), (ranges_of(candidates), candidates.num_tokens),
                             causal, count)  # fmt: skip
            more["seen"] = as_mask(own, count)
    expected = reference_routers.scores(query, table, score, **more)
    list_heads, num_rows, count = expected.shape[1:]
    allowed = seen_lists((ranges_of(queries), queries.num_tokens),
                         (ranges_of(candidates), candidates.num_tokens), causal, count)  # fmt: skip
    exclude = None
    if excluding:
        exclude = torch.rand(2, 1, num_rows, count, generator=generator) < 0.3

    with pytest.MonkeyPatch.context() as patch, by(way):
        patch.setattr(module, "_SLICE", 1 + seed * 7)  # a row or a few at a time
        indices, values = select_topk(
            query, table, **options, exclude=exclude, return_values=True, **given_more
        )
    assert indices.dtype == torch.int32 and indices.shape == (2, list_heads, num_rows, options["k"])
    if score == "group_prob":  # not exact: held to the scores, not to the lists
        tolerance = 1e-10 if dtype == F64 else 1e-4
    for b, h in itertools.product(range(2), range(list_heads)):
        for i in range(num_rows):
            mine = allowed[i]
            first = {*mine[: options["force_first"]]}
            last = {*(mine[-options["force_last"] :] if options["force_last"] else [])}
            row = expected[b, h, i]
            if exclude is not None:
                mine = [c for c in mine if not exclude[b, 0, i, c]]
            forced = (first | last) & set(mine)
            got = [c for c in indices[b, h, i].tolist() if c >= 0]
            pad = options["k"] - len(got)
            assert indices[b, h, i].tolist()[len(got) :] == [-1] * pad
            assert (values[b, h, i, len(got) :] == -math.inf).all()
            torch.testing.assert_close(
                values[b, h, i, : len(got)].double(), row[got], atol=1e-4, rtol=1e-4
            )
            sign = 1 if options["tie"] == "low" else -1
            order = [(c not in forced, 0 if c in forced else -row[c], sign * c) for c in mine]
            best = [sign * c for _, _, c in sorted(order)[: options["k"]]]
            if score == "group_prob":
                assert len(set(got)) == len(best) and forced <= set(got) <= set(mine)
                worst = min((row[c].item() for c in set(got) - forced), default=math.inf)
                left = max((row[c].item() for c in set(mine) - set(got)), default=-math.inf)
                assert worst >= left - tolerance * max(1.0, abs(left))
                continue
            assert got == (sorted(best) if options["order"] == "index" else best)


def test_reference_of_the_reference():
    """The list that is made by hand."""
    table = torch.tensor([[3.0, 1.0, 3.0, 2.0]])
    assert reference_routers.top_k(table, 2, [[0, 1, 2, 3]]) == [[0, 2]]
    assert reference_routers.top_k(table, 1, [[0, 1, 2, 3]], tie="high") == [[2]]
    assert reference_routers.top_k(table, 2, [[0, 1, 3]], last=1) == [[3, 0]]


def test_scores_of_bfloat16_are_float32():
    """Candidates that differ by less than a rounding of bfloat16 are told apart."""
    candidates = torch.zeros(1, 5, 1, 300, dtype=torch.bfloat16)
    candidates[:, :, 0, 0] = 256
    for c in range(5):
        candidates[0, c, 0, 1 : 1 + c] = 2**-4
    query = torch.ones(1, 3, 1, 300, dtype=torch.bfloat16)
    indices, values = select_topk(query, candidates, 2, return_values=True)
    assert (indices == torch.tensor([3, 4])).all()
    assert (values == torch.tensor([256.1875, 256.25])).all()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_numbers_that_are_none(dtype):
    """NaN is the highest score, infinities are scores, and minus zero is zero."""
    candidates = torch.tensor([1.0, math.nan, -math.inf, 0.0, -0.0, math.inf], dtype=dtype)
    candidates = candidates.view(1, 6, 1, 1)
    query = torch.ones(1, 1, 1, 1, dtype=dtype)

    def lists(k, **options):
        return select_topk(query, candidates, k, **options)[0, 0, 0].tolist()

    assert lists(2) == [1, 5]
    assert lists(4, order="score") in ([1, 5, 0, 3], [5, 1, 0, 3])
    assert lists(4, order="score", tie="high")[3] == 4
    assert lists(6) == [0, 1, 2, 3, 4, 5]
    assert lists(5, force_first=1, order="score")[0] == 0
    out = torch.tensor([[[[True, False, False, False, False, False]]]])
    assert lists(2, force_first=1, exclude=out) == [1, 5]


@pytest.mark.parametrize("tie, forced", [("low", [0, 1, 8]), ("high", [8, 1, 0])])
def test_forced_ones_come_first_by_their_index(tie, forced):
    options = {"force_first": 2, "force_last": 1, "tie": tie, "order": "score"}
    best = select_topk(normal(1, 3, 2, 8, seed=1), normal(1, 9, 2, 8, seed=2), 5, **options)
    assert (best[..., :3] == torch.tensor(forced)).all()


def test_ranges_take_the_place_of_a_rule():
    """Packed sequences: each row selects among the blocks of its own."""
    query, candidates = normal(2, 4, 2, 3), normal(2, 6, 2, 3)
    begin, end = torch.tensor([0, 0, 2, 5]), torch.tensor([[2, 2, 5, 5], [1, 6, 5, 6]])
    lists = select_topk(query, candidates, 2, ranges=(begin, end), force_first=1)
    table = reference_routers.scores(query, candidates, "dot")
    for b, h in itertools.product(range(2), range(2)):
        allowed = [list(range(a, e)) for a, e in zip(begin.tolist(), end[b].tolist(), strict=True)]
        expected = reference_routers.top_k(table[b, h], 2, allowed, first=1)
        for got, want in zip(lists[b, h].tolist(), expected, strict=True):
            assert got == sorted(want) + [-1] * (2 - len(want))


SCORED = {
    "dot": {},
    "max_q": {"query_blocks": Windows(7, 3), "candidate_blocks": Windows(10, 2),
              "causal": "start"},
    "relu_wsum": {},
    "group_prob": {"windows": Windows(12, 4, 2), "query_blocks": Windows(7, 1),
                   "candidate_blocks": Windows(12, 3), "causal": "start"},
}  # fmt: skip


@pytest.mark.parametrize("score", SCORED)
def test_gradcheck_of_values(score, monkeypatch):
    monkeypatch.setattr(module, "_SLICE", 100)
    options = dict(SCORED[score], k=3, score=score, force_last=1, return_values=True)
    count = 6 if score == "group_prob" else 5
    leaves = [normal(1, 7, 4, 2), normal(1, count, 2, 2)]
    name = {"relu_wsum": "weights", "group_prob": "lse"}.get(score)
    if name:
        leaves.append(normal(1, 7, 4))

    def function(query, candidates, *more):
        extra = {name: more[0]} if more else {}
        return select_topk(query, candidates, **options, **extra)[1].clamp(min=-99)

    assert (function(*leaves) > -99).any()
    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in leaves])


def test_gradient_of_values_does_not_depend_on_the_slices(monkeypatch):
    query, candidates = normal(1, 60, 2, 8, dtype=torch.bfloat16), normal(1, 9, 1, 8).bfloat16()
    grads = []
    for size in (10**6, 40):
        monkeypatch.setattr(module, "_SLICE", size)
        leaves = [x.clone().requires_grad_() for x in (query, candidates)]
        select_topk(*leaves, 3, return_values=True)[1].float().sum().backward()
        assert all(leaf.grad.dtype == torch.bfloat16 for leaf in leaves)
        grads.append([leaf.grad for leaf in leaves])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=0.0, rtol=2**-7)


@pytest.mark.parametrize("score", module.SCORES)
@pytest.mark.parametrize("way", available_isas())
def test_kernel_is_what_torch_selects(way, score):
    """More rows than a tile has, more candidates than a block, few and many entries; strides."""
    generator = torch.Generator().manual_seed(0)
    for rows, count, dim, k in ((1, 300, 70, 5), (3, 40, 3, 50), (75, 150, 16, 7), (33, 7, 1, 1)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):

            def small(*shape, dtype=dtype):
                return torch.randint(-9, 10, shape, generator=generator).to(dtype)

            tokens = 4 * rows - 1 if score == "max_q" else rows
            query = small(2, 4, tokens, dim + 3).transpose(1, 2)[..., 2 : 2 + dim]
            table = small(2, 2, count, dim).transpose(1, 2)
            options = {
                "score": score, "k": k, "causal": "start", "force_last": 1,
                "query_blocks": Windows(tokens, 4 if score == "max_q" else 1),
                "candidate_blocks": Windows(count * 3, 3),
            }  # fmt: skip
            if score == "relu_wsum":
                options["weights"] = small(2, rows, 4)
            if score == "group_prob":
                options |= {"windows": Windows(count * 3, 3), "scale": 0.1 / dim,
                            "lse": torch.full((2, rows, 4), 3.0, dtype=dtype)}  # fmt: skip
                options["lse"][:, ::5] = -math.inf
                options["candidate_blocks"] = Windows(count * 3, 8)
            found = []
            for which, number in ((way, 1), (way, 2), ("in torch", 1)):
                with by(which), threads(number):
                    found.append(select_topk(query, table, **options, return_values=True))
            assert all(torch.equal(a, b) for a, b in zip(*found[:2], strict=True))
            (indices, values), _, (want, exact) = found
            if score == "group_prob":
                torch.testing.assert_close(values, exact, atol=1e-30, rtol=1e-5)
            else:
                assert torch.equal(indices, want) and torch.equal(values, exact)


def test_transforms():
    """torch.func sees what autograd does; shapes are known without numbers."""
    q, k = normal(1, 12, 2, 4), normal(1, 12, 2, 4)

    def best(q):
        return select_topk(q, k, 3, return_values=True)[1].sum()

    leaf = q.clone().requires_grad_()
    best(leaf).backward()
    assert torch.equal(torch.func.grad(best)(q), leaf.grad)
    indices, values = select_topk(q.to("meta"), k.to("meta"), 3, return_values=True)
    assert indices.shape == values.shape == (1, 2, 12, 3) and values.dtype == F64


@pytest.mark.parametrize("score", ["dot", "max_q", "relu_wsum", "group_prob"])
def test_values_are_mapped_with_their_gradients(score):
    windows, ones = Windows(12, 2), Windows(12, 1)
    options = {
        "dot": {"causal": "end", "query_blocks": ones, "candidate_blocks": windows},
        "max_q": {"query_blocks": Windows(12, 4)},
        "relu_wsum": {},
        "group_prob": {"windows": windows, "candidate_blocks": Windows(12, 4)},
    }[score]
    factor = {"relu_wsum": "weights", "group_prob": "lse"}.get(score)
    leaves = [normal(3, 1, 12, 4, 4, seed=1), normal(3, 1, 6, 2, 4, seed=2)]
    if factor:
        leaves.append(normal(3, 1, 12, 4, seed=3))

    def loss(query, candidates, *factors):
        given = dict(zip([factor], factors, strict=False))
        _, values = select_topk(
            query, candidates, 2, score=score, return_values=True, **given, **options
        )
        return values.clamp(min=-9).sin().sum()

    gradient = torch.func.grad(loss, argnums=tuple(range(len(leaves))))
    mapped = torch.func.vmap(gradient)(*leaves)
    alone = [gradient(*(x[n] for x in leaves)) for n in range(3)]
    for a, parts in zip(mapped, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(parts))
    leaves = [x.requires_grad_() for x in leaves]
    outside = torch.autograd.grad(torch.func.vmap(loss)(*leaves).sum(), leaves)
    for a, b in zip(mapped, outside, strict=True):
        torch.testing.assert_close(a, b)


def operator_arguments(**change):
    arguments = {
        "query": normal(2, 9, 4, 5, dtype=torch.float32),
        "candidates": normal(2, 7, 2, 5, dtype=torch.float32),
        "factors": None, "each_end": None, "begin": None, "end": torch.full((1, 9), 7),
        "overlap": None, "share": None, "exclude": None, "score": 0, "k": 3, "samples": 1,
        "lists": 4, "scale": 1.0, "force_first": 0, "force_last": 0, "tie_high": False,
        "by_score": False,
    }  # fmt: skip
    return tuple((arguments | change).values())


def test_operator():
    torch.library.opcheck(select_topk_op, operator_arguments())
    change = {"score": 2, "lists": 1, "samples": 4, "factors": torch.rand(2, 9, 4)}
    torch.library.opcheck(select_topk_op, operator_arguments(**change))


def test_operator_reads_no_window_that_there_is_not():
    same = {
        "query": normal(2, 9, 4, 5, dtype=torch.float32, seed=0),
        "candidates": normal(2, 7, 2, 5, dtype=torch.float32, seed=1),
        "score": 3, "lists": 2, "samples": 2, "factors": torch.zeros(2, 9, 4),
        "end": torch.full((1, 9), 3),
    }  # fmt: skip
    found = []
    for index, share, end in (
        ([[0, -5], [6, 7], [2, 2**40]], [[1.0, 1.0]] * 3, 99),
        ([[0, 0], [6, 0], [2, 0]], [[1.0, 0.0]] * 3, 7),
    ):
        change = {"overlap": torch.tensor(index), "share": torch.tensor(share)}
        change["each_end"] = torch.full((9,), end)
        found.append(select_topk_op(*operator_arguments(**same, **change)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"candidates": torch.zeros(2, 7, 3, 5)}, "candidates"),
        ({"candidates": torch.zeros(2, 7, 2, 4)}, "candidates"),
        ({"candidates": torch.zeros(2, 7, 2, 5, dtype=F64)}, "float64"),
        ({"lists": 3}, "lists"),
        ({"end": torch.zeros(1, 8, dtype=torch.int64)}, "ranges"),
        ({"begin": torch.zeros(2, 9, dtype=torch.int64)}, "ranges"),
        ({"factors": torch.zeros(2, 9, 3)}, "factors"),
        ({"exclude": torch.zeros(2, 4, 9, 6, dtype=torch.bool)}, "exclude"),
    ],
)
def test_operator_refuses(change, what):
    with pytest.raises((ValueError, TypeError, IndexError), match=what):
        select_topk_op(*operator_arguments(**change))


def test_compile_whole_graph():
    blocks = Windows(40, 8)

    def route(q, k):
        pooled = block_pool(q, 8), block_pool(k, 8)
        return select_topk(*pooled, 2, causal="start", query_blocks=blocks,
                           candidate_blocks=blocks, force_last=1)  # fmt: skip

    q, k = normal(2, 1, 40, 2, 4, dtype=torch.float32)
    compiled = torch.compile(route, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k), route(q, k))


def test_autocast_leaves_scores_alone():
    q, k = normal(2, 1, 64, 2, 16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        pooled = block_pool(k, 4)
        values = select_topk(q, pooled, 3, return_values=True)[1]
    assert torch.equal(pooled, block_pool(k, 4))
    assert torch.equal(values, select_topk(q, pooled, 3, return_values=True)[1])

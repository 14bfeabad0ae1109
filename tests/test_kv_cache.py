# SPDX-License-Identifier: Apache-2.0
"""Caches: each step against attention to the tokens a cache is said to hold."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import zeros

import attnext
from attnext import reference_cache as reference
from attnext.kv_cache import KVCache, LazyEvictionCache, StreamingCache, lazy_scores
from attnext.routers.streaming import streaming_attention

F64 = torch.float64


def normal(*shape, seed=0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def rope(x, positions):
    """Rotary positions of two frequencies, on four dimensions."""
    angle = positions.to(x.dtype)[:, None, None] * torch.tensor([0.9, 0.13], dtype=x.dtype)
    a, b = x[..., 0::2], x[..., 1::2]
    sin, cos = angle.sin(), angle.cos()
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def unrotated(x, positions):
    return x


def dense(q, k, v):
    """Causal attention of one kv head, ``[n, H, D]`` and ``[m, D]``, in float64."""
    logits = torch.einsum("ihd,jd->hij", q, k) * q.shape[-1] ** -0.5
    i, j = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0], torch.arange(k.shape[0])
    weights = torch.softmax(logits.masked_fill(j > i, -torch.inf), -1).nan_to_num()
    return torch.einsum("hij,jd->ihd", weights, v)


# ---- the plain cache -----------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.data())
def test_cache_is_attention_to_its_rows(data):
    """Rows appended, dropped and moved per head; tokens, and blocks of them, attended."""
    batch, kv_heads, group = (data.draw(st.integers(1, 2)) for _ in range(3))
    cache = KVCache(batch, 64, kv_heads, 3, 2, dtype=F64)
    cache.key.fill_(torch.nan)  # what was never appended must never be read
    cache.value.fill_(torch.nan)
    held = [[[] for _ in range(kv_heads)] for _ in range(batch)]  # (key, value), as they should be
    seed = data.draw(st.integers(0, 2**31))
    for _ in range(data.draw(st.integers(1, 4))):
        count = data.draw(st.integers(1, 9))
        k, v = (
            normal(batch, count, kv_heads, 3, seed=seed),
            normal(batch, count, kv_heads, 2, seed=seed + 1),
        )
        seed += 2
        cache.append(k, v)
        for b in range(batch):
            for h in range(kv_heads):
                held[b][h] += zip(k[b, :, h], v[b, :, h], strict=True)
        q = normal(batch, count, kv_heads * group, 3, seed=seed)
        blocks, size = None, data.draw(st.integers(1, 5))
        if data.draw(st.booleans()):
            shape = (
                data.draw(st.sampled_from([1, batch])),
                data.draw(st.sampled_from([1, kv_heads, kv_heads * group])),
                data.draw(st.sampled_from([1, count])),
                data.draw(st.integers(1, 3)),
            )
            generator = torch.Generator().manual_seed(seed)
            blocks = torch.randint(-1, 6, shape, generator=generator)
        got = cache.attend(q, blocks=blocks, block_size=size)
        for b in range(batch):
            for h in range(kv_heads * group):
                rows = held[b][h // group]
                keys, values = (torch.stack(x) for x in zip(*rows, strict=True))
                for i in range(count):
                    seen = range(len(rows) - count + i + 1)
                    if blocks is not None:
                        lists = blocks.shape[1]
                        mine = blocks[
                            b % blocks.shape[0],
                            h // (kv_heads * group // lists),
                            i % blocks.shape[2],
                        ]
                        seen = [j for j in seen if j // size in mine.tolist()]
                    seen = list(seen)
                    want = dense(q[b, i, h].view(1, 1, -1), keys[seen], values[seen])
                    torch.testing.assert_close(got[b, i, h], want[0, 0])
        if data.draw(st.booleans()):
            most = min(len(rows) for item in held for rows in item)
            count = data.draw(st.integers(1, most))
            kept = torch.full((batch, kv_heads, count), -1)
            for b in range(batch):
                for h in range(kv_heads):
                    n = data.draw(st.integers(1, count))
                    order = torch.randperm(len(held[b][h]))[:n].sort().values
                    kept[b, h, :n] = order
                    held[b][h] = [held[b][h][j] for j in order]
            cache.keep(kept)


def test_cache_fetches_blocks_to_where_they_stand():
    cache = KVCache(2, 20, 2, 4, dtype=F64)
    k, v = normal(2, 11, 2, 4, seed=1), normal(2, 11, 2, 4, seed=2)
    cache.append(k, v)
    blocks = torch.tensor([[[2, 0], [1, -1]], [[0, 1], [2, 2]]])
    keys, values, real = cache.fetch(blocks, 4, rotary=rope)
    for b in range(2):
        for h in range(2):
            for slot, block in enumerate(blocks[b, h].tolist()):
                for r in range(4):
                    j, at = block * 4 + r, slot * 4 + r
                    assert real[b, at, h] == (0 <= j < 11)
                    if 0 <= j < 11:
                        want = rope(k[b : b + 1, j : j + 1, h : h + 1], torch.tensor([at]))
                        torch.testing.assert_close(keys[b, at, h], want[0, 0, 0])
                        torch.testing.assert_close(values[b, at, h], v[b, j, h])
                    else:
                        assert not keys[b, at, h].any() and not values[b, at, h].any()


def test_blocks_far_behind_the_last_row_are_none():
    """However far: what they are multiplied to would not fit into an int64."""
    cache = KVCache(1, 300, 2, 4, dtype=F64)
    cache.append(normal(1, 200, 2, 4, seed=1), normal(1, 200, 2, 4, seed=2))
    query = normal(1, 1, 2, 4, seed=3)
    for far in (4, 5, 100, 2**57, 2**58, 2**58 + 1, 2**62, 2**63 - 1):
        blocks = torch.full((1, 2, 1, 1), far)
        assert not cache.attend(query, blocks=blocks, block_size=64).any()
        assert not any(x.any() for x in cache.fetch(blocks[..., 0], 64))
        some = torch.tensor([[[[2, far]]]])
        expected = cache.attend(query, blocks=some[..., :1], block_size=2**40)
        assert torch.equal(cache.attend(query, blocks=some, block_size=2**40), expected)


def test_cache_that_is_full_refuses():
    cache = KVCache(1, 4, 1, 2)
    x = torch.zeros(1, 3, 1, 2)
    cache.append(x, x)
    with pytest.raises(ValueError, match=r"key has 3 tokens, and 1 .* left"):
        cache.append(x, x)
    assert cache.longest == 3 and cache.lengths.tolist() == [[3]]


# ---- sinks and a ring ----------------------------------------------------------------------------


@settings(max_examples=12)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=7),
    st.integers(0, 4),
    st.integers(1, 6),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_streaming(counts, sinks, window_size, turn, seed):
    """One call, or step by step through a ring: what each token's cache holds, at its places."""
    tokens, rotary = sum(counts), rope if turn else None
    q, k, v = (
        normal(2, tokens, 4, 4, seed=seed),
        *(normal(2, tokens, 2, 4, seed=seed + n) for n in (1, 2)),
    )
    want = reference.streaming_attention(q, k, v, sinks, window_size, rotary or unrotated)
    options = {"sinks": sinks, "window_size": window_size, "rotary": rotary}
    got = streaming_attention(q, k, v, **options)
    torch.testing.assert_close(got, want)
    late = tokens - tokens // 3
    torch.testing.assert_close(streaming_attention(q[:, late:], k, v, **options), want[:, late:])
    cache, at = StreamingCache(2, 2, 4, dtype=F64, **options), 0
    cache.key.fill_(torch.nan)
    cache.value.fill_(torch.nan)
    for count in counts:
        new = slice(at, at + count)
        torch.testing.assert_close(cache.step(q[:, new], k[:, new], v[:, new]), want[:, new])
        at += count
        held = [j for j in range(at) if j < sinks or j >= at - window_size]
        assert cache.seen == at and cache.count == len(held)
        torch.testing.assert_close(cache.key[:, cache.positions().argsort()], k[:, held])


def test_streaming_trains():
    leaves = [normal(1, 12, 2, 4, seed=n).requires_grad_() for n in range(3)]
    options = {"sinks": 2, "window_size": 4, "rotary": rope}
    assert torch.autograd.gradcheck(lambda *x: streaming_attention(*x, **options), leaves)


# ---- LazyEviction --------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_lazy_scores(variant):
    cases = [
        (t - s, m, t) for t in (1, 7, 5000) for s in (0, 1, 6, 5000) if s <= t for m in range(9)
    ]
    last, interval = (torch.tensor([c[n] for c in cases]) for n in (0, 1))
    for (ts, mri, t), n in zip(cases, range(len(cases)), strict=True):
        got = lazy_scores(last[n], interval[n], t, variant).item()
        assert got == pytest.approx(reference.lazy_score(ts, mri, t, variant), abs=1e-6)
    # Never hit twice: the limits, and nothing that is no number.
    zero = torch.zeros(2, dtype=torch.int32)
    at_limit = lazy_scores(torch.tensor([9, 8]), zero, 9, variant)
    if variant == "paper":
        assert at_limit.tolist() == [1.0, 0.0]
    else:
        assert at_limit[0].item() == pytest.approx(2 / (1 + math.e)) and at_limit[1] == 0


@settings(max_examples=10)
@given(
    st.sampled_from([(1, 1, 1), (2, 2, 2), (1, 4, 2)]),
    st.integers(0, 20),
    st.integers(1, 5),
    st.integers(0, 6),
    st.sampled_from([0.02, 0.1, 0.3]),
    st.sampled_from(["paper", "code"]),
    st.integers(0, 2**31),
)
def test_lazy_eviction(shape, prompt, window_size, more, alpha, variant, seed):
    batch, heads, kv_heads = shape
    group, budget, steps = heads // kv_heads, window_size + more, 25
    options = {"budget": budget, "window_size": window_size, "alpha": alpha, "variant": variant}
    cache = LazyEvictionCache(
        batch, max(prompt, budget) + window_size, heads, kv_heads, 3, 2, dtype=F64, **options
    )
    q = 2 * normal(batch, steps, heads, 3, seed=seed)
    k = normal(batch, prompt + steps, kv_heads, 3, seed=seed + 1)
    v = normal(batch, prompt + steps, kv_heads, 2, seed=seed + 2)
    want = [
        [reference.LazyEviction(group, **options) for _ in range(kv_heads)] for _ in range(batch)
    ]
    cache.prefill(k[:, :prompt], v[:, :prompt])
    for b, h in ((b, h) for b in range(batch) for h in range(kv_heads)):
        want[b][h].prefill(k[b, :prompt, h], v[b, :prompt, h])
    for t in range(steps):
        j = prompt + t
        out = cache.step(q[:, t : t + 1], k[:, j : j + 1], v[:, j : j + 1])
        for b, h in ((b, h) for b in range(batch) for h in range(kv_heads)):
            mine = slice(h * group, (h + 1) * group)
            torch.testing.assert_close(
                out[b, 0, mine], want[b][h].step(q[b, t, mine], k[b, j, h], v[b, j, h])
            )
            rows = want[b][h].rows
            assert (
                cache.rows.lengths[b, h]
                == len(rows)
                <= max(budget + window_size, prompt + window_size)
            )
            torch.testing.assert_close(
                cache.rows.key[b, : len(rows), h], torch.stack([x for x, _, _ in rows])
            )
            for g in range(group):
                state = [s[g] for _, _, s in rows]
                n = h * group + g
                got = (x[b, n, : len(rows)].tolist() for x in (cache.last_hit, cache.interval))
                assert list(zip(*got, strict=True)) == state


def test_lazy_eviction_keeps_what_recurs():
    """A token asked for every 6 steps outlives many that were asked for once."""
    cache = LazyEvictionCache(1, 40, 1, 1, 4, budget=16, window_size=8, alpha=0.5, dtype=F64)
    needle = torch.tensor([30.0, 0, 0, 0], dtype=F64).view(1, 1, 1, 4)
    key = torch.tensor([0.0, 1, 0, 0], dtype=F64).view(1, 1, 1, 4)
    for t in range(200):
        query = needle if t % 6 == 0 else key * 0
        cache.step(query, needle if t == 3 else key, needle)
    assert (cache.rows.key[0, :16, 0, 0] == 30).any()


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: KVCache(1, 0, 1, 2), "capacity"),
        (lambda: KVCache(1, 4, 1, 2, dtype=torch.int32), "dtype"),
        (lambda: KVCache(1, 4, 1, 2).append(zeros(1, 2, 2, 2), zeros(1, 2, 2, 2)), "key"),
        (lambda: KVCache(1, 4, 1, 2).append(zeros(1, 2, 1, 2), zeros(1, 1, 1, 2)), "value"),
        (lambda: KVCache(1, 4, 1, 2).keep(zeros(1, 2, 2).long()), "indices"),
        (lambda: KVCache(1, 4, 1, 2).keep(zeros(1, 1, 5).long()), "indices"),
        (lambda: KVCache(1, 4, 1, 2).attend(zeros(1, 1, 1, 2), blocks=zeros(1)), "blocks"),
        (
            lambda: KVCache(1, 4, 2, 2).attend(
                zeros(1, 1, 4, 2), blocks=zeros(1, 3, 1, 1).long()
            ),
            "blocks",
        ),
        (lambda: KVCache(1, 2**31, 1, 2), r"capacity must be below 2\*\*31"),
        (lambda: KVCache(1, 4, 1, 2).keep(zeros(1, 1, 1).long(), complete=5), "complete"),
        (lambda: KVCache(1, 4, 1, 2).attend(zeros(1, 1, 1, 2), block_size="x"), "block_size"),
        (lambda: KVCache(1, 4, 1, 2).attend(zeros(1, 1, 1, 2), return_lse="x"), "return_lse"),
        (
            lambda: KVCache(1, 4, 2, 2).attend(
                zeros(1, 1, 3, 2), blocks=zeros(1, 3, 1, 1).long()
            ),
            "query must have a multiple of the heads of key, got 3 and 2",
        ),
        (
            lambda: KVCache(1, 4, 2, 2).attend(
                zeros(2, 1, 4, 2), blocks=zeros(1, 1, 1, 1).long()
            ),
            "batch size of query",
        ),
        (
            lambda: KVCache(1, 4, 1, 2).fetch(zeros(1, 1, 1).long(), 2**50),
            "block_size must give 1 blocks fewer",
        ),
        (lambda: KVCache(1, 4, 1, 2).fetch(zeros(1, 1, 1).long(), 2, rotary=5), "rotary"),
        (lambda: StreamingCache(1, 1, 2, rotary=5), "rotary must be callable"),
        (lambda: streaming_attention(*[zeros(1, 2, 1, 2)] * 3, rotary="a"), "rotary must be call"),
        (
            lambda: streaming_attention(*[zeros(1, 2, 1, 2)] * 3, rotary=unrotated, return_lse=2),
            "return_lse",
        ),
        (lambda: lazy_scores("a", zeros(1).long(), 1), "last_hit"),
        (lambda: lazy_scores(zeros(1).long(), zeros(1), 1), "interval"),
        (lambda: lazy_scores(zeros(2).long(), zeros(3).long(), 1), "interval must have the shape"),
        (lambda: lazy_scores(zeros(1).long(), zeros(1).long(), 1.5), "step"),
        (lambda: StreamingCache(1, 1, 2, window_size=0), "window_size"),
        (lambda: StreamingCache(1, 1, 2, sinks=-1), "sinks"),
        (lambda: LazyEvictionCache(1, 9, 1, 1, 2, budget=4, window_size=8), "budget"),
        (lambda: LazyEvictionCache(1, 9, 1, 1, 2, budget=8, window_size=4), "capacity"),
        (lambda: LazyEvictionCache(1, 12, 3, 2, 2, budget=8, window_size=4), "heads"),
        (lambda: LazyEvictionCache(1, 12, 1, 1, 2, budget=8, window_size=4, alpha=0.0), "alpha"),
        (lambda: LazyEvictionCache(1, 9, 1, 1, 2, budget=5, window_size=4, variant="x"), "variant"),
        (lambda: lazy_scores(zeros(1), zeros(1), 1, "new"), "variant"),
        (lambda: streaming_attention(*[zeros(1, 2, 1, 2)] * 3, window_size=0), "window_size"),
    ],
)  # fmt: skip
def test_errors(make, match):
    with pytest.raises((ValueError, TypeError), match=match):
        make()


def test_half_precision_decode():
    """A cache in half precision decodes as attention to all of it does."""
    cache = KVCache(1, 32, 1, 8, dtype=torch.bfloat16)
    q, k, v = (normal(1, 32, h, 8, seed=h, dtype=torch.bfloat16) for h in (2, 1, 1))
    cache.append(k, v)
    out = cache.attend(q[:, -1:])
    assert torch.equal(out, attnext.sliding_window_attention(q[:, -1:], k, v, None))


def test_a_refused_step_changes_nothing():
    """Neither what is kept nor how much: the same step, rightly asked for, goes on from there."""

    def tokens(count, heads=2):
        return [torch.randn(1, count, heads, 8) for _ in range(3)]

    first, second = tokens(1), tokens(1)
    for make in (
        lambda: attnext.StreamingCache(1, 2, 8, sinks=1, window_size=4),
        lambda: attnext.DuoCache(1, 50, [True, False], 8, sinks=1, window_size=4),
        lambda: attnext.LazyEvictionCache(1, 40, 2, 2, 8, budget=16, window_size=4),
    ):
        plain, tried = make(), make()
        plain.step(*first)
        tried.step(*first)
        with pytest.raises(TypeError, match="scale must be a number"):
            tried.step(*second, scale="bad")
        with pytest.raises(ValueError, match="query must"):
            tried.step(tokens(2)[0], *second[1:])
        with pytest.raises(TypeError, match=r"query must be a .*tensor"):
            tried.step(None, *second[1:])
        with pytest.raises(TypeError, match="return_lse"):
            tried.step(*second, return_lse=1)
        if hasattr(tried, "rotary"):
            tried.rotary = lambda x, positions: x[..., :4]
            with pytest.raises(ValueError, match="rotary must keep shape"):
                tried.step(*second)
            tried.rotary = None
        assert torch.equal(plain.step(*second), tried.step(*second))


@pytest.mark.parametrize("blocks", [None, torch.zeros(1, 1, 1, 1, dtype=torch.int64)], ids=str)
def test_a_cache_asks_for_a_query(blocks):
    cache = attnext.KVCache(1, 20, 2, 8)
    cache.append(*(torch.randn(1, 10, 2, 8) for _ in range(2)))
    cache.keep(torch.tensor([[[0, 5], [1, -1]]]))
    with pytest.raises(TypeError, match="query must be a floating-point tensor, got NoneType"):
        cache.attend(None, blocks=blocks)
    with pytest.raises(ValueError, match="query must be"):
        cache.attend(torch.randn(2, 4), blocks=blocks)


def test_rows_that_are_not_there_cannot_be_kept():
    cache = attnext.KVCache(1, 20, 2, 8)
    cache.append(*(torch.randn(1, 10, 2, 8) for _ in range(2)))
    for index in (10, 15, 25):
        with pytest.raises(ValueError, match="indices must be below the rows"):
            cache.keep(torch.tensor([[[0, index], [1, 2]]]))
    for index, options, match in (
        ([[-1, 3], [1, 2]], {}, "-1 only behind"),
        ([[3, -2], [1, 2]], {}, "at least -1, got -2"),
        ([[3, -1], [1, 2]], {"complete": True}, "complete"),
    ):
        with pytest.raises(ValueError, match=match):
            cache.keep(torch.tensor([index]), **options)
    assert cache.lengths.tolist() == [[10, 10]]
    cache.keep(torch.tensor([[[0, 9], [1, -1]]]))
    assert cache.lengths.tolist() == [[2, 1]]


def test_a_cache_kept_in_inference_mode_goes_on():
    cache = attnext.KVCache(1, 20, 2, 8)
    tokens = [torch.randn(1, 5, 2, 8) for _ in range(2)]
    cache.append(*tokens)
    with torch.inference_mode():
        cache.keep(torch.tensor([[[0, 1], [1, -1]]]))
    cache.append(*tokens)
    assert cache.longest == 7 and cache.lengths.tolist() == [[7, 6]]


def test_hits_are_those_of_exact_logits_under_autocast():
    def run(autocast):
        cache = LazyEvictionCache(
            1, 600, 1, 1, 64, budget=128, window_size=8, alpha=5e-4, dtype=torch.bfloat16
        )
        keys = normal(1, 400, 1, 64, seed=3, dtype=torch.bfloat16)
        cache.prefill(keys, keys)
        for i in range(6):
            x, y = (normal(1, 1, 1, 64, seed=s + i, dtype=torch.bfloat16) for s in (10, 20))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                cache.step(3 * x, y, y)
        return cache.last_hit, cache.interval

    for one, other in zip(run(False), run(True), strict=True):
        assert torch.equal(one, other)

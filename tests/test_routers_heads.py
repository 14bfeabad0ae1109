# SPDX-License-Identifier: Apache-2.0
"""Routers that tell heads and layers apart: DuoAttention, retrieval heads, MInference, Flux."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attnext
from attnext import reference_cache as reference
from attnext.reference_routed import listed_keys
from attnext.routers.duo import (
    DuoCache,
    choose_full_heads,
    duo_attention,
    duo_mix,
    retrieval_scores,
    top_keys,
)
from attnext.routers.flux import (
    FluxAttention,
    LayerRouter,
    gumbel_temperature,
    sparsity_loss,
    straight_through,
)
from attnext.routers.minference import (
    AShape,
    BlockSparse,
    VerticalSlash,
    minference_attention,
    minference_plan,
)

F64 = torch.float64


def normal(*shape, seed=0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def full(q, k, v):
    return attnext.sliding_window_attention(q, k, v, None)


def streaming(q, k, v, sinks=3, window_size=7):
    return attnext.sliding_window_attention(q, k, v, window_size, sinks=sinks)


# ---- DuoAttention --------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [[True, False], [False, True], [True, True], [False, False]])
@pytest.mark.parametrize("late", [0, 33])
def test_duo(chosen, late):
    q, k, v = normal(2, 70, 4, 4, seed=1), normal(2, 70, 2, 4, seed=2), normal(2, 70, 2, 3, seed=3)
    ways = [full(q, k, v), streaming(q, k, v)]
    want = torch.cat([ways[not f][:, :, 2 * n : 2 * n + 2] for n, f in enumerate(chosen)], 2)
    options = {"sinks": 3, "window_size": 7}
    got = duo_attention(q[:, late:], k, v, chosen, **options)
    torch.testing.assert_close(got, want[:, late:])
    cache = DuoCache(2, 70, chosen, 4, 3, dtype=F64, **options)
    steps = [slice(0, 30), slice(30, 31), slice(31, 33), *(slice(n, n + 1) for n in range(33, 70))]
    outs = [cache.step(q[:, s], k[:, s], v[:, s]) for s in steps]
    torch.testing.assert_close(torch.cat(outs, 1), want)


def test_duo_mix():
    """The gate's gradient is dO (full - streaming), clamped; a teacher takes none."""
    q, k, v = (normal(1, 20, h, 4, seed=h).requires_grad_() for h in (4, 2, 2))
    v = normal(1, 20, 2, 4, seed=9).requires_grad_()
    both = full(q, k, v), streaming(q, k, v)
    cotangent = normal(1, 20, 4, 4, seed=5)
    options = {"sinks": 3, "window_size": 7}
    for value in (-0.5, 0.0, 0.3, 1.0, 1.5):
        gate = torch.tensor([value, 0.5], dtype=F64, requires_grad=True)
        alpha = gate.detach().clamp(0, 1).repeat_interleave(2)[:, None]
        mixed = duo_mix(q, k, v, gate, **options)
        want = alpha * both[0] + (1 - alpha) * both[1]
        torch.testing.assert_close(mixed, want)
        grads = torch.autograd.grad(mixed, (gate, q, k, v), cotangent)
        each = (cotangent * (both[0] - both[1]).detach()).sum((0, 1, 3)).unflatten(0, (2, 2)).sum(1)
        inside = torch.tensor([0 <= value <= 1, True])
        torch.testing.assert_close(grads[0], torch.where(inside, each, 0))
        other = torch.autograd.grad(want, (q, k, v), cotangent, retain_graph=True)
        for x, y in zip(grads[1:], other, strict=True):
            torch.testing.assert_close(x, y)
    teacher = normal(1, 20, 4, 4, seed=6).requires_grad_()
    mixed = duo_mix(q, k, v, gate, teacher=teacher, **options)
    torch.testing.assert_close(mixed, alpha * teacher + (1 - alpha) * both[1])
    grads = torch.autograd.grad(mixed, (q, teacher), cotangent, allow_unused=True)
    assert grads[1] is None
    (alone,) = torch.autograd.grad(both[1], q, cotangent * (1 - alpha))
    torch.testing.assert_close(grads[0], alone)


def test_choose_full_heads():
    gate = torch.tensor([[1.0, 0.2, 1.0], [0.0, 1.0, 1.5]])
    assert choose_full_heads(gate, 0.5).tolist() == [[True, False, True], [False, True, False]]
    assert choose_full_heads(gate, 0.0).all() and not choose_full_heads(gate, 1.0).any()
    assert choose_full_heads(torch.ones(8), 0.25).sum() == 6  # a quantile would take all or none


def test_retrieval_heads_are_found():
    """One head copies a needle, one looks elsewhere: keys that point at the next token to say."""
    prompt = torch.tensor([1, 2, 3, 7, 8, 7, 9, 2, 1, 4])
    needle, said = (3, 7), torch.tensor([7, 8, 7, 9])
    keys = torch.eye(10, dtype=F64).repeat(1, 1, 1).view(1, 10, 1, 10)
    queries = torch.zeros(1, 4, 2, 10, dtype=F64)
    for step, j in enumerate((3, 4, 5, 6)):
        queries[0, step, 0, j] = 5  # copies
        queries[0, step, 1, 3] = 5  # stays at the needle's first token
    keys = torch.cat([keys, torch.zeros(1, 4, 1, 10, dtype=F64)], 1)
    attended = top_keys(queries, keys)[0]
    assert attended.tolist() == [[3, 3], [4, 3], [5, 3], [6, 3]]
    # The second head says token 7 twice from one place: that is one token of four.
    assert retrieval_scores(attended, said, prompt, needle).tolist() == [1.0, 0.25]
    assert retrieval_scores(attended[:0], said[:0], prompt, needle).tolist() == [0.0, 0.0]
    q, k = normal(2, 9, 4, 3, seed=1), normal(2, 20, 2, 3, seed=2)
    want = reference.weights_of(q, k).argmax(-1).transpose(1, 2)
    assert torch.equal(top_keys(q, k).long(), want)


# ---- MInference ----------------------------------------------------------------------------------


def keys_of(plan, batch, heads):
    """Whether each query lists each key."""
    return listed_keys(plan, batch, heads)[0]


@settings(max_examples=10)
@given(
    st.one_of(st.integers(1, 150), st.integers(110, 150)),
    st.integers(0, 150),
    st.sampled_from([1, 16, 64]),
    st.integers(1, 60),
    st.sampled_from([1, 60, 105, 115]),
    st.sampled_from([1, 9, 40, 70]),
    st.integers(0, 2**31),
)
def test_vertical_slash(keys, queries, query_block, columns, diagonals, last, seed):
    queries = min(queries, keys)
    q, k = normal(1, queries, 2, 3, seed=seed), normal(1, keys, 1, 3, seed=seed + 1)
    plan = minference_plan(q, k, VerticalSlash(columns, diagonals, last), query_block=query_block)
    want = reference.vertical_slash_keys(q, k, columns, diagonals, last, query_block)
    listed = keys_of(plan, 1, 2)
    for h in range(2):
        for i in range(queries):
            assert set(listed[0, h, i].nonzero().flatten().tolist()) == want[0][h][i // query_block]


def test_minference_patterns_beside_each_other():
    """A head's pattern does not depend on the others'; lengths that divide get no block more."""
    q, k, v = (
        normal(2, 128, 4, 8, seed=1),
        normal(2, 128, 2, 8, seed=2),
        normal(2, 128, 2, 8, seed=3),
    )
    patterns = [AShape(4, 20), BlockSparse(2, 16), VerticalSlash(30, 50), BlockSparse(99, 32)]
    listed = keys_of(minference_plan(q, k, patterns, query_block=32), 2, 4)
    i, j = torch.arange(128)[:, None], torch.arange(128)
    block = i // 32 * 32
    assert torch.equal(listed[0, 0], (j < 4) | ((j > block - 20) & (j < block + 32)))
    assert (listed[:, 1].sum(-1) == 32).all()
    means = q[:, :, 1].unflatten(1, (4, 32)).mean(2), k[:, :, 0].unflatten(1, (8, 16)).mean(2)
    scores = torch.einsum("bnd,bmd->bnm", *means)
    scores.masked_fill_(torch.arange(8) >= 2 * torch.arange(1, 5)[:, None], -math.inf)
    best = torch.zeros(2, 4, 8).scatter(-1, scores.topk(2).indices, 1.0).bool()
    assert torch.equal(listed[:, 1], best.repeat_interleave(32, 1).repeat_interleave(16, 2))
    assert torch.equal(listed[0, 3] & (j <= i), j <= i)
    alone = keys_of(minference_plan(q[:, :, 2:3], k[:, :, 1:], patterns[2], query_block=32), 2, 1)
    assert torch.equal(listed[:, 2:3], alone)
    out = minference_attention(q, k, v, patterns, query_block=32)
    torch.testing.assert_close(out[:, :, 3:], full(q, k, v)[:, :, 3:])


# ---- Flux ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 4, 7, 8, 9, 30])
def test_router_pools_each_token_once(tokens):
    router = LayerRouter(4, pool_tokens=4)
    x = normal(2, tokens, 3, 4, dtype=torch.float32)
    ends = [n for n in range(tokens) if n < 4 or n >= tokens - 4]
    torch.testing.assert_close(router.pool(x), x[:, ends].mean((1, 2)))


def test_router_begins_full_and_learns():
    torch.manual_seed(0)
    router = LayerRouter(8, pool_tokens=10)
    logits = router(normal(5, 40, 2, 8, dtype=torch.float32))
    assert (logits[:, 0] - logits[:, 1] > 3).all()
    layer = FluxAttention(router, full, streaming)
    q, k, v = (normal(2, 40, 2, 8, seed=n, dtype=torch.float32) for n in range(3))
    out = layer(q, k, v)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in router.parameters())
    with pytest.raises(ValueError, match="decode"):
        layer(q, k, v, decode=True)


def test_straight_through_is_a_draw_with_the_gradient_of_a_softmax():
    generator = torch.Generator().manual_seed(1)
    logits = torch.tensor([1.0, 0.0]).expand(20000, 2)
    drawn = straight_through(logits, 1.5, generator)
    assert torch.equal(drawn.sum(-1), torch.ones(20000)) and set(drawn.unique().tolist()) == {0, 1}
    share = drawn[:, 0].mean().item()
    assert abs(share - 1 / (1 + math.exp(-1))) < 0.015  # four deviations
    logits = normal(50, 2).requires_grad_()
    generator.manual_seed(3)
    hard = straight_through(logits, 0.7, generator)
    generator.manual_seed(3)
    noise = -torch.log(-torch.log(torch.rand(50, 2, generator=generator))).double()
    soft = torch.softmax((logits + noise) / 0.7, -1)
    assert torch.equal(hard, (soft == soft.amax(-1, keepdim=True)).double())
    cotangent = normal(50, 2, seed=4)
    got, want = (torch.autograd.grad(x, logits, cotangent)[0] for x in (hard, soft))
    torch.testing.assert_close(got, want)


def test_flux_inference_chooses_once_per_segment():
    """The prefill's arg-max, per batch item; decoding does not ask again."""
    asked = []

    class Router(LayerRouter):
        def forward(self, query):
            asked.append(query.shape[1])
            return query[:, 0, 0, :2]

    layer = FluxAttention(Router(4), full, streaming).eval()
    q, k, v = (normal(3, 30, 1, 4, seed=n) for n in range(3))
    q[:, 0, 0, :2] = torch.tensor([[1.0, 0], [0, 1], [0, 0]])
    out = layer(q, k, v)
    assert layer.choice == (True, False, True)
    want = torch.stack([full(q, k, v)[0], streaming(q, k, v)[1], full(q, k, v)[2]])
    torch.testing.assert_close(out, want)
    q[:, -1, 0, :2] = torch.tensor([[0.0, 1], [1, 0], [0, 1]])
    for keys in (20, 30):
        step = layer(q[:, keys - 1 : keys], k[:, :keys], v[:, :keys], decode=True)
        ways = [f(q[:, keys - 1 : keys], k[:, :keys], v[:, :keys]) for f in (full, streaming)]
        torch.testing.assert_close(step, torch.stack([ways[0][0], ways[1][1], ways[0][2]]))
    assert asked == [30]
    with pytest.raises(ValueError, match="decode"):
        layer(q[:1, -1:], k[:1], v[:1], decode=True)
    with pytest.raises(ValueError, match="decode"):
        FluxAttention(Router(4), full, streaming).eval()(q, k, v, decode=True)


def test_flux_schedule_and_loss():
    assert gumbel_temperature(0, 300) == 1.5 and gumbel_temperature(180, 300) == 1.0
    assert gumbel_temperature(299, 300) == 1.0
    assert gumbel_temperature(90, 300) == pytest.approx(1.25)
    sparsity = torch.tensor(0.7, requires_grad=True)
    linear, square = (torch.tensor(x, requires_grad=True) for x in (0.5, 2.0))
    loss = sparsity_loss(sparsity, 0.45, linear, square)
    assert loss.item() == pytest.approx(0.5 * 0.25 + 2 * 0.0625)
    grads = torch.autograd.grad(loss, (sparsity, linear, square))
    assert [g.item() for g in grads] == pytest.approx([0.5 + 2 * 2 * 0.25, -0.25, -0.0625])


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda x: duo_attention(x, x, x, [True]), "full_heads"),
        (lambda x: duo_attention(x, x, x, [1, 0]), "full_heads"),
        (lambda x: duo_attention(x, x, x, [True, False], window_size=0), "window_size"),
        (lambda x: duo_mix(x, x, x, torch.ones(3)), "gate"),
        (lambda x: duo_mix(x, x, x, torch.ones(2), teacher=x[:, 1:]), "teacher"),
        (lambda x: choose_full_heads(torch.ones(2), 1.5), "sparsity"),
        (lambda x: DuoCache(1, 9, [], 4), "full_heads"),
        (lambda x: DuoCache(1, 9, [True], 4).step(x, x, x), "key"),
        (lambda x: retrieval_scores(*[torch.ones(1, 2).long()] * 3, (0, 1)), "output"),
        (
            lambda x: retrieval_scores(
                torch.ones(1, 2).long(), torch.ones(1).long(), torch.ones(3).long(), (2, 5)
            ),
            "needle",
        ),
        (lambda x: minference_plan(x, x, [AShape()]), "patterns"),
        (lambda x: minference_plan(x, x, "a_shape"), "patterns"),
        (lambda x: minference_plan(x, x, query_block=0), "query_block"),
        (lambda x: VerticalSlash(0), "columns"),
        (lambda x: AShape(window_size=0), "window_size"),
        (lambda x: LayerRouter(4).pool(x[:, :0]), "query"),
        (lambda x: LayerRouter(4, 0), "pool_tokens"),
        (lambda x: straight_through(x, 0.0), "temperature"),
        (lambda x: straight_through(x, "a"), "temperature"),
        (lambda x: straight_through(5, 1.0), "logits"),
        (lambda x: straight_through(x[..., :0], 1.0), "logits"),
        (lambda x: straight_through(x, 1.0, 5), "generator"),
        (lambda x: gumbel_temperature(-1, 5), "step"),
        (lambda x: gumbel_temperature(0, 5, "a"), "start"),
        (lambda x: gumbel_temperature(0, 5, 1.5, None), "end"),
        (lambda x: gumbel_temperature(0, 5, math.nan), "start"),
        (lambda x: sparsity_loss(1, 0.5, x, x), "sparsity"),
        (lambda x: sparsity_loss(x, "a", x, x), "target"),
        (lambda x: sparsity_loss(x, 0.5, 1.0, x), "linear"),
        (lambda x: sparsity_loss(x, 0.5, x, torch.ones(3)), "square must broadcast"),
        (lambda x: LayerRouter(4)(x[..., :3]), "query must have head_dim 4, got 3"),
        (lambda x: FluxAttention(1, full, streaming), "router"),
        (lambda x: FluxAttention(LayerRouter(4), 2, streaming), "full"),
        (lambda x: FluxAttention(LayerRouter(4), full, 3), "sparse"),
        (lambda x: FluxAttention(LayerRouter(4), full, full)(x, x, x, decode=5), "decode must be"),
        (lambda x: FluxAttention(LayerRouter(4), full, full).eval()("x", x, x), "query"),
        (lambda x: FluxAttention(LayerRouter(4), full, full)(x, x, "x"), "value"),
        *(
            (
                lambda x, needle=needle: retrieval_scores(
                    torch.ones(1, 2).long(), torch.ones(1).long(), torch.ones(3).long(), needle
                ),
                "needle",
            )
            for needle in (("a", 3), (False, True), (0.5, 2.5), (torch.tensor(0), torch.tensor(1)))
        ),
        (lambda x: DuoCache(1, "x", [False], 4), "capacity"),
        (lambda x: DuoCache(1, 2**60, [True], 4), "capacity must be below"),
        (lambda x: DuoCache(1, 9, [True], 4, sinks="a"), "sinks"),
        (lambda x: DuoCache(1, 9, [True], 4, window_size=-3), "window_size"),
        (lambda x: duo_attention(x, x, x, [True, False], return_lse=3), "return_lse"),
        *(
            (lambda x, scale=scale: minference_plan(x, x, scale=scale), "scale")
            for scale in (math.nan, True, "a", torch.tensor(1.0))
        ),
    ],
)
def test_errors(call, match):
    with pytest.raises((ValueError, TypeError), match=match):
        call(torch.zeros(1, 9, 2, 4))

# SPDX-License-Identifier: Apache-2.0
"""The kernels against the specification: output, lse and every gradient, on every ISA level."""

import pytest
import torch
from hypothesis import given, settings
from strategies import DTYPES, HEAD_DIMS, Problem, lay_out, problems

import attnext
from attnext import reference
from attnext.testing import assert_within_budget, available_isas, evaluate, isa, threads

ISAS = available_isas()


def run(problem: Problem) -> dict[str, torch.Tensor]:
    return evaluate(
        getattr(attnext, problem.op), problem.tensors, problem.options, problem.cotangents
    )


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        a, b = (x[name].contiguous().flatten().view(torch.uint8) for x in (one, other))
        assert torch.equal(a, b), f"{name} differs"


def check(problem: Problem) -> dict[str, float]:
    """Within the budget on every ISA level, and the same to the last bit for any thread count."""
    results = []
    for name in ISAS:
        with isa(name):
            with threads(1):
                results.append(run(problem))
            with threads(2):
                assert_same_bits(results[-1], run(problem))
    with threads(1):  # small products: a team of threads costs more than it saves
        return assert_within_budget(
            results,
            getattr(reference, problem.op),
            problem.tensors,
            problem.options,
            problem.cotangents,
        )


@given(problems(ops=("neighborhood_attention",)))
def test_neighborhood_attention(problem):
    check(problem)


@given(problems(ops=("sliding_window_attention",)))
def test_sliding_window_attention(problem):
    check(problem)


@given(problems(ops=("window_attention",)))
def test_window_attention(problem):
    check(problem)


@settings(max_examples=20)
@given(problems(most=6))
def test_more_tokens_than_a_tile(problem):
    check(problem)


@pytest.mark.heavy
@settings(settings.get_profile("heavy"))
@given(problems())
def test_many_problems(problem):
    check(problem)


@pytest.mark.heavy
@settings(settings.get_profile("heavy"), max_examples=60)
@given(problems(most=8))
def test_many_large_problems(problem):
    check(problem)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def plain_problem(op, extents, heads=2, kv_heads=None, dim=16, dim_v=None, batch=1,
                  dtype=torch.float32, aux=(), **options):  # fmt: skip
    """A problem without surprises, for what Hypothesis would rarely draw."""
    kv_heads, dim_v = kv_heads or heads, dim_v or dim
    tensors = {
        "query": normal(batch, *extents, heads, dim, dtype=dtype, seed=1),
        "key": normal(batch, *extents, kv_heads, dim, dtype=dtype, seed=2),
        "value": normal(batch, *extents, kv_heads, dim_v, dtype=dtype, seed=3),
        **dict(aux),
    }
    cotangents = (
        normal(batch, *extents, heads, dim_v, dtype=dtype, seed=4),
        normal(batch, *extents, heads, seed=5),
    )
    return Problem(op, tensors, options, cotangents)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [*HEAD_DIMS, 3, 24, 48, 80, 96, 128, 160, 192, 256, 257])
def test_every_head_dim(dim, dtype):
    check(plain_problem("neighborhood_attention", (6, 5), dim=dim, dtype=dtype, kernel_size=3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(16, 1), (1, 16), (64, 128), (192, 128), (30, 53)], ids=str)
def test_value_head_dim_differs(dims, dtype):
    dim, dim_v = dims
    problem = plain_problem(
        "sliding_window_attention", (40,), dim=dim, dim_v=dim_v, dtype=dtype, window_size=9
    )
    check(problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"op": "sliding_window_attention", "extents": (700,), "window_size": 130},
        {"op": "sliding_window_attention", "extents": (500,), "window_size": None, "sinks": 3},
        {"op": "sliding_window_attention", "extents": (600,), "window_size": (70, 300),
         "is_causal": False},
        {"op": "neighborhood_attention", "extents": (300,), "kernel_size": 121,
         "aux": {"bias": normal(2, 241)}.items()},
        {"op": "neighborhood_attention", "extents": (24, 25), "kernel_size": (7, 13)},
        {"op": "neighborhood_attention", "extents": (26, 22), "kernel_size": 5, "dilation": (4, 3)},
        {"op": "neighborhood_attention", "extents": (5, 9, 11), "kernel_size": (5, 3, 7),
         "is_causal": (True, False, False)},
        {"op": "window_attention", "extents": (24, 30), "window_size": 8, "shift": 4},
        {"op": "window_attention", "extents": (24, 24), "window_size": 8, "key_window_size": 12},
    ],
    ids=lambda options: f"{options['op']}{options['extents']}",
)  # fmt: skip
def test_longer_than_a_block(options, dtype):
    """Sizes at which tiles are full, keys come in several blocks, and work is shared."""
    check(plain_problem(**options, heads=2, kv_heads=1, dim=24, batch=2, dtype=dtype))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", ISAS)
def test_thread_count_does_not_change_a_bit(name, dtype):
    """With every reduction over queries at work: bias, slopes, sinks, scale, shared heads."""
    extents, heads = (33, 29), 4
    aux = {
        "bias": normal(heads, 13, 13, seed=6),
        "alibi_slopes": normal(heads, seed=7).abs() / 8,
        "sink_logits": normal(heads, seed=8),
        "scale": normal(heads, seed=9),
        "additional_keys": normal(2, 5, 2, 16, dtype=dtype, seed=10),
        "additional_values": normal(2, 5, 2, 16, dtype=dtype, seed=11),
    }
    problem = plain_problem(
        "neighborhood_attention", extents, heads=heads, kv_heads=2, batch=2, dtype=dtype, aux=aux,
        kernel_size=7,
    )  # fmt: skip
    with isa(name):
        with threads(1):
            expected = run(problem)
        for count in (2, 3, 5):
            with threads(count):
                for _ in range(3):
                    assert_same_bits(expected, run(problem))


def test_budget_notices_a_lost_digit():
    """The yardstick itself: results in less than the stated precision do not pass."""
    problem = plain_problem("neighborhood_attention", (9, 9), kernel_size=5)
    good = run(problem)
    args = (reference.neighborhood_attention, problem.tensors, problem.options, problem.cotangents)
    assert_within_budget(good, *args)
    for name in good:
        for spoil in (
            lambda x: x * (1 + 2**-19),
            lambda x: torch.where(torch.arange(x.numel()).view(x.shape) == 7, x + 1e-4, x),
        ):
            with pytest.raises(AssertionError, match=f"{name} .* exceeds the budget"):
                assert_within_budget({**good, name: spoil(good[name])}, *args)
    for value in (torch.nan, torch.inf):
        spoiled = good["out"].clone()
        spoiled[0, 3, 3, 0, 0] = value
        with pytest.raises(AssertionError, match="out is not finite"):
            assert_within_budget({**good, "out": spoiled}, *args)


def test_strided_inputs_are_read_in_place():
    """[B, H, N, D] as a transposed view, a fused qkv projection, and rows of padding between."""
    qkv = normal(2, 50, 3, 4, 32)
    query, key, value = qkv.unbind(2)
    expected = attnext.sliding_window_attention(
        *(x.contiguous() for x in (query, key, value)), 11, return_lse=True
    )
    for views in (
        (query, key, value),
        [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)],
        [lay_out(x, "cut out") for x in (query, key, value)],
    ):
        assert not any(x.is_contiguous() for x in views)
        got = attnext.sliding_window_attention(*views, 11, return_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_gradient_that_only_some_inputs_need():
    """Each subset of inputs alone gets the gradient it gets among all."""
    problem = plain_problem(
        "neighborhood_attention", (7, 8), kernel_size=3, aux={"bias": normal(2, 5, 5, seed=6)}
    )
    everything = run(problem)
    for name in problem.tensors:
        leaf = problem.tensors[name].clone().requires_grad_()
        out, lse = attnext.neighborhood_attention(
            **{**problem.tensors, name: leaf}, **problem.options, return_lse=True
        )
        (grad,) = torch.autograd.grad((out, lse), leaf, problem.cotangents)
        assert torch.equal(grad, everything[f"grad_{name}"])


@pytest.mark.parametrize("level", available_isas())
@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, 1e6), (torch.bfloat16, 1e6), (torch.float16, 6e4), (torch.float64, 1e14)],
    ids=str,
)
def test_logits_that_are_rounded_by_more_than_weights_span(dtype, size, level):
    """At 1e10 neighbours in float32 are 1024 apart: the highest logit has its weight all the same,
    one key alone or equal ones together, and what leaves is finite."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 70, 2, 8, generator=generator).to(dtype) for _ in range(3))
    q, k = (q / q.abs().amax(-1, True) * size), (k / k.abs().amax(-1, True) * size)
    with isa(level):
        alone, lse = attnext.sliding_window_attention(q, q, v, 1, return_lse=True)
        equal = attnext.sliding_window_attention(q, q[:, :1].expand_as(q), v, 4)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        one_hot = attnext.sliding_window_attention(*leaves, 9)
        one_hot.sum().backward()
    exact = torch.einsum("bihd,bihd->bih", q.double(), q.double()) * 8**-0.5
    torch.testing.assert_close(alone, v, rtol=0, atol=0)
    torch.testing.assert_close(lse.double(), exact, rtol=1e-6, atol=0)
    mean = torch.stack([v[:, i : i + 67] for i in range(4)]).double().mean(0)
    torch.testing.assert_close(equal[:, 3:].double(), mean, rtol=0, atol=8 * torch.finfo(dtype).eps)
    logits = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) * 8**-0.5
    i = torch.arange(70)
    logits = logits.masked_fill((i > i[:, None]) | (i <= i[:, None] - 9), -torch.inf)
    chosen = v[:, logits.argmax(-1)[0, 0]][:, :, 0], v[:, logits.argmax(-1)[0, 1]][:, :, 1]
    torch.testing.assert_close(one_hot.detach(), torch.stack(chosen, 2), rtol=0, atol=0)
    assert all(x.grad.isfinite().all() for x in leaves)


def test_only_one_of_output_and_lse_is_differentiated():
    problem = plain_problem("sliding_window_attention", (30,), window_size=7)
    for keep in (0, 1):
        cotangents = tuple(x * (i == keep) for i, x in enumerate(problem.cotangents))
        leaves = [problem.tensors[n].clone().requires_grad_() for n in ("query", "key", "value")]
        results = attnext.sliding_window_attention(*leaves, 7, return_lse=True)
        inputs = leaves if keep == 0 else leaves[:2]
        got = torch.autograd.grad(results[keep], inputs, problem.cotangents[keep])
        expected = evaluate(
            attnext.sliding_window_attention, problem.tensors, problem.options, cotangents
        )
        for name, grad in zip(("query", "key", "value"), got, strict=False):
            torch.testing.assert_close(grad, expected[f"grad_{name}"])


def test_natten_names():
    """na1d, na2d and na3d take NATTEN's arguments in NATTEN's order."""
    for function, extents in (
        (attnext.na1d, (20,)),
        (attnext.na2d, (6, 7)),
        (attnext.na3d, (4, 5, 3)),
    ):
        query, key, value = (normal(1, *extents, 2, 8, seed=i) for i in range(3))
        extra = [normal(1, 2, 2, 8, seed=i) for i in (3, 4)]
        got = function(query, key, value, 3, 2, 1, True, 0.3, *extra, True)
        expected = reference.na1d(query, key, value, 3, 2, 1, True, 0.3, *extra, True)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)
        more = {
            "softcap": 2.0, "alibi_slopes": normal(2, seed=5), "sink_logits": normal(2, seed=6),
            "bias": normal(2, *[5] * len(extents), seed=7),
        }  # fmt: skip
        got = function(query, key, value, 3, **more)
        same = attnext.neighborhood_attention(query, key, value, 3, **more)
        assert torch.equal(got, same) and not torch.equal(got, function(query, key, value, 3))


def test_sides_of_one_axis():
    query, key, value = (normal(1, 20, 2, 8, seed=i) for i in range(3))
    one = attnext.na1d(query, key, value, (2, 1))
    assert torch.equal(one, attnext.na1d(query, key, value, ((2, 1),)))
    heads = attnext.neighborhood_attention(query, key, value, [(2, 1), 4])
    assert torch.equal(heads[:, :, :1], one[:, :, :1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dilation", [1, 3])
def test_heads_that_take_a_tile_together(dilation, dtype):
    """The walk is worked out once for them: to the bit what each gives alone, NaN or not."""
    query = normal(2, 40, 41, 6, 20, dtype=dtype, seed=1)
    key, value = (normal(2, 40, 41, 3, 20, dtype=dtype, seed=i) for i in (2, 3))
    key[1, 17, 20, 1] = torch.nan
    value[0, 30, 7, 0, 4] = torch.inf
    bias = normal(6, 9, 9, seed=4)
    options = {"kernel_size": 5, "dilation": dilation, "return_lse": True}
    for name in ISAS:
        with isa(name), threads(1):
            got = attnext.neighborhood_attention(query, key, value, bias=bias, **options)
            for head in range(6):
                one, kv = slice(head, head + 1), slice(head // 2, head // 2 + 1)
                alone = attnext.neighborhood_attention(
                    query[..., one, :], key[..., kv, :], value[..., kv, :], bias=bias[one],
                    **options,
                )  # fmt: skip
                assert_same_bits(
                    {"out": got[0][..., one, :], "lse": got[1][..., one]},
                    {"out": alone[0], "lse": alone[1]},
                )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"sinks": 3}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("queries", [1, 3, 5])
@pytest.mark.parametrize("window", [None, 700])
def test_heads_of_few_queries_share_a_tile(window, queries, options, dtype):
    """Decoding with shared keys: what each head gives on its own, and NaN stays where it is."""
    sinks = normal(6, seed=8)
    query = normal(2, queries, 6, 20, dtype=dtype, seed=1)
    key, value = (normal(2, 1500, 2, 20, dtype=dtype, seed=i) for i in (2, 3))
    query[0, queries - 1, 4, 7] = torch.nan
    value[1, 1400, 1, 3] = torch.inf
    scale = normal(6, seed=9)

    def attend(heads, tensors):
        return attnext.sliding_window_attention(
            *tensors, window, sink_logits=sinks[heads], scale=scale[heads], return_lse=True,
            **options,
        )  # fmt: skip

    for name in ISAS:
        with isa(name), threads(1):
            together = attend(slice(0, 6), (query, key, value))
        with isa(name), threads(3):
            assert_same_bits(
                dict(enumerate(together)), dict(enumerate(attend(slice(0, 6), (query, key, value))))
            )
        for head in range(6):
            one, shared = slice(head, head + 1), slice(head // 3, head // 3 + 1)
            tensors = query[:, :, one], key[:, :, shared], value[:, :, shared]
            with isa(name), threads(1):
                alone = attend(one, tensors)
            for got, expected in zip(together, alone, strict=True):
                tolerance = (
                    1e-12 if dtype == torch.float64 else 1e-5 if dtype == torch.float32 else 2e-2
                )
                torch.testing.assert_close(
                    got[:, :, one], expected, atol=tolerance, rtol=tolerance, equal_nan=True
                )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"op": "sliding_window_attention", "extents": (700,), "window_size": 130},
        {"op": "sliding_window_attention", "extents": (700,), "window_size": 20, "sinks": 3},
        {"op": "sliding_window_attention", "extents": (400,), "window_size": None},
        {"op": "neighborhood_attention", "extents": (33, 34), "kernel_size": (7, 13)},
        {"op": "neighborhood_attention", "extents": (36, 35), "kernel_size": 5, "dilation": (3, 2)},
        {"op": "neighborhood_attention", "extents": (9, 12, 15), "kernel_size": (5, 3, 7),
         "boundary": "zero_pad"},
        {"op": "window_attention", "extents": (24, 30), "window_size": 8, "shift": 4},
    ],
    ids=lambda options: f"{options['op']}{options['extents']}",
)  # fmt: skip
@pytest.mark.parametrize("kv_heads", [8, 4])
def test_where_rows_lie_changes_no_bit(options, kv_heads, dtype):
    """Heads side by side, whose rows collide in a cache and may be read from a copy, give what
    heads apart from each other give."""
    side_by_side = plain_problem(**options, heads=8, kv_heads=kv_heads, dim=16, dim_v=8,
                                 batch=2, dtype=dtype)  # fmt: skip
    apart = {
        name: x.movedim(-2, 1).contiguous().movedim(1, -2)
        for name, x in side_by_side.tensors.items()
    }
    other = Problem(side_by_side.op, apart, side_by_side.options, side_by_side.cotangents)
    for name in ISAS:
        with isa(name):
            assert_same_bits(run(side_by_side), run(other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("op", "queries", "keys", "options"),
    [
        ("sliding_window_attention", (300,), (300,), {"window_size": 90}),
        ("sliding_window_attention", (1,), (2500,), {"window_size": None}),
        ("neighborhood_attention", (21, 22), (21, 22), {"kernel_size": 5}),
        ("neighborhood_attention", (30, 33), (30, 33), {"kernel_size": 3, "dilation": 2}),
    ],
    ids=str,
)
def test_other_batch_items_change_no_bit(op, queries, keys, options, dtype):
    """Neither what they hold nor how many there are."""
    query = normal(5, *queries, 4, 24, dtype=dtype, seed=1)
    key, value = (normal(5, *keys, 2, 24, dtype=dtype, seed=i) for i in (2, 3))
    grad = normal(5, *queries, 4, 24, dtype=dtype, seed=4)

    def first_of(count):
        leaves = [x[:count].clone().requires_grad_() for x in (query, key, value)]
        out, lse = getattr(attnext, op)(*leaves, **options, return_lse=True)
        gradients = torch.autograd.grad(out, leaves, grad[:count])
        return {str(i): x[:1] for i, x in enumerate((out, lse, *gradients))}

    for name in ISAS:
        with isa(name):
            alone = first_of(1)
            for count in (2, 5):
                assert_same_bits(alone, first_of(count))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("window", "dim"), [(300, 16), (331, 24), (257, 40)])
def test_what_other_tiles_read_changes_no_bit(window, dim, kv_heads, dtype):
    """What is made of keys once for all tiles that read them is what a tile makes for itself: the
    last queries alone, whose keys nobody else reads, get the rows that all together get."""
    few = 256  # whole tiles, and slabs of them
    query = normal(1, 1024, 4, dim, dtype=dtype, seed=1)
    key, value = (normal(1, 1024, kv_heads, dim, dtype=dtype, seed=i) for i in (2, 3))
    key[0, 300, 0] = torch.nan  # which they do not attend
    value[0, 900, 1, 3] = torch.nan
    grad = normal(1, 1024, 4, dim, dtype=dtype, seed=4)

    def last_rows(queries):
        q = query[:, -queries:].clone().requires_grad_()
        out, lse = attnext.sliding_window_attention(q, key, value, window, return_lse=True)
        (dq,) = torch.autograd.grad(out, q, grad[:, -queries:])
        return {"out": out[:, -few:], "lse": lse[:, -few:], "grad_query": dq[:, -few:]}

    for name in ISAS:
        with isa(name), threads(1):
            assert_same_bits(last_rows(1024), last_rows(few))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_reaches_no_bias_that_nobody_reads(dtype):
    """Entries of keys after the query, under a causal rule: lanes without a query have no mask."""
    problem = plain_problem(
        "neighborhood_attention", (5,), dtype=dtype, kernel_size=3, is_causal=True,
        aux={"bias": normal(2, 5)}.items(),
    )  # fmt: skip
    problem.tensors["key"][0, 2] = torch.nan
    for name in ISAS:
        with isa(name):
            grad = run(problem)["grad_bias"]
        assert not grad[:, 3:].any() and grad[:, :3].isnan().any()


@pytest.mark.parametrize("name", available_isas())
def test_scores_that_overflow_reach_no_scale_of_rows_that_do_not_attend(name):
    """The scores of all keys of a tile are made, and one may be infinite where no key is."""
    for seed in range(20):
        torch.manual_seed(seed)
        q, k, v, cotangent = torch.randn(4, 1, 40, 1, 16).unbind(0)
        k[0, 20, 0, 3] = 3e38
        scale = torch.full((1, 40, 1), 0.2, requires_grad=True)
        with isa(name):
            out = attnext.sliding_window_attention(q, k, v, 3, scale=scale)
            gradient = torch.autograd.grad(out, scale, cotangent)[0]
        others = [t for t in range(40) if not 20 <= t <= 22]
        assert gradient[0, others].isfinite().all()

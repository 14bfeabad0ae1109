# SPDX-License-Identifier: Apache-2.0
"""What must hold for any implementation: each identity for the specification and the kernels."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import problems

import attnext
import attnext.compat
from attnext import reference
from attnext.testing import available_isas, isa

F64 = torch.float64


@pytest.fixture(params=["reference", *available_isas()])
def ops(request):
    """The specification, then the kernels on every ISA level."""
    if request.param == "reference":
        yield reference
    else:
        with isa(request.param):
            yield attnext


@pytest.fixture(params=available_isas())
def kernels(request):
    """The kernels alone, for what torch's own operators do not promise."""
    with isa(request.param):
        yield attnext


def normal(*shape, dtype=F64):
    return torch.randn(shape, dtype=F64).to(dtype)


def inputs(*extents, batch=2, heads=4, kv_heads=2, dim=8, dim_v=6, keys=None, dtype=F64):
    keys = extents if keys is None else keys
    return (
        normal(batch, *extents, heads, dim, dtype=dtype),
        normal(batch, *keys, kv_heads, dim, dtype=dtype),
        normal(batch, *keys, kv_heads, dim_v, dtype=dtype),
    )


def dense(query, key, value, mask=None, **options):
    """torch's own attention over flattened tokens, heads last."""
    extents = query.shape[1:-2]
    q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, **options)
    return out.transpose(1, 2).unflatten(1, extents)


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


# Dense attention and its blocks


@pytest.mark.parametrize("extents", [(13,), (5, 6), (3, 4, 2)], ids=str)
@pytest.mark.parametrize("extra", [0, 3])
def test_kernel_of_the_whole_axis_is_dense_attention(ops, extents, extra):
    args = inputs(*extents)
    kernel = tuple(extent + extra for extent in extents)
    close(ops.neighborhood_attention(*args, kernel), dense(*args))
    close(ops.window_attention(*args, kernel), dense(*args))


def test_window_none_is_dense_attention(ops):
    args = inputs(17)
    close(ops.sliding_window_attention(*args, None, is_causal=False), dense(*args))
    close(ops.sliding_window_attention(*args, None), dense(*args, is_causal=True))
    close(ops.sliding_window_attention(*args, 17), dense(*args, is_causal=True))
    close(ops.neighborhood_attention(*args, 17, is_causal=True), dense(*args, is_causal=True))


def test_stride_equal_to_kernel_is_block_attention(ops):
    args = inputs(12, 10)
    blocks = [x.unflatten(2, (2, 5)).unflatten(1, (3, 4)).transpose(2, 3) for x in args]
    blocks = [x.flatten(0, 2) for x in blocks]
    expected = dense(*blocks).unflatten(0, (2, 3, 2)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    close(ops.neighborhood_attention(*args, (4, 5), stride=(4, 5)), expected)
    close(ops.window_attention(*args, (4, 5)), expected)


@pytest.mark.parametrize("boundary", ["inward", "truncate", "zero_pad"])
@pytest.mark.parametrize("causal", [False, (True, False)], ids=str)
def test_dilation_is_attention_in_regrouped_tokens(ops, boundary, causal):
    """Extents that the dilation does not divide: classes of unequal length, which never mix."""
    args, dilation = inputs(11, 7), (3, 2)
    options = {"is_causal": causal, "boundary": boundary, "stride": 2}
    out, lse = ops.neighborhood_attention(*args, 3, dilation=dilation, return_lse=True, **options)
    for a, b in itertools.product(*(range(d) for d in dilation)):
        part = [x[:, a :: dilation[0], b :: dilation[1]] for x in args]
        part_out, part_lse = ops.neighborhood_attention(*part, 3, return_lse=True, **options)
        close(out[:, a :: dilation[0], b :: dilation[1]], part_out)
        close(lse[:, a :: dilation[0], b :: dilation[1]], part_lse)


def test_axes_of_length_one_do_not_count(ops):
    args = inputs(9)
    expected = ops.neighborhood_attention(*args, 4)
    for axis in (1, 2):
        kernel = (4, 1) if axis == 2 else (1, 4)
        wide = [x.unsqueeze(axis) for x in args]
        close(ops.neighborhood_attention(*wide, kernel).squeeze(axis), expected)


# Shifted windows


def swin(query, key, value, window, shift, table=None):
    """Swin's own procedure: roll, partition, mask what the roll brought together, undo."""
    (height, width), (w0, w1), (p0, p1) = query.shape[1:3], window, shift

    def partition(x):
        x = torch.roll(x, (-p0, -p1), (1, 2))
        x = x.unflatten(2, (width // w1, w1)).unflatten(1, (height // w0, w0))
        return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)

    regions = torch.zeros(1, height, width)
    cuts = [[0, n - w, n - p, n] for n, w, p in ((height, w0, p0), (width, w1, p1))]
    for number, (rows, columns) in enumerate(
        itertools.product(itertools.pairwise(cuts[0]), itertools.pairwise(cuts[1]))
    ):
        regions[:, slice(*rows), slice(*columns)] = number
    regions = regions.unflatten(2, (width // w1, w1)).unflatten(1, (height // w0, w0))
    regions = regions.transpose(2, 3).flatten(3, 4).flatten(0, 2)
    mask = torch.zeros(regions.shape[0], 1, w0 * w1, w0 * w1, dtype=F64)
    mask = mask.masked_fill((regions[:, :, None] != regions[:, None, :])[:, None], -math.inf)
    mask = mask.repeat(query.shape[0], 1, 1, 1)
    if table is not None:
        slots = torch.stack(
            torch.meshgrid(torch.arange(w0), torch.arange(w1), indexing="ij")
        ).flatten(1)
        delta = slots[:, :, None] - slots[:, None, :]  # query - key
        index = (delta[0] + w0 - 1) * (2 * w1 - 1) + delta[1] + w1 - 1
        mask = mask + table[index].movedim(-1, 0)
    out = dense(partition(query), partition(key), partition(value), mask)
    out = out.unflatten(0, (query.shape[0], height // w0, width // w1)).unflatten(3, (w0, w1))
    return torch.roll(out.transpose(2, 3).flatten(3, 4).flatten(1, 2), (p0, p1), (1, 2))


@pytest.mark.parametrize("shift", [(2, 2), (1, 3), (3, 1)], ids=str)
def test_shifted_windows_are_roll_and_mask(ops, shift):
    args, window = inputs(8, 15), (4, 5)
    table = normal(7 * 9, 4)
    close(ops.window_attention(*args, window, shift), swin(*args, window, shift))
    bias = attnext.compat.swin_bias(table, window)
    close(ops.window_attention(*args, window, shift, bias=bias), swin(*args, window, shift, table))


def test_unshifted_windows_of_swin(ops):
    args, table = inputs(8, 15), normal(7 * 9, 4)
    bias = attnext.compat.swin_bias(table, (4, 5))
    close(ops.window_attention(*args, (4, 5), bias=bias), swin(*args, (4, 5), (0, 0), table))


def test_windows_on_rolled_input_are_torus_windows(ops):
    """No mask: windows that wrap around. Rolling forth and back is all it takes."""
    args, window, shift = inputs(8, 12), 4, (3, -1)
    i, j = (torch.arange(n) for n in (8, 12))
    tile = ((i[:, None] - 3) % 8 // 4) * 3 + (j + 1) % 12 // 4
    mask = tile.flatten()[:, None] == tile.flatten()
    rolled = [torch.roll(x, (-shift[0], -shift[1]), (1, 2)) for x in args]
    out = torch.roll(ops.window_attention(*rolled, window), shift, (1, 2))
    close(out, dense(*args, mask))


def test_sliding_tiles(ops):
    """A window of three tiles per axis around the query's own tile, shifted inward at the edges."""
    args, tile, side = inputs(12, 15), (2, 3), 3
    masks = []
    for n, s in zip((12, 15), tile, strict=True):
        own = torch.arange(n) // s
        centre = own.clamp(side // 2, n // s - 1 - side // 2)
        masks.append((centre[:, None] - own).abs() <= side // 2)
    mask = torch.kron(*(m.double() for m in masks)).bool()
    kernel = tuple(side * s for s in tile)
    close(ops.neighborhood_attention(*args, kernel, stride=tile), dense(*args, mask))


def test_window_that_keeps_its_size_at_the_border(ops):
    """FreeSwim's formulation: what sticks out on one side is added on the other."""
    args, radius = inputs(3, 9, 12), (2, 3)
    masks = [torch.ones(3, 3)]
    for n, d in zip((9, 12), radius, strict=True):
        i = torch.arange(n)[:, None]
        up, down = (d + i - n + 1).clamp(min=0), (d - i).clamp(min=0)
        j = torch.arange(n)
        masks.append(((i - d - up <= j) & (j <= i + d + down)).float())
    mask = torch.kron(torch.kron(masks[0], masks[1]), masks[2]).bool()
    close(ops.neighborhood_attention(*args, (3, 5, 7)), dense(*args, mask))


def test_band_with_a_global_first_token(ops):
    args = inputs(30)
    i, j = torch.arange(30)[:, None], torch.arange(30)
    mask = ((i - j).abs() <= 4) | (j == 0)
    out = ops.sliding_window_attention(*args, (4, 4), is_causal=False, sinks=1)
    close(out, dense(*args, mask))


def test_attention_sinks_and_a_causal_window(ops):
    args = inputs(30)
    i, j = torch.arange(30)[:, None], torch.arange(30)
    mask = (j <= i) & ((i - j < 6) | (j < 4))
    close(ops.sliding_window_attention(*args, 6, sinks=4), dense(*args, mask))


# Values, merging, batching, decoding


def test_values_of_one_give_ones(ops):
    """The weights sum to one; a phantom key or a sink logit takes its share."""
    query, key, value = inputs(9, 7)
    ones = torch.ones_like(value)
    for boundary in ("inward", "truncate"):
        out = ops.neighborhood_attention(query, key, ones, 4, 2, boundary=boundary)
        close(out, torch.ones_like(out))
    zeros = torch.zeros_like(query)
    out = ops.neighborhood_attention(zeros, key, ones, 3, boundary="zero_pad")
    rows, columns = (torch.full((n,), 3.0, dtype=F64) for n in (9, 7))
    for count in (rows, columns):
        count[0] = count[-1] = 2.0
    seen = (rows[:, None] * columns / 9)[None, :, :, None, None]
    close(out, seen.expand_as(out))
    out = ops.neighborhood_attention(zeros, key, ones, 3, sink_logits=normal(4) * 0 + math.log(9))
    close(out, torch.full_like(out, 0.5))


def test_constant_query_averages_the_window(ops):
    """A zero query weighs its keys alike: output their mean, lse the logarithm of their number."""
    query, key, value = inputs(40)
    out, lse = ops.sliding_window_attention(query * 0, key, value, 5, return_lse=True)
    for i in range(40):
        window = value[:, max(0, i - 4) : i + 1].mean(dim=1).repeat_interleave(2, dim=1)
        close(out[:, i], window)
        close(lse[:, i], torch.full((2, 4), math.log(min(i + 1, 5)), dtype=F64))


def grads(results, leaves, cotangents):
    return torch.autograd.grad(results, leaves, cotangents, retain_graph=True)


def test_merge_of_parts_is_the_whole(ops):
    leaves = [x.requires_grad_() for x in inputs(24)]
    query, key, value = leaves
    whole = ops.sliding_window_attention(query, key, value, None, is_causal=False, return_lse=True)
    parts = [
        ops.sliding_window_attention(
            query, key[:, a:b], value[:, a:b], None, is_causal=False, return_lse=True
        )
        for a, b in ((0, 5), (5, 6), (6, 24))
    ]
    merged = ops.merge_attentions(*zip(*parts, strict=True))
    cotangents = [normal(*x.shape) for x in whole]
    for a, b in zip(merged, whole, strict=True):
        close(a, b)
    for a, b in zip(
        grads(merged, leaves, cotangents), grads(whole, leaves, cotangents), strict=True
    ):
        close(a, b)


def test_without_keys_the_gradient_of_the_bias_is_zero(kernels):
    """In a thread that has run nothing before: its scratch is not there yet."""

    def run():
        leaves = [x.requires_grad_() for x in inputs(5, 11, keys=(5, 0))]
        bias = normal(4, 1, 1).requires_grad_()
        out = kernels.neighborhood_attention(*leaves, (1, (0, 0)), bias=bias)
        return out, torch.autograd.grad(out.sum(), [*leaves, bias])

    for _ in range(5):
        junk = [torch.full((16,), math.nan, dtype=F64) for _ in range(100)]
        del junk  # what the kernel allocates may hold it now
        with ThreadPoolExecutor(1) as fresh:
            out, gradients = fresh.submit(run).result()
        assert not out.any() and not any(g.any() for g in gradients)


def test_merge_with_rows_that_saw_nothing(ops):
    """A causal call with fewer keys than queries leaves rows without keys: they add nothing."""
    leaves = [x.requires_grad_() for x in inputs(10)]
    query, key, value = leaves
    some = ops.sliding_window_attention(query, key[:, :4], value[:, :4], None, return_lse=True)
    assert (some[1][:, :6] == -math.inf).all() and not some[0][:, :6].any()
    empty = ops.sliding_window_attention(query, key[:, :0], value[:, :0], None, return_lse=True)
    assert (empty[1] == -math.inf).all() and not empty[0].any()
    merged = ops.merge_attentions([some[0], empty[0]], [some[1], empty[1]])
    close(merged[0], some[0])
    close(merged[1], some[1])
    cotangents = [normal(*x.shape) for x in some]
    for a, b in zip(
        grads(merged, leaves, cotangents), grads(some, leaves, cotangents), strict=True
    ):
        assert torch.isfinite(a).all()
        close(a, b)


def test_additional_keys_are_more_keys(ops):
    query, key, value = inputs(12)
    out = ops.sliding_window_attention(
        query, key[:, 5:], value[:, 5:], None, is_causal=False,
        additional_keys=key[:, :5], additional_values=value[:, :5], return_lse=True,
    )  # fmt: skip
    whole = ops.sliding_window_attention(query, key, value, None, is_causal=False, return_lse=True)
    for a, b in zip(out, whole, strict=True):
        close(a, b)


def test_packed_sequences_are_separate_calls(ops):
    query, key, value = inputs(30, batch=1, keys=(41,))
    cu_q, cu_k = [0, 7, 7, 20, 30], [0, 9, 12, 12, 41]
    bounds = {
        "cu_seqlens_q": torch.tensor(cu_q, dtype=torch.int32),
        "cu_seqlens_k": torch.tensor(cu_k, dtype=torch.int32),
    }
    options = {"sinks": 2, "alibi_slopes": normal(4).abs(), "bias": normal(4, 101)}
    for causal in (True, False):
        packed = ops.sliding_window_attention(
            query, key, value, 6, is_causal=causal, return_lse=True, **bounds, **options
        )
        for (q0, q1), (k0, k1) in zip(
            itertools.pairwise(cu_q), itertools.pairwise(cu_k), strict=True
        ):
            alone = ops.sliding_window_attention(
                query[:, q0:q1], key[:, k0:k1], value[:, k0:k1], 6, is_causal=causal,
                return_lse=True, **options,
            )  # fmt: skip
            for a, b in zip(packed, alone, strict=True):
                close(a[:, q0:q1], b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64], ids=str)
def test_batch_items_are_independent(kernels, dtype):
    """Bit for bit: an item gives the same alone, in company and beside NaN."""
    leaves = [x.requires_grad_() for x in inputs(13, 9, batch=3, dim=24, dtype=dtype)]
    cotangent = normal(3, 13, 9, 4, 6, dtype=dtype)

    def call(*args):
        return kernels.neighborhood_attention(*args, (5, 4), dilation=(1, 2))

    def run(parts, grad):
        out = call(*parts)
        return out, *grads(out, parts, grad.to(out.dtype))

    together = run(leaves, cotangent)
    with torch.no_grad():
        spoiled = [x.clone() for x in leaves]
        for x in spoiled:
            x[::2] = math.nan
    spoiled = run([x.requires_grad_() for x in spoiled], cotangent)
    alone = run([x[1:2].detach().requires_grad_() for x in leaves], cotangent[1:2])
    for a, b, c in zip(together, alone, spoiled, strict=True):
        assert torch.equal(a[1:2], b)
        assert torch.equal(c[1:2], b)


def test_decoding_is_the_last_row_of_prefill(ops):
    query, key, value = inputs(50)
    options = {
        "sinks": 2,
        "alibi_slopes": normal(4).abs(),
        "softcap": 5.0,
        "sink_logits": normal(4),
    }
    whole = ops.sliding_window_attention(query, key, value, 9, return_lse=True, **options)
    for n in (1, 5, 9, 10, 33, 50):
        step = ops.sliding_window_attention(
            query[:, n - 1 : n], key[:, :n], value[:, :n], 9, return_lse=True, **options
        )
        for a, b in zip(step, whole, strict=True):
            close(a, b[:, n - 1 : n])
    chunks = [
        ops.sliding_window_attention(query[:, a:b], key[:, :b], value[:, :b], 9, **options)
        for a, b in itertools.pairwise((0, 3, 20, 21, 50))
    ]
    close(torch.cat(chunks, dim=1), whole[0])


def test_per_head_windows_are_separate_calls(ops):
    args = inputs(9, 8, kv_heads=4)
    kernels = [(3, 8), (1, 1), 4, ((0, 2), 5)]
    out = ops.neighborhood_attention(*args, kernels, boundary="truncate")
    for head, kernel in enumerate(kernels):
        part = [x[..., head : head + 1, :] for x in args]
        alone = ops.neighborhood_attention(*part, kernel, boundary="truncate")
        close(out[..., head : head + 1, :], alone)


def test_shared_heads_are_repeated_heads(ops):
    leaves = [x.requires_grad_() for x in inputs(20, heads=6, kv_heads=2)]
    query, key, value = leaves
    shared = ops.sliding_window_attention(query, key, value, 7)
    repeated = ops.sliding_window_attention(
        query, key.repeat_interleave(3, 2), value.repeat_interleave(3, 2), 7
    )
    close(shared, repeated)
    cotangent = normal(*shared.shape)
    for a, b in zip(
        grads(shared, leaves, cotangent), grads(repeated, leaves, cotangent), strict=True
    ):
        close(a, b)


def test_row_scale_multiplies_the_query(ops):
    query, key, value = inputs(6, 5)
    scale = normal(2, 6, 5, 4)
    scaled = ops.neighborhood_attention(query * scale[..., None], key, value, 3, scale=1.0)
    close(ops.neighborhood_attention(query, key, value, 3, scale=scale), scaled)
    per_head = normal(4)
    scaled = ops.neighborhood_attention(query * per_head[:, None], key, value, 3, scale=1.0)
    close(ops.neighborhood_attention(query, key, value, 3, scale=per_head), scaled)


def test_alibi_is_a_bias_in_tokens(ops):
    """Distances of ALiBi are in tokens, offsets of the bias in steps of the dilation."""
    args, slopes = inputs(11, 9), normal(4).abs()
    steps = torch.arange(-5, 6, dtype=F64).abs()
    bias = -slopes[:, None, None] * (2 * steps[:, None] + 3 * steps)
    for boundary in ("inward", "zero_pad"):
        options = {"kernel_size": 3, "dilation": (2, 3), "boundary": boundary}
        alibi = ops.neighborhood_attention(*args, alibi_slopes=slopes, **options)
        close(alibi, ops.neighborhood_attention(*args, bias=bias, **options))


def test_bias_counts_key_minus_query(ops):
    """A bias that allows one offset alone reads one neighbour."""
    query, key, value = inputs(10, kv_heads=4)
    for offset in (-2, 0, 1):
        bias = torch.full((4, 7), -math.inf, dtype=F64)
        bias[:, offset + 3] = 0
        out, lse = ops.sliding_window_attention(
            query, key, value, (3, 3), is_causal=False, bias=bias, return_lse=True
        )
        for i in range(10):
            if 0 <= i + offset < 10:
                close(out[:, i], value[:, i + offset])
            else:
                assert not out[:, i].any() and (lse[:, i] == -math.inf).all()


def test_softcap_limits_logits(ops):
    query, key, value = inputs(12)
    _, lse = ops.sliding_window_attention(1e6 * query, key, value, 4, softcap=2.0, return_lse=True)
    signs = torch.sign(torch.einsum("bihd,bjhd->bhij", query, key.repeat_interleave(2, 2)))
    for i in range(3, 12):
        logits = 2 * signs[:, :, i, i - 3 : i + 1]
        close(lse[:, i], torch.logsumexp(logits, -1), 1e-9)
    close(ops.sliding_window_attention(query, key, value, 4, softcap=1e9),
          ops.sliding_window_attention(query, key, value, 4), 1e-9)  # fmt: skip


# The emergence of position bias: layers of attention with logits that are bias alone


def rollout(step, layers, n=64):
    """``step`` applied to the identity: which tokens a token's output is made of."""
    mix = torch.eye(n, dtype=F64).view(1, n, 1, n)
    for _ in range(layers):
        mix = step(mix)
    return mix[0, :, 0]


def blank(n):
    return torch.zeros(1, n, 1, 1, dtype=F64)


def test_rollout_of_causal_layers(ops):
    def step(mix):
        return ops.sliding_window_attention(blank(64), blank(64), mix, None)

    harmonic = torch.cumsum(1 / torch.arange(1, 65, dtype=F64), 0)
    before = torch.cat([torch.zeros(1, dtype=F64), harmonic[:-1]])
    rows = torch.arange(1, 65, dtype=F64)[:, None]
    expected = ((harmonic[:, None] - before) / rows).tril()
    close(rollout(step, 2), expected)
    assert rollout(step, 2)[63, 0].item() == pytest.approx(0.0741232954, abs=1e-10)
    for layers, mass in ((1, 0.015625), (4, 0.344667), (8, 0.866139), (16, 0.999077)):
        assert rollout(step, layers)[63, 0].item() == pytest.approx(mass, abs=1e-6)


def test_rollout_of_windowed_layers(ops):
    def step(mix):
        return ops.sliding_window_attention(blank(64), blank(64), mix, 8)

    for layers in (1, 8):
        assert rollout(step, layers)[63, 0] == 0  # nine layers reach 63 tokens back
    assert rollout(step, 9)[63, 0] > 0
    assert rollout(step, 16)[63, 0].item() == pytest.approx(0.1527331, abs=1e-7)
    assert rollout(step, 32)[63, 0].item() == pytest.approx(0.9990571, abs=1e-7)
    look_back = 63 - rollout(step, 4)[63] @ torch.arange(64, dtype=F64)
    close(look_back, torch.tensor(3.5 * 4, dtype=F64))


def test_rollout_of_decaying_layers(ops):
    slopes = torch.tensor([-math.log(0.8)], dtype=F64)

    def step(mix):
        n = mix.shape[1]
        return ops.sliding_window_attention(blank(n), blank(n), mix, None, alibi_slopes=slopes)

    layers = 3
    row = rollout(step, layers, n=512)[511].flip(0)[:200]
    expected = [math.comb(layers - 1 + x, x) * 0.2**layers * 0.8**x for x in range(200)]
    close(row, torch.tensor(expected, dtype=F64), 1e-14)
    mode = 4 * (layers - 1)
    close(row[mode - 1], row[mode])
    assert row.argmax() in (mode - 1, mode)


def test_rollout_of_prefix_layers(ops):
    """The first four tokens see each other, the rest is causal: two calls."""

    def step(mix):
        def call(a, b, keys, causal):
            return ops.sliding_window_attention(
                blank(b - a), blank(keys), mix[:, :keys], None, is_causal=causal
            )

        return torch.cat([call(0, 4, 4, False), call(4, 64, 64, True)], dim=1)

    row = rollout(step, 16)[63]
    close(row[:4], torch.full((4,), 0.2499998, dtype=F64), 1e-7)
    assert row[4].item() == pytest.approx(5.87e-7, rel=1e-2)


# What is not finite stays where it is


def attends(problem):
    """[B, N, H, M]: which rows the reference lets see which keys; phantom keys left out."""
    tensors, options = dict(problem.tensors), dict(problem.options)
    batch, heads = tensors["query"].shape[0], tensors["query"].shape[-2]
    num_keys = math.prod(tensors["key"].shape[1:-2])
    plain = {n: x for n, x in tensors.items() if n.startswith("cu_")}
    blank_query = torch.zeros_like(tensors["query"].contiguous(), dtype=F64)
    marks = torch.eye(num_keys, dtype=F64).expand(batch, num_keys, num_keys).unsqueeze(2)
    marks = marks.expand(-1, -1, tensors["key"].shape[-2], -1)
    marks = marks.reshape(*tensors["key"].shape[:-1], num_keys)
    keys = torch.zeros_like(tensors["key"].contiguous(), dtype=F64)
    for name in ("scale", "softcap"):
        options.pop(name, None)
    out = getattr(reference, problem.op)(blank_query, keys, marks, **plain, **options)
    return (out > 0).reshape(batch, -1, heads, num_keys)


@pytest.mark.parametrize("name", available_isas())
@settings(max_examples=40)
@given(problem=problems(), data=st.data())
def test_what_is_not_finite_stays_local(name, problem, data):
    """One spoiled entry reaches the results of the rows that attend it. No other bit moves, but in
    sums over queries: beside a spoiled one the others of its tile are added one at a time."""
    tensors = problem.tensors
    which = data.draw(st.sampled_from(("query", "key", "value", "cotangent")))
    victim = problem.cotangents[0] if which == "cotangent" else tensors[which]
    if victim.numel() == 0 or tensors["key"].numel() == 0:
        return
    bad = data.draw(st.sampled_from((math.nan, math.inf, -math.inf)))
    batch, token, head, dim = (
        data.draw(st.integers(0, n - 1)) for n in victim.flatten(1, -3).shape
    )
    spoiled = victim.flatten(1, -3).contiguous().clone()
    spoiled[batch, token, head, dim] = bad
    spoiled = spoiled.reshape(victim.shape)

    def run(inputs, cotangents):
        leaves = {n: x.detach().requires_grad_(x.is_floating_point()) for n, x in inputs.items()}
        with isa(name):
            results = getattr(attnext, problem.op)(**leaves, **problem.options, return_lse=True)
            names = ("query", "key", "value")
            grads = torch.autograd.grad(results, [leaves[n] for n in names], cotangents)
        parts = dict(zip(("out", "lse", *names), (*results, *grads), strict=True))
        parts["lse"] = parts["lse"].unsqueeze(-1)
        return {n: x.detach().flatten(1, -3) for n, x in parts.items()}

    clean = run(tensors, problem.cotangents)
    if which == "cotangent":
        dirty = run(tensors, (spoiled, problem.cotangents[1]))
    else:
        dirty = run({**tensors, which: spoiled}, problem.cotangents)

    sees = attends(problem)  # [B, N, H, M]
    heads, kv_heads = tensors["query"].shape[-2], tensors["key"].shape[-2]
    group = heads // kv_heads
    rows = torch.zeros(sees.shape[:3], dtype=torch.bool)  # spoiled rows [B, N, H]
    if which in ("query", "cotangent"):
        rows[batch, token, head] = True
    else:
        rows[batch, :, head * group : (head + 1) * group] = sees[
            batch, :, head * group : (head + 1) * group, token
        ]
    touched = (rows[..., None] & sees).any(1)  # [B, H, M]: keys that a spoiled row attends
    touched = touched.unflatten(1, (kv_heads, group)).any(2).transpose(1, 2)  # [B, M, Hkv]
    if which in ("key", "value"):
        touched[batch, token, head] = True

    def same(result, allowed):
        a, b = (x[result].masked_fill(allowed[..., None], 0) for x in (clean, dirty))
        if result in ("key", "value"):
            unit = 16 * torch.finfo(a.dtype).eps * a.abs().amax() if a.numel() else 0.0
            assert ((a - b).abs() <= unit).all(), f"{result}, beside the spoiled {which}"
        else:
            assert torch.equal(a, b), f"{result} changed where it does not see the spoiled {which}"

    forward = rows if which != "cotangent" else torch.zeros_like(rows)
    same("out", forward)
    same("lse", forward if which != "value" else torch.zeros_like(rows))
    same("query", rows)
    same("key", touched)
    same("value", touched)
    has_keys = sees.any(-1)
    if math.isnan(bad):
        seen = rows & has_keys
        if which == "cotangent":
            assert dirty["query"].isnan().any(-1)[seen].all()
        elif which == "value":
            assert dirty["out"][..., dim].isnan()[seen].all()
            others = torch.arange(victim.shape[-1]) != dim
            assert torch.equal(dirty["out"][..., others], clean["out"][..., others])
        elif which == "key":
            assert dirty["out"].isnan().all(-1)[seen].all()
            assert dirty["lse"].isnan().all(-1)[seen].all()
        else:
            assert dirty["out"].isnan().all(-1)[seen].all()

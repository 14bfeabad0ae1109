# SPDX-License-Identifier: Apache-2.0
"""Wrong calls of pooling and selection, and calls at their edges."""

import numpy as np
import pytest
import torch
from test_selection import normal

from attnext import Blocks, Windows, block_pool, packed_blocks, select_topk

X = torch.zeros(1, 6, 2, 4)
Q4, C3 = torch.zeros(1, 4, 4, 8), torch.zeros(1, 3, 2, 8)
W4, W3 = Windows(8, 2), Windows(9, 3)
INTS = torch.tensor([0, 6], dtype=torch.int32)
WRONG = {
    "x": (lambda: block_pool([1.0], 2), TypeError, "x must be .*list"),
    "x axes": (lambda: block_pool(X[0], 2), ValueError, r"x must be \[B, \*tokens, H, D\]"),
    "blocks": (lambda: block_pool(X, 0), ValueError, "blocks must be at least 1, got 0"),
    "blocks of others": (
        lambda: block_pool(X, Windows(7, 2)), ValueError, r"blocks must be of \(6,\) tokens, .*7"),
    "reduce": (lambda: block_pool(X, 2, "median"), ValueError, "reduce must be one of"),
    "weights unread": (
        lambda: block_pool(X, 2, "max", weights=X[..., 0]), ValueError, "weights have no part"),
    "weights shape": (
        lambda: block_pool(X, 2, weights=X[:, :5, :, 0]), ValueError, "weights must be .*5"),
    "dtype": (lambda: block_pool(X, 2, dtype=torch.int32), TypeError, "dtype must be .*int32"),
    "extent of blocks": (lambda: Blocks(6, INTS), TypeError, "extent must be a tuple .*6"),
    "offsets": (lambda: Blocks((6,), [0, 6]), TypeError, "offsets must be an int32.*list"),
    "no offsets": (lambda: Blocks((6,), None), TypeError, "offsets must be an int32.*None"),
    "offsets dtype": (
        lambda: Blocks((6,), INTS.long()), TypeError, "offsets must be an int32.*int64"),
    "offsets axes": (lambda: Blocks((6,), INTS[0]), ValueError, r"offsets must be \[blocks"),
    "order": (lambda: Blocks((6,), INTS, [1]), TypeError, "order must be an int32"),
    "order axes": (lambda: Blocks((6,), INTS, INTS[None]), ValueError, r"order must be \[tokens"),
    "window size": (lambda: Windows(7, 0), ValueError, "size must be at least 1"),
    "packed dtype": (
        lambda: packed_blocks(torch.tensor([0, 3]), 2), TypeError, "cu_seqlens must be an int32"),
    "packed order": (
        lambda: packed_blocks(torch.tensor([0, 3, 2], dtype=torch.int32), 2), ValueError,
        "cu_seqlens must rise"),
    "ragged": (lambda: Windows(7, 2, ragged=5), TypeError, "ragged must be a bool, got 5"),
    "counts": (
        lambda: block_pool(X, 2, return_counts=2), TypeError, "return_counts must be a bool"),
    "several reductions": (
        lambda: block_pool(X, 2, np.array(["sum", "max"])), ValueError, "reduce must be one of"),
    "several scores": (
        lambda: select_topk(Q4, C3, 1, score=np.array(["dot", "max_q"])), ValueError,
        "score must be one of"),
    "values": (
        lambda: select_topk(Q4, C3, 1, return_values=3), TypeError, "return_values must be a bool"),
    "many slots": (lambda: select_topk(Q4, C3, 2**31), ValueError, r"k must be below 2\*\*31"),
    "eight bits": (
        lambda: select_topk(*(x.to(torch.float8_e4m3fn) for x in (Q4, C3)), 1), TypeError,
        "query must be a float32, float64, .*float8"),
    "score": (lambda: select_topk(Q4, C3, 1, score="cosine"), ValueError, "score must be one of"),
    "causal": (lambda: select_topk(Q4, C3, 1, causal=True), ValueError, "causal must be one of"),
    "no geometry": (
        lambda: select_topk(Q4, C3, 1, causal="end"), ValueError, "query_blocks must be given"),
    "rows": (
        lambda: select_topk(Q4, C3, 1, query_blocks=W3), ValueError,
        "query_blocks must be 4 like query, got 3"),
    "candidates": (
        lambda: select_topk(Q4, C3, 1, candidate_blocks=W4), ValueError,
        "candidate_blocks must be 3 like candidates, got 4"),
    "heads": (
        lambda: select_topk(Q4[:, :, :3], C3, 1), ValueError, "query must have a multiple"),
    "head_dim": (lambda: select_topk(Q4[..., :4], C3, 1), ValueError, "candidates must have"),
    "k": (lambda: select_topk(Q4, C3, 0), ValueError, "k must be at least 1"),
    "forced": (
        lambda: select_topk(Q4, C3, 2, force_first=1, force_last=2), ValueError, "must fit into k"),
    "weights missing": (
        lambda: select_topk(Q4, C3, 1, score="relu_wsum"), ValueError, "weights must be given"),
    "lse spare": (lambda: select_topk(Q4, C3, 1, lse=Q4[..., 0]), ValueError, "lse must be given"),
    "overlap of rows": (
        lambda: select_topk(Q4, C3, 1, score="max_q", query_blocks=Windows(4, 2, 1)), ValueError,
        "query_blocks must be Windows without overlap"),
    "exclude": (
        lambda: select_topk(Q4, C3, 1, exclude=torch.zeros(1, 1, 4, 2, dtype=torch.bool)),
        ValueError, "exclude must broadcast"),
    "two rules": (
        lambda: select_topk(Q4, C3, 1, causal="end", query_blocks=W4, candidate_blocks=W3,
                            ranges=(torch.zeros(4).int(),) * 2),
        ValueError, "ranges take the place of causal"),
    "scale": (lambda: select_topk(Q4, C3, 1, scale="1"), TypeError, "scale must be a number"),
    "ranges": (
        lambda: select_topk(Q4, C3, 1, ranges=(torch.zeros(3).int(),) * 2), ValueError,
        r"ranges must be \[4\]"),
    "a map": (
        lambda: select_topk(Q4, C3, 1, query_blocks=Blocks.of((2, 2), 1)), ValueError,
        "query_blocks must be of one token axis"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_call(name):
    call, exception, message = WRONG[name]
    with pytest.raises(exception, match=message):
        call()


@pytest.mark.parametrize(
    "offsets", [[0, 5, 20], [0, 5, 8], [4, 5, 10], [0, 7, 5, 10], [0, 5, 2**28]]
)
def test_blocks_that_are_no_cover_are_not_pooled(offsets):
    blocks = Blocks((10,), torch.tensor(offsets, dtype=torch.int32))
    with pytest.raises(ValueError, match="blocks must have offsets that rise from 0 to 10"):
        block_pool(torch.ones(1, 10, 2, 3), blocks, "sum")


@pytest.mark.parametrize("order", [range(5, 15), range(9), [0] * 10], ids=str)
def test_orders_that_are_no_order_are_not_pooled(order):
    offsets = torch.tensor([0, 4, 10], dtype=torch.int32)
    blocks = Blocks((10,), offsets, torch.tensor(list(order), dtype=torch.int32))
    with pytest.raises(ValueError, match="an order that names each of 10 tokens once"):
        block_pool(torch.ones(1, 10, 2, 3), blocks, "sum")


def test_offsets_are_read_again_in_memory_that_others_write():
    shared = np.array([0, 5, 10], dtype=np.int32)
    blocks, x = Blocks((10,), torch.from_numpy(shared)), torch.ones(1, 10, 2, 3)
    block_pool(x, blocks)
    shared[1] = 2**28
    with pytest.raises(ValueError, match="blocks must have offsets that rise from 0 to 10"):
        block_pool(x, blocks)


@pytest.mark.parametrize("offsets", [[0, 12, 6, 9], [9, 6, 3, 0], [0, 3, 6, 900]], ids=str)
@pytest.mark.parametrize("name", ["query_blocks", "candidate_blocks"])
def test_blocks_that_are_no_cover_are_not_selected(name, offsets):
    x = torch.ones(1, 3, 2, 4)
    given = {"query_blocks": Windows(9, 3), "candidate_blocks": Windows(9, 3)}
    given[name] = Blocks((9,), torch.tensor(offsets, dtype=torch.int32))
    with pytest.raises(ValueError, match=f"{name} must have offsets that rise from 0 to 9"):
        select_topk(x, x, 2, causal="start", **given)


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_blocks_made_under_a_transform_are_not_kept(transform):
    x = normal(1, 37, 2, 3)  # of a length of its own: nothing is remembered of it

    def loss(x):
        return block_pool(x, Blocks.of(37, 5), "max").sum()

    if transform == "grad":
        found = torch.func.grad(loss)(x)
    else:
        found = torch.func.vmap(torch.func.grad(loss))(x[None])[0]
    blocks = Blocks.of(37, 5)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(blocks.offsets)
    leaf = x.clone().requires_grad_()
    block_pool(leaf, blocks, "max").sum().backward()
    assert torch.equal(found, leaf.grad)


def test_forward_mode_is_refused():
    query, candidates = torch.randn(1, 4, 2, 3), torch.randn(1, 6, 2, 3)
    with pytest.raises(NotImplementedError, match="select_topk has no forward-mode"):
        torch.func.jvp(
            lambda q: select_topk(q, candidates, 2, return_values=True)[1],
            (query,), (query,),
        )  # fmt: skip


def test_tensors_on_another_device():
    x = torch.randn(1, 40, 2, 8)
    for name, options in (
        ("candidates", {"candidates": x.to("meta")}),
        ("exclude", {"exclude": torch.zeros(1, 1, 1, 40, device="meta") > 0}),
        ("weights", {"weights": torch.zeros(1, 40, 2, device="meta"), "score": "relu_wsum"}),
    ):
        with pytest.raises(ValueError, match=f"{name} must be on the device of query"):
            select_topk(**{"query": x, "candidates": x, "k": 2, **options})


def test_no_blocks_to_choose_from():
    empty = torch.randn(1, 0, 2, 8)
    found = select_topk(
        empty, empty, 2, score="group_prob", lse=torch.zeros(1, 0, 2), windows=Windows(0, 4),
        candidate_blocks=Blocks.of(0, 4),
    )  # fmt: skip
    assert found.shape == (1, 2, 0, 2)


def test_a_backward_pass_under_autocast():
    x, y = (torch.randn(1, 40, 2, 8, requires_grad=True) for _ in range(2))
    values = select_topk(x, y, 3, return_values=True)[1].sin().sum()
    expected = torch.autograd.grad(values, (x, y), retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(values, (x, y))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

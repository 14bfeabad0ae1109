# SPDX-License-Identifier: Apache-2.0
"""Routed attention as torch sees it, and wrong calls of it."""

import dataclasses

import pytest
import torch
from far_apart import far_apart
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import attnext
from attnext import BlockPlan, Blocks, routed_attention
from attnext.testing import available_isas, evaluate, isa

F64 = torch.float64


def normal(*shape, dtype=F64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


LISTS = torch.tensor([[0, -1, 2], [1, 1, 0], [2, 0, -1]]).expand(1, 2, 3, 3)


def call(name, dtype=F64):
    """Tensors, a plan without its bias, options."""
    acc = F64 if dtype == F64 else torch.float32
    line = {
        "query": normal(2, 9, 4, 5, dtype=dtype, seed=1),
        "key": normal(2, 9, 2, 5, dtype=dtype, seed=2),
        "value": normal(2, 9, 2, 3, dtype=dtype, seed=3),
    }
    bias = normal(1, 2, 3, 3, dtype=acc, seed=4)
    sinks = normal(4, dtype=acc, seed=5)
    plan = BlockPlan.of(LISTS, 9, 4)
    if name == "plain":
        return line, plan, {}
    if name == "all":
        rules = {
            "is_causal": True, "within": (7, None), "exclude_self": True, "window_size": 3,
            "sinks": 1, "head_policy": ["list", "dense", "streaming", "list"], "softcap": 2.0,
            "key_lengths": torch.tensor([9, 6]), "scale": 0.7,
            "query_documents": torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1]).expand(2, 9),
            "key_documents": torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1]).expand(2, 9),
        }  # fmt: skip
        return line | {"bias": bias, "sink_logits": sinks}, plan, rules
    if name == "spans":
        starts = torch.tensor([[[[0, 3], [2, 5], [8, 0]]]])
        return line, BlockPlan.of_spans(starts, starts + 4 - (starts == 8) * 3, 9, 3), {}
    if name == "csr":
        indptr, indices = torch.tensor([[[0, 2, 2, 5]]]), torch.tensor([2, 0, 1, 1, 2])
        csr = BlockPlan.of_csr(indptr, indices, 9, 4, 9, 4)
        return line | {"bias": normal(5, dtype=acc, seed=6)}, csr, {"is_causal": True}
    assert name == "map"
    plane = {n: t.unflatten(1, (3, 3)) for n, t in line.items()}
    return plane, BlockPlan.of(torch.tensor([[[[0, 3], [1, 2], [0, 1], [3, 3]]]]), (3, 3), 2), {}


CALLS = ("plain", "all", "spans", "csr", "map")


def function(plan, **options):
    def of_tensors(*, bias=None, return_lse=True, **tensors):
        full = dataclasses.replace(plan, bias=bias)
        return routed_attention(**tensors, plan=full, **options, return_lse=return_lse)

    return of_tensors


def both(name, dtype=F64):
    tensors, plan, options = call(name, dtype)
    of_tensors = function(plan, **options)
    shape = (*tensors["query"].shape[:-1], tensors["value"].shape[-1])
    cotangents = normal(*shape, dtype=dtype, seed=7), normal(*shape[:-1], seed=8)
    return evaluate(of_tensors, tensors, None, cotangents)


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name].nan_to_num(), other[name].nan_to_num()), name


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "attnext":
            args = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.detach(), args)
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    with Recorder() as recorder:
        both(name, torch.float32)
    assert {func.name() for func, _ in recorder.calls} == {
        "attnext::routed_forward",
        "attnext::routed_backward",
    }
    for func, args in recorder.calls:
        torch.library.opcheck(func, args)


@pytest.mark.parametrize("level", available_isas())
@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(name, level):
    tensors, plan, options = call(name)
    names = list(tensors)

    def flat(*leaves):
        given = dict(zip(names, leaves, strict=True))
        out, lse = function(plan, **options)(**given)
        return out, lse.nan_to_num(neginf=0.0)

    with isa(level):
        leaves = [x.clone().requires_grad_() for x in tensors.values()]
        assert torch.autograd.gradcheck(flat, leaves, fast_mode=level != available_isas()[-1])


@pytest.mark.parametrize("name", CALLS)
def test_compile_whole_graph(name):
    tensors, plan, options = call(name, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(
        function(plan, **options), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    shape = (*tensors["query"].shape[:-1], tensors["value"].shape[-1])
    cotangents = normal(*shape, dtype=torch.float32, seed=7), normal(*shape[:-1], seed=8)
    assert_same(evaluate(compiled, tensors, None, cotangents), both(name, torch.float32))


def test_compile_with_the_router_inside():
    """A plan that is made of tensors of the graph."""

    def routed(q, k, v):
        pooled = q.detach().unflatten(1, (3, 3)).mean(2)
        scores = torch.einsum("bihd,bjhd->bhij", pooled, pooled)
        plan = BlockPlan.of(scores.topk(2).indices, 9, 3)
        return routed_attention(q, k, v, plan, is_causal=True)

    q, k, v = (normal(2, 9, 4, 5, dtype=torch.float32, seed=i) for i in range(3))
    torch._dynamo.reset()
    compiled = torch.compile(routed, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), routed(q, k, v))


@pytest.mark.parametrize("name", CALLS)
def test_meta_tensors(name):
    tensors, plan, options = call(name, torch.float32)
    real = function(plan, **options)(**tensors)

    def to_meta(x):
        if isinstance(x, torch.Tensor):
            return x.to("meta")
        if isinstance(x, BlockPlan | Blocks):
            fields = {f.name: to_meta(getattr(x, f.name)) for f in dataclasses.fields(x)}
            return type(x)(**fields)
        return x

    meta_options = {n: to_meta(x) for n, x in options.items()}
    meta = {n: to_meta(x) for n, x in tensors.items()}
    got = function(to_meta(plan), **meta_options)(**meta)
    for a, b in zip(got, real, strict=True):
        assert a.is_meta and (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("name", ["plain", "all"])
def test_vmap_of_grad(name):
    tensors, plan, options = call(name)

    def loss(query, key, rest):
        out, _ = function(plan, **options)(query=query, key=key, **rest)
        return out.square().sum()

    rest = {n: x for n, x in tensors.items() if n not in ("query", "key")}
    samples = [torch.stack([tensors[n], 2 * tensors[n]]) for n in ("query", "key")]
    got = torch.vmap(torch.func.grad(loss, (0, 1, 2)), (0, 0, None))(*samples, rest)
    for i in range(2):
        expected = torch.func.grad(loss, (0, 1, 2))(*(x[i] for x in samples), rest)
        for a, b in zip(got[:2], expected[:2], strict=True):
            torch.testing.assert_close(a[i], b)
        for n in rest:
            torch.testing.assert_close(got[2][n][i], expected[2][n])


def test_one_tensor_of_documents_for_both_sides():
    tensors, plan, _ = call("plain")
    documents = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2], dtype=torch.int32).expand(2, 9)
    documents = documents.contiguous()

    def results(of_keys):
        sides = {"query_documents": documents, "key_documents": of_keys}
        return function(plan, **sides)(**tensors)

    for a, b in zip(results(documents), results(documents.clone()), strict=True):
        assert torch.equal(a, b)


def test_autograd_manners():
    tensors, plan, options = call("all", torch.float32)
    before = {n: x.clone() for n, x in tensors.items()}
    both("all", torch.float32)
    assert_same(before, tensors)
    leaves = {n: x.clone().requires_grad_() for n, x in tensors.items()}
    with torch.no_grad():
        assert not function(plan, **options)(**leaves)[0].requires_grad
    out, _ = function(plan, **options)(**leaves)
    (grad,) = torch.autograd.grad(out.sum(), leaves["query"], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


def test_autocast():
    tensors, plan, options = call("all", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = function(plan, **options)(**tensors)
    assert out.dtype == torch.bfloat16
    halves = {n: x.bfloat16() if n in ("query", "key", "value") else x for n, x in tensors.items()}
    assert torch.equal(out, function(plan, **options)(**halves)[0])


def test_a_batch_item_does_not_depend_on_the_others():
    tensors, plan, options = call("plain", torch.float32)
    whole = function(plan, **options)(**tensors)
    for b in range(2):
        one = function(plan, **options)(**{n: t[b : b + 1] for n, t in tensors.items()})
        assert torch.equal(whole[0][b : b + 1], one[0]) and torch.equal(whole[1][b : b + 1], one[1])


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "tokens", "heads"])
def test_strides_beyond_two_billion_elements(dim, tmp_path):
    parts = far_apart(tmp_path, dim)
    plan = BlockPlan.of(torch.tensor([[[[0, 2], [1, 0], [2, -1]]]]), 6, 2)

    def results(tensors):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = routed_attention(*leaves, plan, is_causal=True)
        return out, *torch.autograd.grad(out, leaves, normal(*out.shape, seed=5).to(out.dtype))

    for a, b in zip(results(parts), results([x.contiguous() for x in parts]), strict=True):
        assert torch.equal(a, b)


# ---- errors --------------------------------------------------------------------------------------


def x(*shape, **options):
    return torch.zeros(shape, **options)


def ints(*shape, **options):
    return torch.zeros(shape, dtype=torch.int64, **options)


PLAN = BlockPlan.of(ints(1, 1, 3, 2), 6, 2)


def attend(*args, plan=PLAN, **options):
    q, k, v = (options.pop(n, None) for n in "qkv")
    given = (x(1, 6, 2, 4) if t is None else t for t in (q, k, v))
    return routed_attention(*given, plan, *args, **options)


def on_map(**options):
    plan = BlockPlan.of(ints(1, 1, 4, 1), (4, 4), 2)
    return routed_attention(*(x(1, 4, 4, 2, 4) for _ in range(3)), plan, **options)


def blocks(offsets, order=None, extent=(6,)):
    def int32(t):
        return None if t is None else torch.tensor(t, dtype=torch.int32)

    return Blocks(extent, int32(offsets), int32(order))


WRONG = {
    "query type": (lambda: attend(q=3), TypeError, "query must be a tensor, got int"),
    "query dtype": (lambda: attend(q=ints(1, 6, 2, 4)), TypeError, "query must be .*int64"),
    "key dtype": (lambda: attend(k=x(1, 6, 2, 4).half()), TypeError, "key must .*float16"),
    "value device": (lambda: attend(v=x(1, 6, 2, 4, device="meta")), ValueError, "value .*meta"),
    "heads": (lambda: attend(k=x(1, 6, 3, 4), v=x(1, 6, 3, 4)), ValueError, "multiple of the h"),
    "plan type": (lambda: attend(plan=[0]), TypeError, "plan must be a BlockPlan, got list"),
    "plan queries": (lambda: attend(q=x(1, 7, 2, 4)), ValueError, r"query tokens, \(7,\), got"),
    "plan keys": (
        lambda: attend(k=x(1, 7, 2, 4), v=x(1, 7, 2, 4)), ValueError, r"key tokens, \(7,\), got",
    ),
    "plan batch": (
        lambda: attend(plan=BlockPlan.of(ints(2, 1, 3, 1), 6, 2)), ValueError, "1 or 1 batch.*2",
    ),
    "plan heads": (
        lambda: attend(plan=BlockPlan.of(ints(1, 3, 3, 1), 6, 2)), ValueError, "1, 2 or 2 heads.*3",
    ),
    "plan device": (
        lambda: attend(plan=dataclasses.replace(PLAN, lists=PLAN.lists.to("meta"))),
        ValueError, "plan must be on the device of query, cpu, got meta",
    ),
    "index too large": (
        lambda: attend(plan=BlockPlan.of(ints(1, 1, 3, 1) + 3, 6, 2)),
        ValueError, "plan: indices must be between -1 and 2, got 3",
    ),
    "index too small": (
        lambda: attend(plan=BlockPlan.of(ints(1, 1, 3, 1) - 2, 6, 2)),
        ValueError, "plan: indices must be between -1 and 2, got -2",
    ),
    "index of 64 bits": (
        lambda: attend(plan=BlockPlan.of(ints(1, 1, 3, 1) + 2**32, 6, 2)),
        ValueError, "plan: indices must be between -1 and 2, got 2147483647",
    ),
    "span before": (
        lambda: attend(plan=BlockPlan.of_spans(ints(1, 1, 3, 1) - 1, ints(1, 1, 3, 1) + 1, 6, 2)),
        ValueError, "plan: starts must be between 0 and 6, got -1",
    ),
    "span beyond": (
        lambda: attend(plan=BlockPlan.of_spans(ints(1, 1, 3, 1), ints(1, 1, 3, 1) + 7, 6, 2)),
        ValueError, "plan: ends must be between 0 and 6, got 7",
    ),
    "indptr beyond": (
        lambda: attend(plan=BlockPlan.of_csr(torch.tensor([[[0, 1, 2, 9]]]), ints(2), 6, 2)),
        ValueError, "plan: indptr must be between 0 and 2, got 9",
    ),
    "indptr falls": (
        lambda: attend(plan=BlockPlan.of_csr(torch.tensor([[[0, 2, 1, 2]]]), ints(2), 6, 2)),
        ValueError, "plan: indptr must be between 2 and 2, got 1",
    ),
    "offsets": (
        lambda: attend(plan=BlockPlan.of(ints(1, 1, 2, 1), 6, blocks([0, 2, 5]), 6, 2)),
        ValueError, "query_blocks: offsets must rise from 0 to the number of tokens, 6",
    ),
    "order": (
        lambda: attend(plan=BlockPlan.of(
            ints(1, 1, 2, 1), 6, 3, 6, blocks([0, 2, 6], [0, 1, 2, 3, 3, 4]))),
        ValueError, "key_blocks: .* order must name each token once",
    ),
    "order short": (
        lambda: attend(plan=BlockPlan.of(ints(1, 1, 2, 1), 6, 3, 6, blocks([0, 6], [0, 1]))),
        ValueError, "key_blocks.order must name 6 tokens, got 2",
    ),
    "offsets type": (
        lambda: attend(plan=BlockPlan.of(ints(1, 1, 1, 1), 6, Blocks((6,), ints(2)))),
        TypeError, "offsets must be an int32 tensor",
    ),
    "is_causal": (lambda: attend(is_causal=1), TypeError, "is_causal must be a bool, got 1"),
    "exclude_self": (lambda: attend(exclude_self=None), TypeError, "exclude_self must be a bool"),
    "sinks": (lambda: attend(sinks=-1), ValueError, "sinks must be at least 0, got -1"),
    "sinks type": (lambda: attend(sinks=1.0), TypeError, "sinks must be an int"),
    "within": (lambda: attend(within=3), TypeError, r"within must be a pair .*right\), got 3"),
    "within side": (lambda: attend(within=(-1, 0)), ValueError, "within must be at least 0"),
    "window": (lambda: attend(window_size=0), ValueError, "window_size must be at least 1, got 0"),
    "window type": (lambda: attend(window_size="all"), TypeError, "window_size must be a pair"),
    "policy type": (lambda: attend(head_policy="list"), TypeError, "head_policy must be a sequ"),
    "policy name": (lambda: attend(head_policy=["list", "all"]), ValueError, "head_policy.*'all'"),
    "policy count": (lambda: attend(head_policy=["off"]), ValueError, "must have 2 entries, got 1"),
    "lengths type": (lambda: attend(key_lengths=x(1)), TypeError, "key_lengths must be an int32"),
    "lengths shape": (lambda: attend(key_lengths=ints(2)), ValueError, r"must have shape \(1,\)"),
    "documents": (
        lambda: attend(query_documents=ints(1, 6)), ValueError, "query_documents and key_doc",
    ),
    "documents shape": (
        lambda: attend(query_documents=ints(1, 6), key_documents=ints(6)),
        ValueError, r"key_documents must have shape \(1, 6\), got \(6,\)",
    ),
    "sink_logits": (lambda: attend(sink_logits=x(3)), ValueError, r"sink_logits .*\(2,\).*\(3,\)"),
    "scale": (lambda: attend(scale=x(2)), TypeError, "scale must be a number"),
    "softcap": (lambda: attend(softcap=0), ValueError, "softcap must be positive"),
    "causal map": (lambda: on_map(is_causal=True), ValueError, "is_causal needs one token axis"),
    "window of a map": (lambda: on_map(window_size=3), ValueError, "window_size needs one token"),
    "streaming map": (
        lambda: on_map(head_policy=["streaming"] * 2), ValueError, "streaming.* needs one token",
    ),
    "sinks out of order": (
        lambda: attend(
            sinks=1, plan=BlockPlan.of(ints(1, 1, 3, 1), 6, 2, 6, blocks([0, 6], [*range(6)]))),
        ValueError, "sinks needs key blocks that are in order",
    ),
    "indices type": (lambda: BlockPlan.of(x(1, 1, 3, 1), 6, 2), TypeError, "indices must be an i"),
    "indices rank": (lambda: BlockPlan.of(ints(1, 3, 1), 6, 2), ValueError, "4 dimensions"),
    "indices blocks": (lambda: BlockPlan.of(ints(1, 1, 2, 1), 6, 2), ValueError, "3 entr.*got 2"),
    "extent": (lambda: BlockPlan.of(ints(1, 1, 2, 1), (6, 6, 6, 6), 2), ValueError, "query_extent"),
    "block": (lambda: BlockPlan.of(ints(1, 1, 2, 1), 6, 0), ValueError, "query_block must be at l"),
    "axes": (
        lambda: BlockPlan.of(ints(1, 1, 3, 1), 6, 2, (2, 3), 1), ValueError, "key_extent .*as many",
    ),
    "bias": (
        lambda: BlockPlan.of(ints(1, 1, 3, 1), 6, 2, bias=x(3)), ValueError, "bias must have the s",
    ),
    "bias type": (
        lambda: BlockPlan.of(ints(1, 1, 3, 1), 6, 2, bias=ints(3)), TypeError, "bias must be a fl",
    ),
    "ends": (
        lambda: BlockPlan.of_spans(ints(1, 1, 3, 1), ints(1, 1, 3, 2), 6, 2), ValueError, "ends mu",
    ),
    "spans of a map": (
        lambda: BlockPlan.of_spans(ints(1, 1, 4, 1), ints(1, 1, 4, 1), (4, 4), 2),
        ValueError, "query_extent must be one token axis",
    ),
    "mask": (lambda: BlockPlan.of_mask(ints(1, 1, 3, 3), 6, 2), TypeError, "mask must be a bool"),
    "mask blocks": (
        lambda: BlockPlan.of_mask(ints(1, 1, 3, 2).bool(), 6, 2), ValueError, r"\(3, 3\).*\(3, 2\)",
    ),
    "csr rank": (
        lambda: BlockPlan.of_csr(ints(1, 1, 4), ints(1, 1), 6, 2), ValueError, "one dimension",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_errors(name):
    wrong, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        wrong()


def test_binary_refuses_what_does_not_fit():
    """Nobody but the operators calls it; it must not leave its tensors all the same."""
    q, k, v, out, lse = *(x(1, 6, 2, 4) for _ in range(4)), x(1, 6, 2)
    i32 = torch.int32
    offsets = torch.tensor([0, 2, 4, 6], dtype=i32)
    good = [
        q, k, v, None, None, x(1, 1, 3, 2, dtype=i32), None, None, offsets, None, offsets, None,
        None, None, None, [], [0, 0, 9, 9, 0, 9, 9, 0], [1, 1], 0.5, 0.0,
    ]  # fmt: skip
    attnext._C.routed_forward(tuple(good), out, lse)
    wrong = {
        1: k[:, :5], 3: x(5), 4: x(3), 5: x(1, 1, 3, 2, dtype=torch.int64), 6: x(5, dtype=i32),
        7: x(3, dtype=torch.int64), 8: offsets[:0], 9: x(5, dtype=i32), 10: offsets[::2],
        12: x(1, 5, dtype=i32), 14: x(2, dtype=i32), 15: [0], 16: [0], 17: [2, 1],
    }  # fmt: skip
    for position, value in wrong.items():
        given = [*good[:position], value, *good[position + 1 :]]
        with pytest.raises((ValueError, TypeError)):
            attnext._C.routed_forward(tuple(given), out, lse)
    with pytest.raises((ValueError, TypeError)):
        attnext._C.routed_forward(tuple(good), out[..., :3], lse)


def test_plans_on_another_device():
    query = torch.randn(1, 40, 2, 8)
    lists = torch.zeros(1, 1, 5, 2, dtype=torch.int32)
    bias = torch.randn(1, 1, 5, 2, device="meta")
    rows = torch.arange(6).reshape(1, 1, 6)
    for name, plan in (
        ("ends", BlockPlan.of_spans(lists, (lists + 8).to("meta"), 40, 8)),
        ("bias", BlockPlan.of(lists, 40, 8, bias=bias)),
        ("indptr", BlockPlan.of_csr(rows.to("meta"), torch.arange(5), 40, 8)),
    ):
        with pytest.raises(ValueError, match=f"plan.{name} must be on the device of query"):
            routed_attention(query, query, query, plan)


def test_blocks_and_spans_beyond_an_int32():
    query = torch.randn(1, 100, 2, 8)
    for size in (2**31, 2**40, 2**62):
        assert Blocks.of(100, size).offsets.tolist() == [0, 100]
    assert torch.equal(
        attnext.moba_attention(query, query, query, 2**31, 1),
        attnext.moba_attention(query, query, query, 100, 1),
    )
    with pytest.raises(ValueError, match="extent must have less than 2"):
        Blocks.of(2**31 + 5, 2**30)
    for start, end in ((2**31, 2**33), (2**40, 2**41), (-(2**40), -(2**35)), (200, 300)):
        span = torch.tensor([[[[start]]]]), torch.tensor([[[[end]]]])
        with pytest.raises(ValueError, match="plan"):
            routed_attention(query, query, query, BlockPlan.of_spans(*span, 100, 100))
    nothing = torch.tensor([[[[2**40]]]]), torch.tensor([[[[2**39]]]])
    plan = BlockPlan.of_spans(*nothing, 100, 100)
    assert not (plan.ends > plan.lists).any()


def test_fake_tensors_leave_nothing_behind():
    """And find nothing: sizes that no other test has."""
    query = torch.randn(1, 103, 2, 8)
    with FakeTensorMode() as mode:
        Blocks.of(103, 16)
        Blocks.of((11, 13), 4)
    expected = attnext.moba_attention(query, query, query, 16, 2)
    assert expected.isfinite().all() and Blocks.of((11, 13), 4).order.sum() == 143 * 142 // 2
    with mode:
        fake = torch.randn(1, 103, 2, 8)
        lists = torch.zeros(1, 1, 7, 1, dtype=torch.int32)
        out = routed_attention(fake, fake, fake, BlockPlan.of(lists, 103, 16))
    assert out.shape == expected.shape


def test_another_default_device():
    query = torch.randn(1, 105, 2, 8)
    expected = attnext.moba_attention(query, query, query, 17, 2)
    ends = torch.tensor([0, 50, 105], dtype=torch.int32)
    torch.set_default_device("meta")
    try:
        assert torch.equal(attnext.moba_attention(query, query, query, 17, 2), expected)
        assert Blocks.of(107, 19).offsets.device.type == "cpu"
        assert attnext.packed_blocks(ends, 16)[0].num_blocks == 8
    finally:
        torch.set_default_device(None)

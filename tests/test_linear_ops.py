# SPDX-License-Identifier: Apache-2.0
"""Linear attention as torch sees it, and wrong calls of it."""

import concurrent.futures

import numpy
import pytest
import torch
from far_apart import far_apart
from linear_problems import (
    F64,
    FORMS,
    assert_same,
    evaluate,
    form,
    normal,
    problem,
)
from torch.utils._python_dispatch import TorchDispatchMode

import attnext
from attnext import (
    linear_attention,
    linear_attention_step,
    taylor_state_from_plain,
    taylor_state_to_plain,
)
from attnext.linear_ops import num_features
from attnext.testing import available_isas, isa

# ---- as torch sees it ----------------------------------------------------------------------------

CALLS = {
    "plain": {},
    "all": {
        "decay": "token", "feature_map": "elu", "normalize": True, "state": True,
        "heads": (1, 2, 4), "batch": 2, "chunk_size": 2,
    },
    "taylor": {"feature_map": "taylor2", "normalize": True, "decay": "head", "dim": 3},
    "delta": {"beta": True, "decay": "token", "state": True, "chunk_size": 4, "reverse": True},
    "packed": {
        "cu_seqlens": torch.tensor([0, 4, 4, 9], dtype=torch.int32), "state": True, "states": 3,
        "decay": "token",
    },
    "blocks": {"window_size": 4, "is_causal": False, "feature_map": "relu"},
}  # fmt: skip


def call(name, dtype=F64):
    return problem(**CALLS[name], dtype=dtype)


def step_call():
    tensors, options = form("delta, decayed", tokens=1, dtype=torch.float32)
    tensors["state"] = tensors.pop("initial_state")
    return tensors, options


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "attnext":
            args = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.detach(), args)
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def record(name):
    with Recorder() as recorder:
        if name == "step":
            tensors, options = step_call()
            linear_attention_step(**tensors, **options)
        else:
            evaluate(linear_attention, *call(name, torch.float32))
    return recorder.calls


def test_every_operator_is_exercised():
    names = torch._C._dispatch_get_all_op_names()
    registered = {n.split(".")[0] for n in names if n.startswith("attnext::linear_")}
    used = {func.name().split(".")[0] for name in (*CALLS, "step") for func, _ in record(name)}
    assert used == registered and len(used) == 3


@pytest.mark.parametrize("name", [*CALLS, "step"])
def test_opcheck(name):
    recorded = record(name)
    assert recorded
    for func, args in recorded:
        torch.library.opcheck(func, args)


@pytest.mark.parametrize("level", available_isas())
@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(name, level):
    tensors, options = call(name)
    names = list(tensors)
    more = {} if "window_size" in options else {"output_final_state": True}

    def flat(*leaves):
        return linear_attention(**dict(zip(names, leaves, strict=True)), **options, **more)

    with isa(level):
        leaves = [x.clone().requires_grad_() for x in tensors.values()]
        assert torch.autograd.gradcheck(flat, leaves, fast_mode=level != available_isas()[-1])


@pytest.mark.parametrize("name", CALLS)
def test_compile_whole_graph(name):
    tensors, options = call(name, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(linear_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    assert_same(evaluate(compiled, tensors, options), evaluate(linear_attention, tensors, options))


def test_compiled_step():
    def step(state, **rest):
        return linear_attention_step(state=state, **rest) * 2

    tensors, options = step_call()
    expected = step(**{n: x.clone() for n, x in tensors.items()}, **options)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    given_state = tensors["state"].clone()
    assert torch.equal(compiled(**{**tensors, "state": given_state}, **options), expected)
    assert not torch.equal(given_state, tensors["state"])


def test_plain_state_of_meta_tensors():
    plain = taylor_state_to_plain(torch.zeros(2, 15, 3, device="meta"), 4)
    assert plain.is_meta and plain.shape == (2, 21, 3)
    assert taylor_state_from_plain(plain, 4).shape == (2, 15, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("feature_map", ["elu", "taylor2"])
def test_a_step_without_a_state_gives_zeros(feature_map, dtype):
    """Padding, whatever it would have been divided by; its neighbour has what it has alone."""
    q, k = (normal(2, 3, 2, 5, dtype=dtype, seed=s) for s in (1, 2))
    v = normal(2, 3, 2, 19, dtype=dtype, seed=3)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    state = torch.rand(3, 2, num_features(feature_map, 5), 20, dtype=acc)
    options = {"feature_map": feature_map, "normalize": True, "eps": 0.0}
    alone = linear_attention_step(q[:1], k[:1], v[:1], state[1:2].clone(), **options)
    out = linear_attention_step(q, k, v, state, slots=torch.tensor([1, -1]), **options)
    assert torch.equal(out[:1], alone) and not out[1].any()


def test_a_state_that_overlaps_itself_is_copied():
    state = torch.rand(100).as_strided((1, 2, 4, 5), (1, 1, 1, 1))
    tensors = [normal(1, 1, 2, dim, dtype=torch.float32, seed=dim) for dim in (4, 4, 5)]
    out, after = linear_attention_step(*tensors, state, in_place=False)
    expected = state.contiguous()
    assert torch.equal(out, linear_attention_step(*tensors, expected))
    assert torch.equal(after, expected)


@pytest.mark.parametrize("name", CALLS)
def test_meta_and_fake_tensors(name):
    tensors, options = call(name, torch.float32)
    more = {} if "window_size" in options else {"output_final_state": True}
    real = linear_attention(**tensors, **options, **more)
    meta = {n: x.to("meta") for n, x in tensors.items()}
    got = linear_attention(**meta, **options, **more)
    for a, b in zip(*((x,) if torch.is_tensor(x) else x for x in (got, real)), strict=True):
        assert a.is_meta and (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("name", ["plain", "all", "packed"])
def test_vmap_of_grad(name):
    tensors, options = call(name)

    def loss(query, key, rest):
        return linear_attention(query, key, **rest, **options).square().sum()

    rest = {n: x for n, x in tensors.items() if n not in ("query", "key")}
    samples = [torch.stack([tensors[n], 2 * tensors[n]]) for n in ("query", "key")]
    got = torch.vmap(torch.func.grad(loss, (0, 1, 2)), (0, 0, None))(*samples, rest)
    for i in range(2):
        expected = torch.func.grad(loss, (0, 1, 2))(*(x[i] for x in samples), rest)
        for a, b in zip(got[:2], expected[:2], strict=True):
            torch.testing.assert_close(a[i], b)
        for n in rest:
            torch.testing.assert_close(got[2][n][i], expected[2][n])


def test_autograd_manners():
    tensors, options = call("all", torch.float32)
    before = {n: x.clone() for n, x in tensors.items()}
    evaluate(linear_attention, tensors, options)
    assert_same(before, tensors)
    assert not linear_attention(**tensors, **options).requires_grad
    leaves = {n: x.clone().requires_grad_() for n, x in tensors.items()}
    with torch.no_grad():
        assert not linear_attention(**leaves, **options).requires_grad
    out = linear_attention(**leaves, **options)
    (grad,) = torch.autograd.grad(out.sum(), leaves["query"], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("level", available_isas())
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_delta_rule_steps_at_every_width(dtype, level):
    """Columns that are one more than whole vectors, or two, or one less."""
    lanes = [n * v + more for n in (4, 8, 16) for v in (1, 4, 8) for more in (-1, 1, 2)]
    generator = torch.Generator().manual_seed(0)
    for columns in sorted(set(lanes)):
        q, k = (torch.randn(1, 3, 1, 8, generator=generator).to(dtype) for _ in range(2))
        value = torch.randn(1, 3, 1, columns, generator=generator).to(dtype)
        state = torch.randn(1, 1, 8, columns, generator=generator).to(dtype)
        options = {"beta": torch.full((1, 3, 1), 0.5, dtype=dtype), "scale": 0.3}
        with isa(level):
            want, after = linear_attention(
                q, k, value, initial_state=state, output_final_state=True, **options
            )
            got = linear_attention_step(q, k, value, state, **options)
        for a, b in ((got, want), (state, after)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4 if dtype != F64 else 1e-11)


def test_a_step_is_seen_by_autograd():
    tensors, options = step_call()
    state = tensors.pop("state")
    weight = torch.ones_like(state).requires_grad_()
    loss = (state * weight).sum()
    linear_attention_step(**tensors, state=state, **options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_vmap_of_a_step():
    tensors, options = step_call()
    slices = {n: torch.stack([x, 2 * x, -x]) for n, x in tensors.items()}

    def step(given):
        return linear_attention_step(**given, **options, in_place=False)

    mapped = torch.func.vmap(step)(slices)
    for i in range(3):
        want = step({n: x[i] for n, x in slices.items()})
        for got, w in zip(mapped, want, strict=True):
            assert torch.equal(got[i], w)
    with pytest.raises(NotImplementedError, match="needs a state for each slice"):
        torch.func.vmap(lambda q: linear_attention_step(**tensors | {"query": q}, **options))(
            slices["query"]
        )


def test_autocast():
    tensors, options = call("all", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_attention(**tensors, **options)
    assert out.dtype == torch.bfloat16
    halves = {n: x.bfloat16() if n in ("query", "key", "value") else x for n, x in tensors.items()}
    assert torch.equal(out, linear_attention(**halves, **options))


def test_results_are_allocated_poisoned(monkeypatch):
    allocated = []
    new_empty = torch.Tensor.new_empty

    def watch(self, *args, **kwargs):
        result = new_empty(self, *args, **kwargs)
        assert result.isnan().all()
        allocated.append(result.data_ptr())
        return result

    monkeypatch.setattr(torch.Tensor, "new_empty", watch)
    for name in FORMS:
        results = evaluate(linear_attention, *form(name, tokens=40, dtype=torch.float32))
        assert results["out"].data_ptr() in allocated
        assert not any(x.isnan().any() for x in results.values())


def test_calls_from_several_python_threads():
    work = [call(name, torch.float32) for name in CALLS] * 3
    expected = [evaluate(linear_attention, *item) for item in work]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        results = pool.map(lambda item: evaluate(linear_attention, *item), work)
        for got, want in zip(results, expected, strict=True):
            assert_same(got, want)


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "tokens", "heads"])
def test_strides_beyond_two_billion_elements(dim, tmp_path):
    def results(tensors):
        named = dict(zip(("query", "key", "value"), tensors, strict=True))
        return evaluate(linear_attention, named, {"feature_map": "elu", "normalize": True})

    parts = far_apart(tmp_path, dim)
    assert_same(results(parts), results([x.contiguous() for x in parts]))


# ---- errors --------------------------------------------------------------------------------------


def x(*shape, **options):
    return torch.zeros(shape, **options)


def attend(*args, **options):
    """The function on small tensors, of which q, k, v replace some."""
    q, k, v = (options.pop(n, None) for n in "qkv")
    given_tensors = (x(1, 6, 2, 4) if t is None else t for t in (q, k, v))
    return linear_attention(*given_tensors, *args, **options)


def step(state=None, **options):
    state = x(1, 2, 4, 4) if state is None else state
    return linear_attention_step(*(x(1, 1, 2, 4) for _ in range(3)), state, **options)


WRONG = {
    "query no tensor": (lambda: attend(q=[1.0]), TypeError, "query must be a tensor, got list"),
    "integers": (lambda: attend(q=x(1, 6, 2, 4, dtype=torch.int64)), TypeError, "query .*int64"),
    "rank": (lambda: attend(q=x(6, 2, 4)), ValueError, "query must be .*batch.*6, 2, 4"),
    "key dtype": (lambda: attend(k=x(1, 6, 2, 4).half()), TypeError, "key must .*float16"),
    "device": (lambda: attend(v=x(1, 6, 2, 4, device="meta")), ValueError, "value .*meta"),
    "tokens": (lambda: attend(k=x(1, 5, 2, 4)), ValueError, "key must .*1, 6.*1, 5"),
    "head_dim": (lambda: attend(k=x(1, 6, 2, 3)), ValueError, "key must have the head_dim .*4.*3"),
    "no dim": (lambda: attend(v=x(1, 6, 2, 0)), ValueError, "value .*at least 1"),
    "heads": (lambda: attend(v=x(1, 6, 3, 4)), ValueError, "query must have a divisor of 3 .*2"),
    "feature map": (lambda: attend(feature_map="exp"), ValueError, "feature_map .*taylor2.*'exp'"),
    "feature maps": (
        lambda: attend(feature_map=numpy.array(["elu", "relu"])), ValueError, "feature_map must be",
    ),
    "is_causal": (lambda: attend(is_causal=1), TypeError, "is_causal must be a bool, got 1"),
    "normalize": (lambda: attend(normalize=None), TypeError, "normalize must be a bool"),
    "reverse": (lambda: attend(reverse="no"), TypeError, "reverse must be a bool"),
    "denominator": (
        lambda: attend(return_denominator=True), ValueError, "return_denominator needs normalize",
    ),
    "output_final_state": (lambda: attend(output_final_state=2), TypeError, "output_final_state"),
    "eps": (lambda: attend(eps=-1.0), ValueError, "eps must not be negative, got -1"),
    "eps size": (lambda: attend(normalize=True, eps=10**400), ValueError, "eps must be finite"),
    "sparse": (lambda: attend(q=x(1, 6, 2, 4).to_sparse()), TypeError, "query must be a dense"),
    "nested": (
        lambda: attend(k=torch.nested.nested_tensor([x(6, 2, 4)])), TypeError,
        "key must be a dense tensor, got a nested tensor",
    ),
    "sparse decay": (lambda: attend(decay=x(2).to_sparse()), TypeError, "decay must be a dense"),
    "sparse state": (
        lambda: attend(initial_state=x(1, 2, 4, 4).to_sparse()), TypeError,
        "initial_state must be a dense tensor",
    ),
    "sparse cu_seqlens": (
        lambda: attend(cu_seqlens=torch.tensor([0, 6], dtype=torch.int32).to_sparse()), TypeError,
        "cu_seqlens must be a dense tensor",
    ),
    "eps type": (lambda: attend(eps="0"), TypeError, "eps must be a number"),
    "scale": (lambda: attend(scale=float("nan")), ValueError, "scale must be finite, got nan"),
    "scale type": (lambda: attend(scale=x(2)), TypeError, "scale must be a number"),
    "decay type": (lambda: attend(decay=0.9), TypeError, "decay must be a floating-point tensor"),
    "decay shape": (lambda: attend(decay=x(1, 6, 3)), ValueError, r"decay .*\(2,\) or \(1, 6, 2\)"),
    "decay order": (lambda: attend(decay=x(2), is_causal=False), ValueError, "decay .*is_causal"),
    "decay device": (lambda: attend(decay=x(2, device="meta")), ValueError, "decay must be on"),
    "beta shape": (lambda: attend(beta=x(2)), ValueError, r"beta must have shape \(1, 6, 2\)"),
    "beta order": (lambda: attend(beta=x(1, 6, 2), is_causal=False), ValueError, "beta needs"),
    "beta sums": (lambda: attend(beta=x(1, 6, 2), normalize=True), ValueError, "beta.*normalize"),
    "beta taylor": (
        lambda: attend(beta=x(1, 6, 2), feature_map="taylor2"), ValueError, "beta.*taylor2",
    ),
    "state type": (lambda: attend(initial_state=0), TypeError, "initial_state must be a floating"),
    "state shape": (
        lambda: attend(initial_state=x(1, 2, 4, 5)), ValueError, r"initial_state .*\(2, 4, 4\)",
    ),
    "state of sums": (
        lambda: attend(initial_state=x(1, 2, 4, 4), normalize=True), ValueError, r"\(2, 4, 5\)",
    ),
    "state count": (
        lambda: attend(initial_state=x(2, 2, 4, 4)), ValueError, "initial_state .*1 sequences.* 2",
    ),
    "window": (lambda: attend(window_size=0), ValueError, "window_size must be at least 1, got 0"),
    "window type": (lambda: attend(window_size=2.0), TypeError, "window_size must be an int"),
    "window state": (
        lambda: attend(window_size=2, output_final_state=True), ValueError, "window_size .*states",
    ),
    "chunk": (lambda: attend(chunk_size=4096), ValueError, "chunk_size must be at most 1024"),
    "chunk 0": (lambda: attend(chunk_size=0), ValueError, "chunk_size must be at least 1"),
    "packing type": (
        lambda: attend(cu_seqlens=torch.tensor([0, 6])), TypeError, "cu_seqlens must be an int32",
    ),
    "packing batch": (
        lambda: linear_attention(*(x(2, 6, 2, 4),) * 3, cu_seqlens=torch.tensor([0, 6]).int()),
        ValueError, "batch size 1 with cu_seqlens, got 2",
    ),
    "packing end": (
        lambda: attend(cu_seqlens=torch.tensor([0, 5]).int()), ValueError, "cu_seqlens must rise",
    ),
    "step state dtype": (
        lambda: step(x(1, 2, 4, 4).double()), TypeError, "state must be torch.float32 .*float64",
    ),
    "step state shape": (lambda: step(x(1, 2, 5, 4)), ValueError, r"state must .*\(2, 4, 4\)"),
    "step state stride": (
        lambda: step(x(1, 2, 4, 8)[..., ::2]), ValueError, "state must have unit stride",
    ),
    "step states": (lambda: step(x(3, 2, 4, 4)), ValueError, "state must have .*1 batch items.*3"),
    "slots elsewhere": (
        lambda: step(slots=torch.tensor([0], device="meta")), ValueError, "slots must be on",
    ),
    "state in one place": (
        lambda: step(state=x(1, 1, 4, 4).expand(1, 2, 4, 4)), ValueError, "state must have a place",
    ),
    "head_dim of a state": (
        lambda: attnext.taylor_state_from_plain(x(21, 4), "4"), TypeError, "head_dim must be",
    ),
    "window_size of 70 bits": (
        lambda: attend(window_size=2**70), ValueError, "window_size must be between",
    ),
    "slots type": (lambda: step(slots=[0]), TypeError, "slots must be an int32 or int64 tensor"),
    "slots shape": (lambda: step(slots=torch.tensor([0, 0])), ValueError, r"slots must be \[B\]"),
    "slots range": (lambda: step(slots=torch.tensor([1])), ValueError, "slots must be between"),
    "slots twice": (
        lambda: linear_attention_step(
            *(x(2, 1, 2, 4),) * 3, x(3, 2, 4, 4), slots=torch.tensor([1, 1])
        ),
        ValueError, "slots must not name a state twice",
    ),
    "in_place": (lambda: step(in_place=0), TypeError, "in_place must be a bool"),
    "step gradient": (
        lambda: step(x(1, 2, 4, 4).requires_grad_()), NotImplementedError, "no gradient",
    ),
    "plain rows": (
        lambda: attnext.taylor_state_to_plain(x(1, 2, 15, 4), 5), ValueError, "21 rows.*head_dim 5",
    ),
    "plain type": (lambda: attnext.taylor_state_from_plain(3, 5), TypeError, "state must be"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_errors(name):
    function, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        function()


@pytest.mark.parametrize("which", range(9))
def test_binary_refuses_what_does_not_fit(which):
    """Nobody but the operators calls it; it must not leave its tensors all the same."""
    q, k, v = (x(1, 6, 2, 4) for _ in range(3))
    state, out = x(1, 2, 4, 4), x(1, 6, 2, 4)
    options = [0, True, False, False, True, 0.5, 0.0, 0, 0]
    attnext._C.linear_forward((q, k, v, None, None, state, None, *options), out, None, None, state)
    wrong = [
        ((q, k[:, :5], v, None, None, state, None, *options), out, None, None, state),
        ((q, k, v, x(1, 6, 3), None, state, None, *options), out, None, None, state),
        ((q, k, v, None, None, x(1, 2, 4, 5), None, *options), out, None, None, state),
        ((q, k, v, None, None, state, [0, 7], *options), out, None, None, state),
        ((q, k, v, None, None, state, None, 9, *options[1:]), out, None, None, state),
        ((q, k, v, None, None, state, None, *options), out[..., :3], None, None, state),
        ((q, k, v, None, None, state, None, *options), out, x(1, 6, 2), None, state),
        ((q, k, v, None, None, state, None, *options), out, None, None, x(1, 2, 4, 8)[..., ::2]),
        ((q, k, v, None, None, state, None, *options), out, None, out[:, :5], state),
    ]
    with pytest.raises((ValueError, TypeError)):
        attnext._C.linear_forward(*wrong[which])

# SPDX-License-Identifier: Apache-2.0
"""The operators of windows as torch sees them: registration, autograd, compile, export, vmap."""

import concurrent.futures
import itertools
import subprocess
import sys
import textwrap

import pytest
import torch
from far_apart import far_apart
from torch.utils._python_dispatch import TorchDispatchMode

import attnext
from attnext import reference
from attnext.testing import available_isas, isa, threads

F64 = torch.float64


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def inputs(*extents, batch=2, heads=2, kv_heads=1, dim=4, dim_v=3, keys=None, dtype=torch.float32):
    keys = extents if keys is None else keys
    return {
        "query": normal(batch, *extents, heads, dim, dtype=dtype, seed=1),
        "key": normal(batch, *keys, kv_heads, dim, dtype=dtype, seed=2),
        "value": normal(batch, *keys, kv_heads, dim_v, dtype=dtype, seed=3),
    }


def modifiers(tensors, bias, dtype=torch.float32):
    """Every tensor option beside query, key and value."""
    batch, *_, heads, dim = tensors["query"].shape
    kv_heads, dim_v = tensors["value"].shape[-2:]
    dtype_kv = tensors["query"].dtype
    return {
        "scale": normal(*tensors["query"].shape[:-1], dtype=dtype, seed=4).abs() * dim**-0.5,
        "bias": normal(heads, *bias, dtype=dtype, seed=5),
        "alibi_slopes": normal(heads, dtype=dtype, seed=6).abs() / 4,
        "sink_logits": normal(heads, dtype=dtype, seed=7),
        "additional_keys": normal(batch, 2, kv_heads, dim, dtype=dtype_kv, seed=8),
        "additional_values": normal(batch, 2, kv_heads, dim_v, dtype=dtype_kv, seed=9),
    }


# name, function, tensors, options: each public function with every option somewhere
def calls(dtype):
    line, plane, box = (
        inputs(7, dtype=dtype),
        inputs(4, 3, dtype=dtype),
        inputs(2, 3, 2, dtype=dtype),
    )
    packed = inputs(9, batch=1, keys=(11,), dtype=dtype)
    bounds = {
        "cu_seqlens_q": torch.tensor([0, 4, 4, 9], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 5, 5, 11], dtype=torch.int32),
    }
    return {
        "neighborhood, plain": (attnext.neighborhood_attention, plane, {"kernel_size": 3}),
        "neighborhood, all": (
            attnext.neighborhood_attention,
            plane | modifiers(plane, (9, 7), dtype),
            {"kernel_size": (3, 2), "stride": 2, "dilation": (2, 1), "boundary": "zero_pad",
             "phase": 1, "softcap": 3.0},
        ),
        "neighborhood, causal, per head": (
            attnext.neighborhood_attention,
            line | modifiers(line, (19,), dtype),
            {"kernel_size": [(3,), (5,)], "is_causal": True, "dilation": 2},
        ),
        "neighborhood, 3-D": (
            attnext.neighborhood_attention, box, {"kernel_size": (1, 2, 2), "boundary": "truncate"},
        ),
        "sliding, plain": (attnext.sliding_window_attention, line, {"window_size": 3}),
        "sliding, all": (
            attnext.sliding_window_attention,
            line | modifiers(line, (19,), dtype),
            {"window_size": (2, 1), "is_causal": False, "sinks": 2, "softcap": 2.0},
        ),
        "sliding, packed": (
            attnext.sliding_window_attention,
            packed | modifiers(packed, (31,), dtype),
            {"window_size": 3, "sinks": 1, **bounds},
        ),
        "window, shifted": (
            attnext.window_attention,
            plane | modifiers(plane, (5, 5), dtype),
            {"window_size": (3, 2), "shift": 1},
        ),
        "window, larger keys": (
            attnext.window_attention, plane, {"window_size": 2, "key_window_size": 4},
        ),
    }  # fmt: skip


CALLS = sorted(calls(torch.float32))


def call(name, dtype=torch.float32):
    return calls(dtype)[name]


def run(function, tensors, options, seed=11):
    """Results and gradients of all floating tensors."""
    leaves = {n: x.detach().clone().requires_grad_() for n, x in tensors.items()}
    results = function(**leaves, **options, return_lse=True)
    cotangents = [normal(*x.shape, seed=seed + i).to(x.dtype) for i, x in enumerate(results)]
    return *results, *torch.autograd.grad(results, list(leaves.values()), cotangents)


def assert_equal(one, other):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0, equal_nan=True)


# Registration


def registered():
    names = torch._C._dispatch_get_all_op_names()
    return {name.split(".")[0] for name in names if name.startswith("attnext::window_")}


class Recorder(TorchDispatchMode):
    """Keeps the calls of our operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "attnext":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def record(name):
    with Recorder() as recorder:
        run(*call(name))
    return recorder.calls


def test_every_operator_is_exercised():
    names = {func.name().split(".")[0] for name in CALLS for func, *_ in record(name)}
    assert names == registered() and names


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    """Schema, fake implementation, autograd registration, AOT dispatch: on calls as they occur."""
    recorded = record(name)
    assert recorded
    for func, args, kwargs in recorded:
        args = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args)
        torch.library.opcheck(func, args, kwargs)


@pytest.mark.parametrize("name", CALLS)
def test_fake_results_have_the_layout_of_real_ones(name):
    from torch._subclasses import FakeTensorMode

    for func, args, _ in record(name):
        real = func(*args)
        with FakeTensorMode() as mode:
            fake = func(*torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, args))
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("name", CALLS)
def test_meta_tensors(name):
    function, tensors, options = call(name)
    meta = {n: x.to("meta") for n, x in tensors.items()}
    real = function(**tensors, **options, return_lse=True)
    for a, b in zip(function(**meta, **options, return_lse=True), real, strict=True):
        assert a.is_meta and (a.shape, a.dtype) == (b.shape, b.dtype)


def test_outputs_are_allocated_poisoned(monkeypatch):
    """The kernels fill what they get: nothing is left of the NaN it held."""
    allocated = []
    new_empty = torch.Tensor.new_empty

    def watch(self, *args, **kwargs):
        result = new_empty(self, *args, **kwargs)
        assert result.isnan().all()
        allocated.append(result)
        return result

    monkeypatch.setattr(torch.Tensor, "new_empty", watch)
    results = run(*call("neighborhood, all"))
    addresses = {x.data_ptr() for x in allocated}
    assert {x.data_ptr() for x in results[:2]} <= addresses
    assert not any(x.isnan().any() for x in results)


# Gradients


@pytest.mark.parametrize("level", available_isas())
@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(name, level):
    """The real kernels in float64 against finite differences, every input and both results."""
    function, tensors, options = call(name, F64)
    names = list(tensors)

    def flat(*leaves):
        return function(**dict(zip(names, leaves, strict=True)), **options, return_lse=True)

    leaves = [x.clone().requires_grad_() for x in tensors.values()]
    with isa(level):
        assert torch.isfinite(flat(*leaves)[1]).all()
        assert torch.autograd.gradcheck(flat, leaves)


def test_gradcheck_of_merge():
    outs = [normal(2, 5, 3, 4, dtype=F64, seed=i).requires_grad_() for i in range(3)]
    lses = [normal(2, 5, 3, dtype=F64, seed=i).requires_grad_() for i in range(3)]

    def merge(*parts):
        return attnext.merge_attentions(parts[:3], parts[3:])

    assert torch.autograd.gradcheck(merge, (*outs, *lses))


@pytest.mark.parametrize("name", CALLS)
def test_second_derivative_is_refused(name):
    function, tensors, options = call(name)
    leaves = {n: x.clone().requires_grad_() for n, x in tensors.items()}
    out = function(**leaves, **options)
    (grad,) = torch.autograd.grad(out.sum(), leaves["query"], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


def test_no_graph_without_need():
    function, tensors, options = call("sliding, plain")
    assert not function(**tensors, **options).requires_grad
    leaves = {n: x.clone().requires_grad_() for n, x in tensors.items()}
    with torch.no_grad():
        assert not function(**leaves, **options).requires_grad
    with torch.inference_mode():
        assert_equal([function(**tensors, **options)], [function(**leaves, **options)])
    assert function(**leaves, **options).requires_grad


def test_inputs_are_not_written():
    function, tensors, options = call("neighborhood, all")
    before = {n: x.clone() for n, x in tensors.items()}
    run(function, tensors, options)
    function(**tensors, **options)
    for name, x in tensors.items():
        assert torch.equal(x, before[name])


# Transformations


@pytest.mark.parametrize("name", CALLS)
def test_compile_whole_graph(name):
    """One graph, dynamic shapes, forward and backward."""
    function, tensors, options = call(name)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    assert_equal(run(compiled, tensors, options), run(function, tensors, options))


@pytest.mark.parametrize("name", ["neighborhood, all", "sliding, all"])
def test_compile_to_code(name):
    """The same with the default compiler, in the middle of code that it fuses."""
    function, tensors, options = call(name)

    def block(query, key, value, **rest):
        out, lse = function(query * 2, key.sin(), value + 1, **rest)
        return out.cos(), lse + 1

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    got, expected = run(compiled, tensors, options), run(block, tensors, options)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_code_serves_other_lengths():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def step(query, key, value):
        return attnext.sliding_window_attention(query, key, value, 3)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for length in (8, 13, 29):
        args = inputs(length).values()
        assert_equal([compiled(*args)], [step(*args)])
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", CALLS)
def test_export(name):
    function, tensors, options = call(name)
    names = list(tensors)

    class Module(torch.nn.Module):
        def forward(self, *leaves):
            return function(**dict(zip(names, leaves, strict=True)), **options, return_lse=True)

    args = tuple(tensors.values())
    program = torch.export.export(Module(), args, strict=True)
    assert any("attnext" in str(node.target) for node in program.graph.nodes)
    assert_equal(program.module()(*args), Module()(*args))


def test_export_with_free_batch_and_length():
    class Module(torch.nn.Module):
        def forward(self, query, key, value):
            return attnext.neighborhood_attention(query, key, value, 3, dilation=2)

    batch, height, width = (
        torch.export.Dim(n, min=2, max=64) for n in ("batch", "height", "width")
    )
    free = {0: batch, 1: height, 2: width}
    program = torch.export.export(
        Module(), tuple(inputs(8, 9, batch=3).values()), dynamic_shapes=(free, free, free)
    )
    other = tuple(inputs(11, 7, batch=5).values())
    assert_equal([program.module()(*other)], [Module()(*other)])


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_autocast(name, half):
    """Query, key and value are cast, modifiers stay as they are; gradients come back in float32."""
    function, tensors, options = call(name)
    with torch.autocast("cpu", dtype=half):
        got = run(function, tensors, options)
    cast = {"query", "key", "value", "additional_keys", "additional_values"}
    halves = {n: x.to(half) if n in cast else x for n, x in tensors.items()}
    expected = run(function, halves, options)
    assert got[0].dtype == half and got[1].dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in got[2:])
    assert_equal(got, [*expected[:2], *(g.float() for g in expected[2:])])


@pytest.mark.parametrize("name", CALLS)
def test_func_grad(name):
    """torch.func sees the same gradients as autograd."""
    function, tensors, options = call(name)

    def loss(leaves):
        out, lse = function(**leaves, **options, return_lse=True)
        return (out.float() * normal(*out.shape, seed=11)).sum() + (
            lse * normal(*lse.shape, seed=12)
        ).sum()

    got = torch.func.grad(loss)(tensors)
    expected = run(function, tensors, options)[2:]
    assert_equal([got[n] for n in tensors], expected)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("what", ["queries", "everything", "back"])
def test_vmap(name, what):
    """A mapped dimension in front, at the back, in some of the tensors, in all of them."""
    function, tensors, options = call(name)
    names = list(tensors)
    mapped = {"query"} if what == "queries" else set(names)
    where = 1 if what == "back" else 0
    size = 3
    stacks = {
        n: torch.stack([x * (1 + 0.25 * i) for i in range(size)], dim=min(where, x.dim()))
        if n in mapped else x
        for n, x in tensors.items()
    }  # fmt: skip
    dims = tuple(min(where, tensors[n].dim()) if n in mapped else None for n in names)

    def one(*leaves):
        return function(**dict(zip(names, leaves, strict=True)), **options, return_lse=True)

    got = torch.vmap(one, in_dims=dims)(*(stacks[n] for n in names))
    slices = [
        one(*(stacks[n].select(d, i) if d is not None else stacks[n]
              for n, d in zip(names, dims, strict=True)))
        for i in range(size)
    ]  # fmt: skip
    expected = [torch.stack(parts) for parts in zip(*slices, strict=True)]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CALLS)
def test_gradients_per_sample(name):
    function, tensors, options = call(name)

    def loss(query, key, value, rest):
        return function(query, key, value, **rest, **options).square().sum()

    rest = {n: x for n, x in tensors.items() if n not in ("query", "key", "value")}
    samples = [torch.stack([tensors[n], 2 * tensors[n]]) for n in ("query", "key", "value")]
    got = torch.vmap(torch.func.grad(loss, (0, 1, 2, 3)), (0, 0, 0, None))(*samples, rest)
    each = [torch.func.grad(loss, (0, 1, 2, 3))(*(x[i] for x in samples), rest) for i in range(2)]
    for k in range(3):
        torch.testing.assert_close(got[k], torch.stack([grads[k] for grads in each]))
    for option in rest:
        expected = torch.stack([grads[3][option] for grads in each])
        torch.testing.assert_close(got[3][option], expected)


# The process around


def forward_arguments():
    """A call of the binary's window_forward."""
    query, key, value = (normal(1, 6, 2, 4, seed=i) for i in range(3))
    rules = [2, 2, 1, 0, 1, 0, 0, 0]
    return [query, key, value, *(None,) * 7, rules, [], 0.5, 0.0, 0], torch.empty(1, 6, 2, 4)


@pytest.mark.parametrize(
    "where, what",
    [
        ("out", torch.empty(1, 6, 2, 3)),
        ("out", torch.empty(1, 5, 2, 4)),
        ("out", torch.empty(1, 6, 2, 4, dtype=torch.bfloat16)),
        ("out", torch.empty(1, 6, 2, 4, device="meta")),
        ("out", torch.empty(1, 6, 2, 4, 1)),
        ("out", torch.empty(1, 1, 1, 1, 1, 1, 1)),
        ("out", torch.empty(())),
        ("out", torch.empty(1, 6, 2, 8)[..., ::2]),
        ("out", None),
        ("out", object()),
        (0, torch.ones(1, 6, 2, 4, dtype=torch.int32)),
        (0, torch.ones(4)),
        (1, torch.ones(1, 6, 2, 3)),
        (1, torch.ones(2, 6, 2, 4)),
        (2, torch.ones(1, 7, 2, 4)),
        (3, torch.ones(1, 6, 1)),
        (4, torch.ones(2, 3)),
        (5, torch.ones(1, 6, 2, 4)),
        (7, torch.ones(3)),
        (7, torch.ones(4)[::2]),
        (8, [0, 5]),
        (9, [0, 6]),
        (10, [2, 2, 1]),
        (10, []),
        (10, None),
        (10, [2, 2, 1, 0, 1, 0, 7, 0]),
        (11, [0, 1]),
        (12, "0.5"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, torch.Tensor) or type(x) is object else str(x),
)
def test_binary_refuses_what_does_not_fit(where, what):
    """Nobody but the operators calls it; it must not leave its tensors all the same."""
    problem, out = forward_arguments()
    attnext._C.window_forward(tuple(problem), out, None)
    if where == "out":
        out = what
    else:
        problem[where] = what
    with pytest.raises((ValueError, TypeError, AttributeError, RuntimeError)):
        attnext._C.window_forward(tuple(problem), out, None)
    with pytest.raises((ValueError, TypeError)):
        attnext._C.window_forward(tuple(problem[:-1]), out, None)


def test_tensors_are_read_alike_without_dlpack():
    """As under a torch that does not offer DLPack's C interface."""
    code = """
        import torch
        {before}
        import attnext
        from attnext import testing
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(4, 2, 3, 9, 7, 4, generator=generator)
        query, key, value, grad = x.movedim(2, -2)
        bias = torch.randn(3, 5, 5, generator=generator)
        tensors = dict(query=query, key=key, value=value, bias=bias)
        results = testing.evaluate(
            attnext.neighborhood_attention, tensors, dict(kernel_size=3), (grad, grad[..., 0])
        )
        problem = (query.to(torch.int8), *(None,) * 9, [], [], 1.0, 0.0, 0)
        try:
            attnext._C.window_forward(problem, query, None)
        except TypeError as error:
            print(error, {{name: result.tolist() for name, result in results.items()}})
    """
    printed = [
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code.format(before=before))],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for before in ("", "torch.Tensor.__dlpack_c_exchange_api__ = None")
    ]
    assert printed[0] == printed[1] != ""


def test_calls_from_several_python_threads():
    work = [call(name) for name in CALLS] * 4
    expected = [run(*item) for item in work]
    for count in (1, 2):
        with threads(count), concurrent.futures.ThreadPoolExecutor(8) as pool:
            for got, want in zip(pool.map(lambda item: run(*item), work), expected, strict=True):
                assert_equal(got, want)


@pytest.mark.parametrize("which", ["scale", "alibi", "decay"])
def test_gradient_of_a_single_number_has_the_same_bits_on_any_threads(which):
    """torch sums what ends in one number in as many parts as it has threads."""
    results = []
    for count in (1, 2, 3):
        torch.manual_seed(0)
        with threads(count):
            q, k, v, cotangent = (torch.randn(1, 40000, 1, 4) for _ in range(4))
            leaf = torch.full((1,), 0.3, requires_grad=True)
            if which == "scale":
                out = attnext.sliding_window_attention(q, k, v, 8, scale=leaf)
            elif which == "decay":
                out = attnext.linear_attention(q, k, v, decay=-leaf)
            else:
                q, k, v, cotangent = (t[:, :1000].view(1, 10, 10, 10, 1, 4) for t in (q, k, v, v))
                bias = torch.zeros(1, 45, 45, 45)
                out = attnext.na3d(q, k, v, 10, alibi_slopes=leaf, bias=bias)
            results.append(torch.autograd.grad(out, leaf, cotangent)[0])
    assert results[0] == results[1] == results[2]


def test_call_in_a_forked_child():
    """Fork after threads have run: the child computes the same, and does not hang."""
    code = textwrap.dedent(
        """
        import os, sys, torch, attnext

        torch.set_num_threads(2)
        x = torch.arange(2 * 64 * 4 * 16.0).reshape(2, 64, 4, 16).sin()

        def run():
            leaf = x.clone().requires_grad_()
            out = attnext.sliding_window_attention(leaf, leaf, leaf, 9)
            out.sum().backward()
            return out, leaf.grad

        expected = run()
        child = os.fork()
        if child == 0:
            got = run()
            os._exit(0 if all(torch.equal(a, b) for a, b in zip(got, expected)) else 1)
        _, status = os.waitpid(child, 0)
        again = run()
        assert all(torch.equal(a, b) for a, b in zip(again, expected))
        sys.exit(os.waitstatus_to_exitcode(status))
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code], timeout=120, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# Large offsets


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "tokens", "heads"])
def test_strides_beyond_two_billion_elements(dim, tmp_path):
    parts = far_apart(tmp_path, dim)

    def both(tensors):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = attnext.sliding_window_attention(*leaves, 3)
        return out, *torch.autograd.grad(out, leaves, normal(*out.shape, seed=5).to(out.dtype))

    assert_equal(both(parts), both([x.contiguous() for x in parts]))


@pytest.mark.heavy
def test_output_of_more_than_two_billion_elements():
    """The output itself crosses 2**31 elements; inputs are one token, expanded."""
    heads, dim, length = 16, 64, 2**21 + 3
    token = normal(1, 1, heads, dim).bfloat16()
    x = token.expand(1, length, heads, dim)
    torch.use_deterministic_algorithms(False)
    out = attnext.sliding_window_attention(x, x, x, 2)
    assert out.numel() > 2**31
    for i in itertools.chain((0, 1, 2**20), range(length - 5, length)):
        assert torch.equal(out[0, i], token[0, 0])


def test_reference_agrees_with_these_calls():
    """The calls above mean what the specification says they do."""
    for name in CALLS:
        function, tensors, options = call(name, F64)
        expected = getattr(reference, function.__name__)(**tensors, **options, return_lse=True)
        for a, b in zip(function(**tensors, **options, return_lse=True), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)

# SPDX-License-Identifier: Apache-2.0
"""When tables are uploaded to a GPU, kept and dropped: against a torch that only plays one."""

from __future__ import annotations

import contextlib
import gc
import types
import weakref
from typing import Any, cast

import pytest
import torch

from attnext import _C, device_tables, linear_ops, ops
from attnext.device_tables import DeviceTables

DEVICE = torch.device("cuda", 0)


class Tables:
    """As the binary's: the object is the key."""

    def __init__(self, ints: int = 4) -> None:
        self.ints = ints

    def data(self) -> bytes:
        return bytes(4 * self.ints)


class Upload:
    def __init__(self, ints: int) -> None:
        self.nbytes = 4 * ints
        self.readers: list[int] = []

    def record_stream(self, stream: Any) -> None:
        self.readers.append(stream.cuda_stream)

    def data_ptr(self) -> int:
        return 0


class Gpu:
    def __init__(self) -> None:
        self.uploads, self.stream, self.capturing = 0, 7, False


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
    monkeypatch.setattr(
        torch.cuda,
        "current_stream",
        lambda device: types.SimpleNamespace(cuda_stream=gpu.stream),
    )

    def upload(self: DeviceTables, tables: Tables, device: torch.device) -> Upload:
        gpu.uploads += 1
        return Upload(tables.ints)

    monkeypatch.setattr(DeviceTables, "_upload", upload)
    return gpu


def get(kept: DeviceTables, tables: Tables) -> Any:
    return kept.get(tables, DEVICE, "window_forward")


def test_once_for_a_geometry_and_noted_once_for_a_stream(gpu: Gpu) -> None:
    kept, tables = DeviceTables(), Tables()
    first = get(kept, tables)
    assert get(kept, tables) is first and first.readers == [7] and gpu.uploads == 1
    gpu.stream = 8
    assert get(kept, tables) is first and first.readers == [7, 8]
    assert kept.get(tables, torch.device("cuda", 1), "window_forward") is not first


def test_a_capture_without_warm_up_is_refused(gpu: Gpu) -> None:
    kept, tables = DeviceTables(), Tables()
    gpu.capturing = True
    with pytest.raises(
        RuntimeError, match=r"attnext window_forward: .* warm up.* before the capture"
    ):
        get(kept, tables)
    assert gpu.uploads == 0
    gpu.capturing = False
    get(kept, tables)
    gpu.capturing = True
    get(kept, tables)
    assert gpu.uploads == 1


def test_what_a_graph_reads_is_kept_for_good(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_tables, "_KEPT", 2)
    kept, tables = DeviceTables(), Tables()
    first = get(kept, tables)
    gpu.capturing = True
    assert get(kept, tables) is first
    gpu.capturing = False
    for _ in range(5):
        get(kept, Tables())
    assert get(kept, tables) is first


def test_the_least_recently_used_is_dropped(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_tables, "_KEPT", 2)
    monkeypatch.setattr(device_tables, "_KEPT_BYTES", 400)
    kept, (a, b, c) = DeviceTables(), (Tables() for _ in range(3))
    first = get(kept, a)
    get(kept, b)
    assert get(kept, a) is first
    get(kept, c)  # b goes
    assert gpu.uploads == 3 and get(kept, a) is first
    get(kept, b)
    assert gpu.uploads == 4
    large = get(kept, Tables(200))  # more than all may have: it is kept alone
    assert gpu.uploads == 5 and get(kept, a) is not first and large.nbytes == 800


class OnGpu:
    """Of a tensor, what a call asks before its launch."""

    device = DEVICE

    def new_empty(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype)

    def get_device(self) -> int:
        return 0


def test_tables_outlive_a_launch(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """With those of the keys, and with those of other threads, there are more than may be kept."""
    uploads: list[weakref.ref[Upload]] = []
    launched = []

    def upload(self: DeviceTables, tables: Any, device: torch.device) -> Upload:
        one = Upload(4)
        uploads.append(weakref.ref(one))
        return one

    class Call:
        workspace_bytes, sequences = 0, b"one"

        def __init__(self, problem: Any) -> None:
            self.queries, self.keys = Tables(), Tables()

        def run(self, *arguments: Any) -> None:
            gc.collect()
            launched.append([one() is not None for one in uploads])
            uploads.clear()

    class Query(OnGpu):
        """Beside whose calls another thread makes one."""

        def new_empty(self, size: int, dtype: torch.dtype) -> torch.Tensor:
            linear_ops._TABLES.get(Tables(), DEVICE, "linear_forward")
            uploads.pop()
            return super().new_empty(size, dtype)

    monkeypatch.setattr(device_tables, "_KEPT", 1)
    monkeypatch.setattr(DeviceTables, "_upload", upload)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(ops, "_C", types.SimpleNamespace(CudaBackward=Call))
    monkeypatch.setattr(ops, "_backward_tensors", lambda *args: ((), ()))
    monkeypatch.setattr(ops, "_native", lambda problem: problem)
    monkeypatch.setattr(ops, "_TABLES", DeviceTables())
    monkeypatch.setattr(linear_ops, "_TABLES", DeviceTables())
    ops._window_backward_cuda(OnGpu(), *range(5))
    linear_ops._run_cuda(Call(None), cast(Any, Query()), "linear_forward")
    assert launched == [[True, True], [True]]


def test_the_binary_gives_the_same_tables_for_the_same_geometry() -> None:
    """Packed sequences and long ones too: else each call would upload."""

    class OnCuda:
        is_cpu, is_cuda = False, True

        def __init__(self, *shape: int) -> None:
            x = self.x = torch.empty(1).expand(shape)
            self.dtype, self.shape, self.data_ptr = x.dtype, x.shape, x.data_ptr
            self.stride = lambda: (*x.stride()[:-1], 1)

    def tables(tokens: int, ends: list[int] | None) -> Any:
        x = OnCuda(1, tokens, 1, 32)
        rule = [8, 0, 1, 0, 1, 1, 1, 0]
        return _C.CudaForward((x, x, x, *(None,) * 5, ends, ends, rule, [], 1.0, 0.0, 0)).queries

    packed = tables(90, [0, 40, 90])
    assert tables(90, [0, 40, 90]) is packed
    assert tables(90, [0, 41, 90]) is not packed and tables(90, None) is not packed
    long = tables(200_000, None)
    assert tables(200_000, None) is long


# ---- the operators on tensors that only say they are on a GPU ------------------------------------


@contextlib.contextmanager
def fakes() -> Any:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        yield lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_shapes_on_a_gpu(dtype: torch.dtype) -> None:
    import attnext

    with fakes() as empty:
        q, k = empty(2, 9, 8, 4, 64, dtype=dtype), empty(2, 9, 8, 2, 64, dtype=dtype)
        v = empty(2, 9, 8, 2, 32, dtype=dtype)
        out, lse = attnext.na2d(q, k, v, 3, return_lse=True)
        assert (out.device, out.dtype, out.shape) == (q.device, dtype, (2, 9, 8, 4, 32))
        assert (lse.device, lse.dtype, lse.shape) == (q.device, torch.float32, (2, 9, 8, 4))
        problem = (q, k, v, *(None,) * 7, [1, 1, 1, 0, 1, 0, 0, 0] * 2, [], 0.1, 0.0, 0)
        needs = [True] * 3 + [False] * 5
        grads = torch.ops.attnext.window_backward(*problem, out, lse, out, None, needs)
        for grad, x in zip(grads, (q, k, v), strict=False):
            assert (grad.device, grad.dtype, grad.shape) == (x.device, x.dtype, x.shape)


def test_sequence_ends_on_either_side() -> None:
    """cu_seqlens may lie on the CPU beside CUDA tensors; what lies on the GPU is fetched."""
    import attnext

    with fakes() as empty:
        x = empty(1, 90, 2, 64)
        for device in ("cpu", "cuda"):
            ends = torch.empty(4, dtype=torch.int32, device=device)
            out = attnext.sliding_window_attention(x, x, x, 9, cu_seqlens_q=ends)
            assert out.device == x.device and out.shape == x.shape


def test_autocast_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import attnext

    monkeypatch.setattr(torch._C, "_is_any_autocast_enabled", lambda: True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    with fakes() as empty:
        x = empty(1, 90, 2, 64, dtype=torch.float32)
        assert attnext.sliding_window_attention(x, x, x, 9).dtype == torch.float16  # torch's choice


def test_one_graph_on_a_gpu() -> None:
    """Traced with CUDA tensors: the operator stands in the graph, and nothing else touches them."""
    from torch.fx.experimental.proxy_tensor import make_fx

    import attnext

    def call(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = attnext.sliding_window_attention(x, x, x, 9)
        return out

    with fakes() as empty:
        graph = make_fx(call)(empty(1, 90, 2, 64)).graph
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    assert torch.ops.attnext.window_forward.default in targets


def test_the_current_device_is_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a call happens with the query's device the current one, and on its stream."""
    seen: list[Any] = []

    @contextlib.contextmanager
    def device(where: torch.device) -> Any:
        seen.append(("enter", where.index))
        yield
        seen.append(("leave", where.index))

    class Call:
        workspace_bytes, queries = 0, None

        def __init__(self, problem: Any) -> None:
            seen.append("plan")

        def run(self, *arguments: Any) -> None:
            seen.append(("run", *arguments[-2:]))

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(
        torch.cuda,
        "current_stream",
        lambda where: types.SimpleNamespace(cuda_stream=40 + where.index),
    )
    monkeypatch.setattr(ops, "_C", types.SimpleNamespace(CudaForward=Call))
    monkeypatch.setattr(ops._TABLES, "get", lambda *_: torch.empty(0))

    class Query(torch.Tensor):
        device = torch.device("cuda", 3)  # type: ignore[assignment]

        def get_device(self) -> int:
            return 3

    query = torch.empty(1, 4, 1, 8).as_subclass(Query)
    ops._window_forward_cuda(query, query, query, *(None,) * 7, [], [], 1.0, 0.0, 0)
    assert seen == [("enter", 3), "plan", ("run", 3, 43), ("leave", 3)]

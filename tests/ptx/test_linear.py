# SPDX-License-Identifier: Apache-2.0
"""The kernels of linear attention under the executor, through attnext's public function.

Every launch is checked for accesses out of bounds, reads of what was not written and races; outputs
start as NaN and must be written whole; results are held to the float64 recurrence.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_problems import assert_close, evaluate, expect, problem
from strategies import lay_out
from torch import Tensor

import attnext
from attnext import _C, reference
from attnext.gpu_check.linear import BUDGET, PROBLEMS, compare, slack

from .linear import on_executor
from .window import DeviceTensor

linear_attention: Any = attnext.linear_attention  # its options come as a mapping
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BF16 = torch.bfloat16


def check(
    tensors: dict[str, Tensor], options: dict[str, Any], grads: bool = True, few: float = 1.0
) -> Any:
    """Results and gradients within the budget; gives the reports. ``few``: what a problem may be
    off, times the budget, where its numbers are too few for their mean."""
    dtype = tensors["query"].dtype
    with on_executor(metrics=False) as recorder:
        got = evaluate(linear_attention, tensors, options, grads)
    assert got["out"].dtype == dtype
    assert_close(
        got,
        expect(tensors, options, grads),
        few * BUDGET[dtype],
        slack(dtype, bool(options.get("normalize")), "beta" in tensors),
    )
    return recorder.reports


FORMS: dict[str, dict[str, Any]] = {
    "identity": {},
    "elu, normalized, decayed": {"feature_map": "elu", "normalize": True, "decay": "token"},
    "relu, decayed": {"feature_map": "relu", "decay": "head"},
    "not causal": {"feature_map": "elu", "normalize": True, "is_causal": False},
    "reverse": {"reverse": True, "decay": "token"},
}


def form(name: str, **more: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    defaults = {"tokens": 70, "heads": (1, 1, 1), "dim": 32, "dim_v": 24, "state": True}
    made: tuple[dict[str, Tensor], dict[str, Any]] = problem(
        **{**defaults, "dtype": BF16, **FORMS[name], **more}
    )
    return made


# ---- whatever may come ---------------------------------------------------------------------------


@st.composite
def problems(draw: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    options: dict[str, Any] = {
        "feature_map": draw(st.sampled_from(["identity", "elu", "relu"])),
        "is_causal": draw(st.sampled_from([True, True, False])),
        "reverse": draw(st.booleans()),
        "normalize": draw(st.booleans()),
    }
    if options["normalize"]:
        options["eps"] = 1.0  # sums near 0 would be a matter of luck
    elif draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.25, -0.5]))
    tokens, batch, states = draw(st.integers(1, 140)), draw(st.integers(1, 2)), None
    division = draw(st.sampled_from(["whole", "packed", "blocks"]))
    if division == "packed":
        batch = 1
        inner = draw(st.lists(st.integers(0, tokens), max_size=3))
        bounds = [0, *sorted(inner), tokens]
        options["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
        states = len(bounds) - 1
    elif division == "blocks":
        options["window_size"] = draw(st.integers(10, 90))
    decay = draw(st.sampled_from([None, "head", "token"])) if options["is_causal"] else None
    made: tuple[dict[str, Tensor], dict[str, Any]] = problem(
        tokens, batch, draw(st.sampled_from([(1, 1, 1), (1, 1, 2), (2, 1, 1)])),
        draw(st.integers(1, 32)), draw(st.integers(1, 32)), dtype=draw(st.sampled_from(DTYPES)),
        state=division != "blocks" and draw(st.booleans()), states=states, decay=decay, **options,
    )  # fmt: skip
    return made


@settings(max_examples=5)
@given(problems())
def test_random_problems(given_problem: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    tensors, options = given_problem
    half = tensors["query"].dtype.itemsize == 2
    if half and options["normalize"] and options["feature_map"] == "identity":
        options["feature_map"] = "elu"  # of signed features the sums may be near -1 too
    check(tensors, options, few=1.6)


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 129])
def test_lengths(tokens: int) -> None:
    check(*form("elu, normalized, decayed", tokens=tokens))


def test_no_tokens() -> None:
    tensors, options = form("identity", tokens=0)
    with on_executor():
        got = evaluate(linear_attention, tensors, options)
    assert torch.equal(got["final_state"], tensors["initial_state"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "dim_v"), [(16, 64), (53, 30), (128, 70)])
def test_every_bucket(dim: int, dim_v: int, dtype: torch.dtype) -> None:
    tokens = 34 if dtype == torch.float32 else 66
    check(*form("elu, normalized, decayed", tokens=tokens, dim=dim, dim_v=dim_v, dtype=dtype))


@pytest.mark.parametrize(
    ("dim", "dim_v", "dtype"),
    [
        (256, 40, BF16),
        (129, 130, torch.float32),
        pytest.param(24, 250, BF16, marks=pytest.mark.heavy),
        pytest.param(256, 256, torch.float16, marks=pytest.mark.heavy),
        pytest.param(24, 250, torch.float32, marks=pytest.mark.heavy),
        pytest.param(256, 40, torch.float32, marks=pytest.mark.heavy),
    ],
)
def test_wide_rows(dim: int, dim_v: int, dtype: torch.dtype) -> None:
    """Chunks of 32 tokens, of 16 in fp32, in all scans of a problem, whichever rows are wide."""
    chunk = 16 if dtype == torch.float32 else 32
    wide = {"dim": dim, "dim_v": dim_v, "dtype": dtype}
    check(*form("elu, normalized, decayed", tokens=chunk + 5, **wide))
    delta = form("identity", tokens=chunk + 8, **wide, beta=True, decay="token")
    check(*delta, few=1.25)  # gradients of beta are one number a token
    check(*form("reverse", tokens=9 * chunk - 1, **wide, decay=None), grads=False)  # in segments


@pytest.mark.parametrize(("dim", "dtype"), [(7, torch.float32), (16, BF16), (16, torch.float16)])
def test_taylor_features(dim: int, dtype: torch.dtype) -> None:
    more = {"feature_map": "taylor2", "normalize": True, "dim": dim, "dim_v": 40, "dtype": dtype}
    check(*form("identity", tokens=65, **more, decay="token"))
    check(*form("identity", tokens=65, **more))


@pytest.mark.parametrize(
    ("dim", "dtype"),
    [
        (17, BF16),
        pytest.param(33, torch.float16, marks=pytest.mark.heavy),
        pytest.param(64, BF16, marks=pytest.mark.heavy),
        pytest.param(20, torch.float32, marks=pytest.mark.heavy),
    ],
)
def test_taylor_features_of_many_entries(dim: int, dtype: torch.dtype) -> None:
    more = {"feature_map": "taylor2", "dim": dim, "dim_v": 24, "dtype": dtype}
    check(*form("identity", tokens=66, **more, decay="token", normalize=True), grads=dim < 64)
    if dim == 64:
        check(*form("identity", tokens=66, **more, decay="token"))
    check(*form("reverse", tokens=66, **more, decay=None, normalize=dim > 17))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_decays_beside_taylor_features(dtype: torch.dtype) -> None:
    more = {"feature_map": "taylor2", "dtype": dtype}
    check(*form("reverse", tokens=70, **more, dim=16))
    check(*form("identity", tokens=20, **more, dim=3, dim_v=8, decay="head", heads=(4, 2, 1)))
    ends = torch.tensor([0, 0, 66, 67, 90], dtype=torch.int32)
    packed = {"states": 4, "cu_seqlens": ends, "normalize": True}
    check(*form("reverse", tokens=90, **more, **packed, dim=5, dim_v=8))


@pytest.mark.parametrize(
    ("dim", "tokens", "dtype"),
    [
        (5, 70, BF16),
        pytest.param(5, 270, torch.float32, marks=pytest.mark.heavy),
        pytest.param(20, 40, torch.float16, marks=pytest.mark.heavy),
    ],
)
def test_gradients_of_decays_beside_taylor_features_and_wide_values(
    dim: int, tokens: int, dtype: torch.dtype
) -> None:
    """Each part of the columns has states of its own, in segments too."""
    more = {"feature_map": "taylor2", "dim": dim, "dim_v": 70, "dtype": dtype, "decay": "token"}
    check(*form("identity", tokens=tokens, **more))
    blocks = {"window_size": 40, "state": False, "normalize": True}
    check(*form("reverse", tokens=tokens, **more, **blocks))


def test_a_decay_beside_taylor_features_that_lets_nothing_through() -> None:
    for dtype in (torch.float32, BF16):
        more = {"feature_map": "taylor2", "dim": 5, "dim_v": 8, "dtype": dtype}
        tensors, options = form("identity", tokens=80, decay="token", **more)
        tensors["decay"][:, ::7] = -50.0
        check(tensors, options)


@pytest.mark.parametrize(
    ("dim", "dim_v", "dtype", "tokens"),
    [
        (5, 65, BF16, 40),
        pytest.param(16, 128, torch.float32, 300, marks=pytest.mark.heavy),
        pytest.param(16, 200, BF16, 40, marks=pytest.mark.heavy),
        pytest.param(17, 100, torch.float16, 70, marks=pytest.mark.heavy),
    ],
)
def test_taylor_features_beside_wide_values(
    dim: int, dim_v: int, dtype: torch.dtype, tokens: int
) -> None:
    """Their gradient sums over all columns of the values, of which a scan has 64."""
    more = {"feature_map": "taylor2", "dim": dim, "dim_v": dim_v, "dtype": dtype}
    check(*form("reverse", tokens=tokens, **more, decay=None))
    check(*form("identity", tokens=tokens, **more, normalize=True))
    few = 1.25  # outputs of 20 tokens, read off a rounded state
    check(*form("identity", tokens=20, **more, normalize=True, is_causal=False), few=few)


@pytest.mark.heavy
def test_taylor_features_of_many_entries_in_segments() -> None:
    more = {"feature_map": "taylor2", "normalize": True, "dim": 17, "dim_v": 8}
    check(*form("identity", tokens=270, dtype=torch.float32, **more))
    check(*form("identity", tokens=70, **more, is_causal=False))


@pytest.mark.parametrize(("dim", "dtype"), [(20, torch.float32), (64, BF16), (20, torch.float16)])
def test_delta_rule(dim: int, dtype: torch.dtype) -> None:
    more = {"beta": True, "dim": dim, "dim_v": 40, "dtype": dtype}
    check(*form("identity", tokens=97, **more))
    check(*form("reverse", tokens=20, **more))


def test_delta_rule_of_packed_sequences() -> None:
    ends = torch.tensor([0, 0, 66, 67, 90], dtype=torch.int32)
    more = {"beta": True, "states": 4, "cu_seqlens": ends, "feature_map": "relu"}
    check(*form("reverse", tokens=90, **more))


@pytest.mark.parametrize("heads", [(1, 1, 3), (4, 2, 1)])
def test_delta_rule_of_heads_that_share_tensors(heads: tuple[int, int, int]) -> None:
    check(*form("reverse", tokens=20, heads=heads, batch=2, dim=8, dim_v=8, beta=True))


def test_delta_rule_where_nothing_is_written() -> None:
    """beta of 0 and of 1, and decays that let nothing through."""
    tensors, options = form("reverse", tokens=70, beta=True, dtype=torch.float32, dim=8, dim_v=40)
    tensors["beta"][:, ::3] = 0.0
    tensors["beta"][:, 1::3] = 1.0
    tensors["decay"][:, ::7] = -50.0
    check(tensors, options)


def test_taylor_features_in_segments() -> None:
    more = {"feature_map": "taylor2", "normalize": True, "dim": 5, "dim_v": 8}
    check(*form("identity", tokens=260, dtype=torch.float32, **more))
    check(*form("reverse", tokens=40, **more, decay=None))
    check(*form("identity", tokens=70, **more, is_causal=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [n for n in FORMS if n != "elu, normalized, decayed"])
def test_forms(name: str, dtype: torch.dtype) -> None:
    check(*form(name, dtype=dtype))


@pytest.mark.parametrize("heads", [(1, 1, 3), (4, 2, 1)])
def test_heads_that_share_tensors(heads: tuple[int, int, int]) -> None:
    check(*form("elu, normalized, decayed", tokens=20, heads=heads, batch=2, dim=8, dim_v=8))


# ---- segments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("name", ["elu, normalized, decayed", "not causal", "reverse"])
def test_segments(name: str, dtype: torch.dtype) -> None:
    tokens = 300 if dtype == torch.float32 else 570
    reports = check(*form(name, tokens=tokens, dim=20, dim_v=12, dtype=dtype))
    assert any(r.kernel == "linear_combine" for r in reports)


def test_segments_of_packed_sequences() -> None:
    ends = torch.tensor([0, 0, 290, 291, 291, 420], dtype=torch.int32)
    for name in ("elu, normalized, decayed", "not causal"):
        tensors, options = form(
            name, tokens=420, dim=8, dim_v=8, dtype=torch.float32, states=5, cu_seqlens=ends
        )
        reports = check(tensors, options)
        assert any(r.kernel == "linear_combine" for r in reports)


def test_gradients_of_decays_of_many_short_sequences() -> None:
    """Scratch is for the chunks that there are, not for as many in each sequence."""

    def workspace(ends: list[int]) -> int:
        x = on_device(1, ends[-1], 1, 32)
        decay = on_device(1, ends[-1], 1, dtype=torch.float32)
        rest = (None, None, ends, 0, True, False, False, False, 0.125, 1e-6, 0, 0)
        call: Any = _C.CudaLinearBackward((x, x, x, decay, *rest), True)
        return int(call.workspace_bytes)

    tokens = 2**17
    assert workspace([*range(1000), tokens]) < 2 * workspace([0, tokens])
    for name, tokens, end in (("identity", 150, 9), ("reverse", 90, 70)):
        ends = torch.tensor([*range(9), *range(end, end + 4), tokens], dtype=torch.int32)
        more = {"tokens": tokens, "dim": 8, "dim_v": 8, "states": 13, "cu_seqlens": ends}
        check(*form(name, dtype=torch.float32, **more, decay="token"))


def on_device(*shape: int, dtype: torch.dtype = BF16) -> DeviceTensor:
    return DeviceTensor(2**20, dtype, shape, torch.empty(shape, device="meta").stride())


def test_a_window_beyond_all_tokens_costs_what_they_do() -> None:
    def workspace(window: int) -> int:
        x, decay = on_device(1, 300, 1, 32), on_device(1, 300, 1, dtype=torch.float32)
        rest = (None, None, None, 0, True, False, False, False, 0.125, 1e-6, window, 0)
        call: Any = _C.CudaLinearBackward((x, x, x, decay, *rest), True)
        return int(call.workspace_bytes)

    assert workspace(2**40) == workspace(300)
    blocks = {"window_size": 2**40, "state": False}
    check(*form("elu, normalized, decayed", tokens=70, **blocks))


def test_many_heads_are_not_cut_into_segments() -> None:
    def launches(batch: int, heads: int) -> list[dict[str, Any]]:
        x = on_device(batch, 4096, heads, 64)
        rest = (None, None, None, None, 0, True, False, False, False, 0.125, 1e-6, 0, 0)
        call = _C.CudaLinearForward((x, x, x, *rest))
        return call.launches(0, 2**20, x, None, None)

    assert [launch["grid"] for launch in launches(1000, 70)] == [70_000]
    few = launches(1, 4)
    assert [launch["kernel"] for launch in few] == [
        "linear_scan_bf16_64", "linear_combine", "linear_scan_bf16_64",
    ]  # fmt: skip
    assert few[0]["grid"] == 60  # 16 segments of 4 chunks, of which nobody needs the last


# ---- what it costs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("identity", {"dim": 64}),
        ("elu, normalized, decayed", {"dim": 64}),
        ("identity", {"dim": 16, "feature_map": "taylor2"}),
        ("identity", {"dim": 16, "feature_map": "taylor2", "normalize": True}),
    ],
    ids=["identity", "elu, normalized, decayed", "taylor", "taylor, normalized"],
)
def test_rows_are_moved_once(name: str, more: dict[str, Any]) -> None:
    """Sectors, bank conflicts, and bytes beside those of the tensors."""
    tensors, options = form(name, tokens=448, dim_v=64, state=False, **more)
    with on_executor(metrics=True) as recorder:
        out = linear_attention(**tensors, **options)
    (report,) = recorder.reports
    code = report.execution.function.code
    of_tensors = {i.line for i in code if i.op in ("cp", "st") or "global" in i.mods}
    counts = report.traffic.counts.items()  # also of parameters, which lie in constant memory
    moved = 32 * sum(c.actual for (of, line), c in counts if of == "global" and line in of_tensors)
    least = sum(x.nbytes for x in (*tensors.values(), out))
    print(f"{report.kernel}: {moved / least:.3f} of the bytes, "
          f"{report.traffic.ratio('global'):.3f} of the sectors, "
          f"{report.traffic.ratio('shared'):.3f} of the wavefronts")  # fmt: skip
    assert report.traffic.ratio("global") <= 1.05
    assert moved <= 1.15 * least
    assert report.traffic.ratio("shared") <= 1.1


# ---- what inputs may be --------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["heads first", "cut out"])
def test_strided_inputs(layout: str) -> None:
    """Also rows that do not start at multiples of 16 bytes, and what lies around is not read."""
    tensors, options = form("elu, normalized, decayed", heads=(2, 2, 2), tokens=40, dim=24)
    for name in ("query", "key", "value", "decay"):
        tensors[name] = lay_out(tensors[name].unsqueeze(-1), layout).squeeze(-1) if (
            name == "decay"
        ) else lay_out(tensors[name], layout)  # fmt: skip
    check(tensors, options)


@pytest.mark.parametrize("decay", [0.0, -50.0, -torch.inf])
def test_extreme_decays(decay: float) -> None:
    for dtype in (torch.float32, BF16):
        tensors, options = form("identity", tokens=80, decay="token", dtype=dtype)
        tensors["decay"][:, ::7] = decay
        check(tensors, options, grads=decay != -torch.inf)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("name", ["elu, normalized, decayed", "delta", "taylor"])
def test_gradients_of_strong_decays_are_exact(name: str, dtype: torch.dtype) -> None:
    """Beside them, what the last tokens of a chunk leave to the final state is large."""
    more: dict[str, Any] = {"delta": {"beta": True}, "taylor": {"feature_map": "taylor2"}}
    of_form = "identity" if name in more else name
    chosen = {**more.get(name, {}), "decay": "token", "dim": 16, "dtype": dtype}
    tensors, options = form(of_form, tokens=70, **chosen)
    tensors["decay"].fill_(-8.0)
    check(tensors, options)


def test_a_large_decay_does_not_blur_the_small_ones_after_it() -> None:
    tensors, options = form("identity", tokens=64, decay="token", dtype=torch.float32)
    tensors["decay"][:, 3] = -900.0
    check(tensors, options)


@pytest.mark.parametrize("name", ["identity", "elu, normalized, decayed", "delta"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_a_decay_has_a_small_part_in_all_that_there_is(dtype: torch.dtype, name: str) -> None:
    """Its gradient is a sum of what tokens get from others less what they give: that of a token
    that gets most from itself, or of a state that passes many, must not be lost beside it."""
    more = {"beta": True} if name == "delta" else {}
    for decay in (-8.0,) if more else (-8.0, -0.001):
        made, options = form(name.replace("delta", "identity"), decay="token", dtype=dtype, **more)
        made["decay"].fill_(decay)
        if not more:
            made["query"] *= 4
            made["key"] = made["query"].clone()
        check(made, options)


@pytest.mark.parametrize("name", ["identity", "delta", "taylor"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_what_is_not_finite_reaches_later_tokens_only(dtype: torch.dtype, name: str) -> None:
    """And no other column."""
    more: dict[str, Any] = {}
    if name == "delta":
        more = {"beta": True}
    elif name == "taylor":
        more = {"feature_map": "taylor2", "dim": 5}
    tensors, options = form("identity", tokens=70, dtype=dtype, **more)
    whole = linear_attention(**tensors, **options)
    tensors["value"][:, 21, :, 3] = torch.nan
    tensors["value"][:, 40, :, 5] = torch.inf
    with on_executor():
        out = linear_attention(**tensors, **options)
    clean = torch.ones_like(out, dtype=torch.bool)
    clean[:, 21:, :, 3] = clean[:, 40:, :, 5] = False
    assert out[:, 21:, :, 3].isnan().all() and not out[:, 40:, :, 5].isfinite().any()
    assert_close({"out": out[clean]}, {"out": whole[clean]}, 2 * BUDGET[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_states(dtype: torch.dtype) -> None:
    """Beyond what fp16 can hold."""
    tensors, options = form("identity", tokens=70, dtype=dtype)
    tensors["initial_state"] *= 1e6
    tensors["query"] /= 64
    got = check(tensors, options, grads=False)
    assert got


def test_nothing_but_outputs() -> None:
    """No states, no gradient that is not asked for."""
    tensors, options = form("identity", state=False)
    with on_executor() as recorder:
        out = linear_attention(**tensors, **options)
    exact: Any = reference.linear_attention
    expected = exact(**tensors, **options)
    assert_close({"out": out}, {"out": expected}, BUDGET[BF16])
    assert [r.kernel for r in recorder.reports] == ["linear_scan_bf16_32"]


def test_what_is_missing_is_said() -> None:
    more: dict[str, Any]
    for more, what in (
        ({"feature_map": "taylor2", "dim": 65}, "taylor2"),
        ({"dtype": torch.float64}, "float64"),
        ({"dim": 257}, "head_dim above 256"),
    ):
        tensors, options = form("identity", **{"tokens": 3, "state": False, **more})
        with pytest.raises(NotImplementedError, match=what), on_executor():
            linear_attention(**tensors, **options)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("length-65", BF16),
        ("step-wide", BF16),
        ("length-63", BF16),  # and those where the gradient of a decay has been off
        ("length-64", torch.float16),
        ("length-129", BF16),
        ("dims-128-100-gated", torch.float16),
    ],
    ids=str,
)
def test_a_check_for_gpus(name: str, dtype: torch.dtype) -> None:
    with on_executor(metrics=False) as recorder:
        results = PROBLEMS[name].results(dtype, "cpu")
    assert recorder.reports
    compare(PROBLEMS[name], dtype, results)

# SPDX-License-Identifier: Apache-2.0
"""Decoding with linear attention under the executor, through attnext's public functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_problems import BUDGET, error, normal, problem
from torch import Tensor

import attnext
from attnext import reference

from .cover import unexplained
from .executor import Program, WrongRun
from .linear import on_executor
from .metrics import Execution
from .planted import WRONG, Bug, planted_bug
from .source import header_with, lone
from .test_coverage import LEAST, count

exact: Any = reference.linear_attention
_step: Any = attnext.linear_attention_step
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Made = tuple[dict[str, Tensor], dict[str, Any]]


def made(tokens: int, dtype: torch.dtype = torch.bfloat16, **more: Any) -> Made:
    defaults = {"heads": (1, 1, 1), "dim": 32, "dim_v": 24, "state": True}
    tensors, options = problem(tokens, dtype=dtype, **{**defaults, **more})
    return tensors, options


def run(tensors: dict[str, Tensor], options: dict[str, Any], **how: Any) -> Any:
    """(output, state after it, reports)"""
    given_tensors = dict(tensors)
    state = given_tensors.pop("initial_state").clone()
    with on_executor(**how) as recorder:
        out = _step(**given_tensors, state=state, **options)
    return out, state, recorder.reports


def wrong(tensors: dict[str, Tensor], options: dict[str, Any], out: Tensor, state: Tensor) -> bool:
    """Whether a result is beyond the budget of the recurrence in float64."""
    wide = {name: x.double() for name, x in tensors.items()}
    expected, last = exact(**wide, **options, output_final_state=True)
    dtype = tensors["query"].dtype
    far = error(out, expected) > BUDGET[dtype] or error(state, last) > BUDGET[torch.float32]
    return far or not (torch.isfinite(out).all() and torch.isfinite(state).all())


@st.composite
def problems(draw: Any) -> Made:
    feature_map = draw(st.sampled_from(["identity", "elu", "relu", "taylor2"]))
    options: dict[str, Any] = {"feature_map": feature_map}
    beta = feature_map != "taylor2" and draw(st.booleans())
    if not beta and draw(st.booleans()):
        options |= {"normalize": True, "eps": 1.0 if feature_map == "identity" else 1e-6}
        if feature_map == "identity":
            options["feature_map"] = "elu"  # sums near 0 would be a matter of luck
    elif draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.25, -0.5]))
    return made(
        draw(st.integers(1, 10)), draw(st.sampled_from(DTYPES)), batch=draw(st.integers(1, 2)),
        heads=draw(st.sampled_from([(1, 1, 1), (1, 1, 2), (4, 2, 1)])),
        dim=draw(st.integers(1, 18 if feature_map == "taylor2" else 140 if not beta else 256)),
        dim_v=draw(st.integers(1, 140)), beta=beta,
        decay=draw(st.sampled_from([None, "head", "token"])), **options,
    )  # fmt: skip


@settings(max_examples=12)
@given(problems())
def test_random_problems(given_problem: Made) -> None:
    out, state, _ = run(*given_problem)
    assert out.dtype == given_problem[0]["query"].dtype
    assert not wrong(*given_problem, out, state)


@pytest.mark.parametrize("decay", [0.0, -50.0, -torch.inf])
def test_extreme_decays(decay: float) -> None:
    tensors, options = made(3, torch.float32, decay="token")
    tensors["decay"][:, 1] = decay
    out, state, _ = run(tensors, options)
    assert not wrong(tensors, options, out, state)


def test_slots() -> None:
    """States anywhere, strided; nothing else is touched; no state gives 0, a wrong one NaN."""
    tensors, options = made(2, batch=4, heads=(2, 2, 2), state=False, feature_map="elu",
                            normalize=True)  # fmt: skip
    pool = normal(7, 32, 2, 25, dtype=torch.float32).abs().transpose(1, 2)
    before = pool.clone()
    slots = torch.tensor([5, -1, 2, 7], dtype=torch.int32)
    with on_executor():
        out = _step(**tensors, state=pool, slots=slots, **options)
    for item, slot in ((0, 5), (2, 2)):
        one = {name: x[item : item + 1] for name, x in tensors.items()}
        alone, state, _ = run({**one, "initial_state": before[slot : slot + 1]}, options)
        assert torch.equal(alone[0], out[item]) and torch.equal(pool[slot], state[0])
    assert not out[1].any() and out[3].isnan().all()
    untouched = [0, 1, 3, 4, 6]
    assert torch.equal(pool[untouched], before[untouched])


def test_no_slot_where_nothing_is_normalized() -> None:
    tensors, options = made(1, dim_v=100)
    slots = torch.tensor([-1])
    out, state, _ = run(tensors, {**options, "slots": slots})
    assert not out.any() and torch.equal(state, tensors["initial_state"])


def test_several_tokens_are_as_one_after_the_other() -> None:
    tensors, options = made(9, beta=True, decay="token", dim_v=70)
    out, state, _ = run(tensors, options)
    one = {"initial_state": tensors.pop("initial_state")}
    for t in range(9):
        now = {name: x[:, t : t + 1] for name, x in tensors.items()}
        step_out, one["initial_state"], _ = run({**now, **one}, options)
        assert torch.equal(step_out, out[:, t : t + 1])
    assert torch.equal(one["initial_state"], state)


def test_the_next_token_of_a_hybrid() -> None:
    """based_attention_step: its Taylor state is the step's."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 12, 2, d, generator=generator).to(torch.float16) for d in (16, 16, 64)
    )
    _, cache = attnext.based_attention(q[:, :10], k[:, :10], v[:, :10], 4, output_final_cache=True)
    with on_executor() as recorder:
        out = attnext.based_attention_step(q[:, 10:], k[:, 10:], v[:, 10:], cache)
    assert [r.kernel for r in recorder.reports] == ["linear_step_fp32"] * 2
    wide = attnext.based_attention(q.double(), k.double(), v.double(), 4)
    assert error(out, wide[:, 10:]) < BUDGET[torch.float16]


def test_what_is_missing_is_said() -> None:
    for more in ({"dtype": torch.float64}, {"beta": True, "dim": 257}):
        tensors, options = made(1, **more)
        with pytest.raises(NotImplementedError, match="linear_attention_step on a GPU"):
            run(tensors, options)


# ---- what it costs -------------------------------------------------------------------------------

PROBLEMS: dict[str, dict[str, Any]] = {
    "plain": {"tokens": 9, "dim": 64, "dim_v": 64, "heads": (1, 1, 2)},
    "elu": {"tokens": 2, "feature_map": "elu", "normalize": True, "dim": 170, "dim_v": 100},
    "taylor": {"tokens": 2, "feature_map": "taylor2", "normalize": True, "dim": 16, "dim_v": 40,
               "decay": "head"},
    "relu": {"tokens": 1, "feature_map": "relu", "dim_v": 5},
    "delta": {"tokens": 3, "beta": True, "decay": "token", "dim_v": 40},
}  # fmt: skip


def test_the_state_is_moved_once_each_way() -> None:
    """Sectors as few as there can be, no bank conflicts."""
    tensors, options = made(4, torch.float32, dim=64, dim_v=64, heads=(2, 2, 2))
    (report,) = run(tensors, options, metrics=True)[2]
    counts = report.traffic.counts.values()
    moved = sum(c.actual for c in counts if c.space == "global") * 32
    state = tensors["initial_state"].numel() * 4
    assert moved < 2 * state * 1.15 + 4 * tensors["value"].numel() * 32
    assert report.traffic.ratio("global") <= 1.05
    assert report.traffic.ratio("shared") == 1.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nearly_every_instruction_is_executed(dtype: torch.dtype) -> None:
    executions: dict[str, Execution] = {}
    for name, more in PROBLEMS.items():
        given_problem = made(**more, dtype=dtype)
        out, state, reports = run(*given_problem)
        assert not wrong(*given_problem, out, state), name
        for report in reports:
            count(executions, report)
    slots = torch.tensor([-1, 5])
    for more in ({}, {"normalize": True}):
        tensors, options = made(1, dtype, batch=2, **more)
        for report in run(tensors, {**options, "slots": slots})[2]:
            count(executions, report)
    ((kernel, execution),) = executions.items()
    assert execution.coverage() >= LEAST, unexplained(kernel, execution)


# ---- planted bugs --------------------------------------------------------------------------------

STEP = "linear_step.cuh"


def _bug(name: str, shown_by: str, symptom: str, *edit: str) -> Bug:
    return planted_bug("linear", name, "step_bf16", shown_by, symptom, (STEP, *edit))  # type: ignore[arg-type]


BUGS = [
    _bug("features read while they are made", "taylor", "read-write race",
         "      make_features(first, count, row0, rows);\n      __syncthreads();\n",
         "      make_features(first, count, row0, rows);\n"),
    _bug("features made while they are read", "elu", "write-read race",
         "      if (row0 > 0) __syncthreads();  // the features before have been read\n", ""),
    _bug("sums read too early", "plain", "read-write race",
         "    __syncthreads();  // the sums are there\n", ""),
    _bug("a tile begins before the other ends", "elu", "write-read race",
         "    __syncthreads();  // the tile before has been stored\n", ""),
    _bug("what the key finds read too early", "delta", "read-write race",
         "      shared.found[t][threadIdx.x] = found;\n      __syncthreads();\n",
         "      shared.found[t][threadIdx.x] = found;\n"),
    _bug("denominator read too early", "elu", "read-write race",
         "sum - eps : sum + eps;\n      }\n      __syncthreads();\n",
         "sum - eps : sum + eps;\n      }\n"),
    _bug("rows that are not there", "taylor", "global read out of bounds",
         "s[i] = live && f < features ? *place(column0, f) : 0.f;",
         "s[i] = live ? *place(column0, f) : 0.f;"),
    _bug("columns that are not there", "elu", "global write out of bounds",
         "return group < groups && column0 + column < launch.columns;",
         "return group < groups;"),
    _bug("state stored before the last token", "plain", WRONG,
         "for (int t = 0; t < count; ++t) update(t, s);",
         "for (int t = 0; t < count - 1; ++t) update(t, s);"),
    _bug("not decayed where the key reads", "delta", WRONG,
         "u = shared.beta[t] * (u - kept * found);", "u = shared.beta[t] * (u - found);"),
    _bug("squares counted twice", "taylor", WRONG, "(a == b ? 0.5f : 1.f)", "1.f"),
    _bug("the value's ones left out", "elu", WRONG, "Number<T>::widen(from[c]) : 1.f;",
         "Number<T>::widen(from[c]) : 0.f;"),
    _bug("sums of one thread only", "plain", WRONG,
         "for (int g = 0; g < groups; ++g) sum +=", "for (int g = 0; g < 1; ++g) sum +="),
    _bug("head of the next group", "plain", "global read out of bounds",
         "head / group_size * t.head;", "head * t.head;"),
]  # fmt: skip


def symptoms(name: str, bug: Bug | None = None) -> set[str]:
    def find(kernel: str) -> Program:
        return lone(kernel, *bug.edits) if bug else lone(kernel)

    given_problem = made(**PROBLEMS[name])
    state = given_problem[0]["initial_state"].clone()
    given_tensors = {k: x for k, x in given_problem[0].items() if k != "initial_state"}
    out = None
    with on_executor(find=find) as recorder:
        try:
            out = _step(**given_tensors, state=state, **given_problem[1])
        except WrongRun:
            pass  # the last report says it
    said = set().union(*(report.kinds() for report in recorder.reports))
    if out is not None and wrong(*given_problem, out, state):
        said.add(WRONG)
    return said


@pytest.mark.parametrize("name", PROBLEMS)
def test_nothing_is_said_without_a_bug(name: str) -> None:
    assert not symptoms(name)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted_bug_is_caught(bug: Bug) -> None:
    header_with(bug.edits[0])
    assert bug.symptom in symptoms(bug.problem, bug)

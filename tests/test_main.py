# SPDX-License-Identifier: Apache-2.0
"""``python -m attnext``, the examples and the README: what a user runs first."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import attnext
from attnext import reference
from attnext.__main__ import main
from attnext.demo import checks, data, jobs, peers, run
from attnext.demo.picture import attention_row

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def picture() -> data.Picture:
    return data.load_picture(None)


@pytest.fixture(scope="module")
def image(picture: data.Picture) -> data.Inputs:
    """A corner of the photograph: 32 x 24 patches."""
    return data.image_inputs(picture.pixels[: 32 * data.PATCH, : 24 * data.PATCH])


# ---- the command ---------------------------------------------------------------------------------


def test_the_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure, record = tmp_path / "attnext.png", tmp_path / "attnext.json"
    status = main(["--seconds", "0.01", "--output", str(figure), "--json", str(record)])
    printed = capsys.readouterr().out
    assert status == 0, printed
    told = json.loads(record.read_text())
    assert told["passed"] and len(told["jobs"]) == 10
    for job in told["jobs"]:
        assert job["passed"] and 0.0 < job["budget_used"] <= 1.0 and job["rows_checked"] > 0
        assert job["attnext_ms"] > 0 and job["torch_ms"] > 0
        assert job["title"] in printed
    assert told["environment"]["isa"] in told["environment"]["available_isas"]
    assert told["next_byte"] > told["commonest_byte"] + 0.1
    with Image.open(figure) as drawn:
        assert min(drawn.size) > 900 and sum(n > 0 for n in drawn.convert("L").histogram()) > 100


def test_help_and_version_need_no_work(capsys: pytest.CaptureFixture[str]) -> None:
    for option, expected in (("--help", "--image"), ("--version", attnext.__version__)):
        with pytest.raises(SystemExit) as stop:
            main([option])
        assert stop.value.code == 0
        assert expected in capsys.readouterr().out


def test_it_runs_as_a_module() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "attnext", "--version"], capture_output=True, text=True
    )
    assert result.stdout.strip() == f"attnext {attnext.__version__}", result.stderr


@pytest.fixture
def one_job(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The run, cut down to its first row and without the picture."""

    def first(*inputs: data.Inputs) -> Iterator[Callable[[], jobs.Job]]:
        yield lambda: dataclasses.replace(jobs.neighborhood(inputs[0]), title="sliding")

    monkeypatch.setattr(run, "all_jobs", first)
    monkeypatch.setattr(run, "draw", lambda *rest: None)
    monkeypatch.setattr(run, "next_byte_score", lambda *rest: (0.5, 0.1))
    yield


@pytest.mark.usefixtures("one_job")
@pytest.mark.parametrize(
    "spoil", [lambda x: x + 1e-4, lambda x: x * torch.nan, lambda x: x.flip(1)]
)
def test_a_wrong_result_fails_the_run(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Tensor], Tensor],
) -> None:
    right = attnext.na2d

    def na2d(*arguments: object, **options: object) -> Tensor:
        return spoil(right(*arguments, **options))

    monkeypatch.setattr(attnext, "na2d", na2d)
    assert main(["--seconds", "0.01"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.usefixtures("one_job")
def test_threads_and_own_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, words = tmp_path / "[grey] é.png", tmp_path / "own.txt"
    Image.radial_gradient("L").resize((300, 190)).save(file)
    words.write_bytes(bytes(range(256)) * 8)
    before = torch.get_num_threads()
    arguments = ["--seconds", "0.01", "--threads", "1", "--image", str(file), "--text", str(words)]
    try:
        assert main(arguments) == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    printed = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "[grey] é.png" in printed and "2048 bytes" in printed


def _error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("python -m attnext") and "\n" not in told
    return told


def test_unreadable_input_is_told_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent, broken, small = tmp_path / "absent", tmp_path / "broken.png", tmp_path / "small.png"
    broken.write_bytes(b"\x89PNG nonsense")
    Image.new("RGB", (8, 8)).save(small)
    assert "absent" in _error(["--image", str(absent)], capsys)
    assert "broken.png" in _error(["--image", str(broken)], capsys)
    assert "8 x 8" in _error(["--image", str(small)], capsys)
    assert "absent" in _error(["--text", str(absent)], capsys)
    assert "1024" in _error(["--text", str(broken)], capsys)
    assert str(tmp_path) in _error(["--text", str(tmp_path)], capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--output", "no/such/folder/a.png"],
        ["--output", "a.txt"],
        ["--json", "/"],
        ["--output", "one.png", "--json", "./one.png"],
        ["--threads", "0"],
        ["--threads", "two"],
        ["--seconds", "0"],
        ["--seconds", "nan"],
        ["what"],
    ],
)
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_missing_extras_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    present = importlib.util.find_spec

    def find(name: str) -> object:
        return None if name in ("rich", "PIL") else present(name)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    told = _error([], capsys)
    assert "pillow and rich" in told and "attnext[demo]" in told


# ---- its parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--output", "--json"])
def test_what_cannot_be_written_is_told_before_the_work(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([option, "/proc/there-is-no-such.png"])
    assert stop.value.code == 2
    assert "cannot be written" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([option, str(tmp_path / "made.png"), "--threads", "0"])
    assert not list(tmp_path.iterdir())


def test_images_of_sixteen_bits(tmp_path: Path) -> None:
    numbers = torch.linspace(0, 65535, 64 * 64).to(torch.uint16).reshape(64, 64)
    Image.fromarray(numbers.numpy()).save(tmp_path / "grey.png")
    picture = data.load_picture(tmp_path / "grey.png")
    assert abs(picture.pixels.mean().item() - 0.5) < 0.01


@pytest.mark.parametrize("extents", [(8, 8), (12, 9), (7, 17), (3, 5)])
@pytest.mark.parametrize(("window", "shift"), [(4, 0), (4, 2), (5, 3)])
def test_tiles_are_shifted_windows(extents: tuple[int, int], window: int, shift: int) -> None:
    q, k, v = torch.randn(3, 1, *extents, 2, 6).unbind(0)
    bias = torch.randn(2, 2 * window - 1, 2 * window - 1)
    exact = reference.window_attention(q, k, v, window, shift, bias=bias)
    torch.testing.assert_close(peers.Tiles(extents, window, shift, bias)(q, k, v), exact.float())


@pytest.mark.parametrize(("length", "window", "sinks"), [(32, 8, 2), (37, 8, 0), (20, 32, 3)])
def test_bands_are_sliding_windows(length: int, window: int, sinks: int) -> None:
    q, (k, v) = torch.randn(1, length, 4, 6), torch.randn(2, 1, length, 2, 6).unbind(0)
    exact = reference.sliding_window_attention(q, k, v, window, sinks=sinks)
    torch.testing.assert_close(peers.Bands(length, window, sinks)(q, k, v), exact.float())
    step = peers.decode_step(q[:, -1:], k, v, window, sinks)
    torch.testing.assert_close(step, exact[:, -1:].float())


def test_a_row_of_weights_is_softmax(image: data.Inputs) -> None:
    place, head = (20, 20), 2
    weights = attention_row(lambda q, k, v: attnext.na2d(q, k, v, 7), image, place, head)
    assert int((weights > 0).sum()) == 49
    near = image.key[0, 17:24, 17:24, head]
    logits = near @ image.query[0, 20, 20, head] * image.query.shape[-1] ** -0.5
    torch.testing.assert_close(weights[17:24, 17:24], logits.flatten().softmax(0).view(7, 7))


def test_a_check_sees_one_wrong_number(image: data.Inputs) -> None:
    job = jobs.neighborhood(image)
    output, other = job.run(), job.rival()
    assert job.check(output, other).passed
    output[0, 0, -1, 3, 5] += 1e-4
    assert not job.check(output, other).passed


def test_a_check_of_nothing_but_zeros(image: data.Inputs) -> None:
    """As those of a black image are: there is no error, and none is allowed."""
    job = jobs.neighborhood(dataclasses.replace(image, value=torch.zeros_like(image.value)))
    output, other = job.run(), job.rival()
    assert not output.any() and job.check(output, other).used == 0
    output[0, 0, -1, 3, 5] += 1
    assert not job.check(output, other).passed


def test_a_check_sees_a_wrong_gradient(image: data.Inputs) -> None:
    job = jobs.training_step(image)
    outputs, others = job.run(), job.rival()
    assert job.check(outputs, others).passed
    for which in range(4):
        spoilt = [x.clone() for x in outputs]
        spoilt[which][0, 0, 0, 1, 2] *= 1.01
        assert not job.check(tuple(spoilt), others).passed


def test_boxes_cover_corners_once() -> None:
    chosen = checks.boxes((10, 3))
    assert checks.Box((0, 0), (4, 3)) in chosen and checks.Box((6, 0), (4, 3)) in chosen
    assert len(chosen) == len(set(chosen)) == 3


# ---- examples and README -------------------------------------------------------------------------


def example(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_example_denoise_image() -> None:
    before, after = example("denoise_image").main(steps=40)
    assert after > before + 1.0


def test_example_text_model() -> None:
    first, last, difference = example("text_model").main(steps=12)
    assert last < first - 1.0 and difference < 1e-4


def test_example_replace_natten() -> None:
    old, new = example("replace_natten").main()
    assert old < 1e-5 and new < 1e-5


def test_example_needle() -> None:
    found, alone = example("needle").main(["--tokens", "8192"])
    assert all(found[name] == 8 for name in ("dense", "HiP", "InfiniteHiP", "LongHeads"))
    assert found["Superlinear"] >= 5 and found["window"] <= 1
    assert alone["dense"] == 8 and max(alone["HiP"], alone["Superlinear"]) <= 4


def test_example_language_model() -> None:
    results = example("language_model").main(steps=4)
    for loss, difference in results.values():
        assert loss < math.log(256) - 0.3 and difference < 1e-4


def test_example_recall(tmp_path: Path) -> None:
    """Both ways together recall more than either state would tell; the picture is drawn."""
    module = example("recall")
    linear, hybrid, full = module.main(quick=True)
    assert linear.accuracy + 0.1 < hybrid.accuracy < full.accuracy - 0.05
    assert linear.state_bytes < hybrid.state_bytes < full.state_bytes
    points = [module.Point(entry, 2048 + 99 * i, 0.5, 1.0) for i, entry in
              enumerate(module.entries(64))]  # fmt: skip
    module.draw(points, tmp_path / "recall.png")
    assert (tmp_path / "recall.png").stat().st_size > 10000


def test_every_example_is_tested() -> None:
    for path in (ROOT / "examples").glob("*.py"):
        assert f"test_example_{path.stem}" in globals()


def test_readme_code_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_readme_names_every_public_function() -> None:
    readme = (ROOT / "README.md").read_text()
    missing = [
        name
        for name in attnext.__all__
        if callable(getattr(attnext, name)) and not name.startswith("_") and name not in readme
    ]
    assert not missing

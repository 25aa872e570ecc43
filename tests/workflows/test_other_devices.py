"""Training on another device than the CPU: nothing mixes, and no step waits but for the vote."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from workflow import SMALL, metrics, run, write_images

from vicreg_hf import pretrain
from vicreg_hf.settings.command_line import parse_arguments

STEPS = 4
KINDS = {
    "in memory": [(32, 32), "--online_probe", "--num_local_views=1"],
    "from files": [(80, 70), "--micro_batch_size=8", "--weights=separate"],
}


def flags_of(kind: str, steps: int, images: Path, output_dir: Path) -> list[str]:
    """Of a run that logs and saves at its end alone."""
    return [*SMALL, f"--dataset_name={images}", "--image_size=32", f"--max_steps={steps}",
            *KINDS[kind][1:], "--logging_steps=100", "--save_steps=100", "--warmup_epochs=0",
            f"--output_dir={output_dir}"]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Where the runs are, and where each waited, by its name."""
    folder, names, all_flags = tmp_path_factory.mktemp("runs"), [], []
    for kind, (size, *_) in KINDS.items():
        images = write_images(folder / f"{kind} images", size=size)
        for steps in (STEPS, 2 * STEPS):
            names.append(f"{kind} {steps}")
            all_flags.append(flags_of(kind, steps, images, folder / names[-1]))
    (folder / "runs.json").write_text(json.dumps(all_flags))
    result = run(
        [sys.executable, "tests/helpers/elsewhere.py", str(folder / "runs.json")], PYTHONPATH="."
    )
    assert result.returncode == 0, result.stderr
    return folder, dict(zip(names, json.loads(result.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_waits_for_nothing_but_the_vote(
    kind: str, runs: tuple[Path, dict[str, Any]]
) -> None:
    short, long = runs[1][f"{kind} {STEPS}"], runs[1][f"{kind} {2 * STEPS}"]
    assert short["pretraining._metrics"] > 0  # so waiting is seen
    more = {place: number - short.get(place, 0) for place, number in long.items()}
    assert {place: number for place, number in more.items() if number} == {
        "distributed.read": STEPS
    }


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_what_it_learns_on_the_cpu(
    kind: str, runs: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = runs
    pretrain(parse_arguments(flags_of(kind, STEPS, folder / f"{kind} images", tmp_path)))
    rows, expected = metrics(folder / f"{kind} {STEPS}"), metrics(tmp_path)
    assert len(rows) == len(expected) == 2  # before and after
    for row, of_cpu in zip(rows, expected, strict=True):
        words = {name for name, value in of_cpu.items() if isinstance(value, str)}
        assert {k: row.pop(k) for k in words} == {k: of_cpu.pop(k) for k in words}
        rate = {k: v for k, v in row.items() if k == "views_per_second"}
        assert row == pytest.approx(of_cpu | rate, rel=1e-3)

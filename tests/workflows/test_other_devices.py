"""Training on another device than the CPU: nothing mixes, and no step waits but for its check."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from warm import run_script
from workflow import flags_of, metrics, train, write_images

pytestmark = pytest.mark.usefixtures("one_core")

KINDS = {
    "in memory": [(32, 32), "--optimizer=adamw", "--online_probe=true", "--num_local_views=1"],
    "from files": [(80, 70), "--micro_batch_size=8", "--weights=separate"],
}
AT_THE_END = ["--logging_steps=100", "--save_steps=100", "--warmup_epochs=0", "--image_size=32"]
"""Settings of a run that logs and saves at its end alone."""


@pytest.mark.parametrize("kind", ["in memory", pytest.param("from files", marks=pytest.mark.slow)])
def test_a_run_elsewhere_waits_for_checks_alone_and_learns_as_on_the_cpu(
    kind: str, tmp_path: Path
) -> None:
    size, *flags = KINDS[kind]
    data = write_images(tmp_path / "images", size=size)  # pyright: ignore
    flags += AT_THE_END
    runs = [flags_of(data, tmp_path / str(n), *flags, f"--max_steps={n}") for n in (1, 3)]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    result = run_script("tests/helpers/elsewhere.py", str(tmp_path / "runs.json"))
    assert result.returncode == 0, result.stderr
    short, long = json.loads(result.stdout.splitlines()[-1])
    assert short["pretrain._metrics"] > 0  # so waiting is seen
    more = {place: number - short.get(place, 0) for place, number in long.items()}
    assert {place: n for place, n in more.items() if n} == {"distributed.read": 2}
    expected = train(data, tmp_path / "CPU", *flags, "--max_steps=1")  # pyright: ignore
    rows = metrics(tmp_path / "1")
    assert len(rows) == len(expected) == 2  # before and after
    for term in ("loss", "invariance", "variance", "covariance", "embedding_std"):
        # about a hundred roundings of float32; later steps may switch a ReLU
        assert rows[1][term] == pytest.approx(expected[1][term], rel=1e-5), term

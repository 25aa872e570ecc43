"""Evaluations as users start them: from the Hub, on several processes, and refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub import READER, Repository, connected, running_hub
from measuring import digits, measure, script, strict, write, write_encoder, write_few
from warm import run_script

pytestmark = pytest.mark.usefixtures("one_core", "own_cache")


def test_an_encoder_on_the_hub_is_measured(tmp_path: Path) -> None:
    encoder, few = write_encoder(tmp_path / "encoder"), write_few(tmp_path / "few")
    files = {path.name: path.read_bytes() for path in encoder.iterdir()}
    with running_hub() as hub, connected(hub, tmp_path / "home", READER):
        hub.repositories["models/org/theirs"] = Repository(True, [{}, files], {"main": 1})
        found = measure("org/theirs", few, tmp_path, knn_k="5")["5-NN top-1 accuracy"]
    assert strict(tmp_path / "out" / "results.json")["model"] == "org/theirs"
    assert (
        found["value"]
        == measure(encoder, few, tmp_path / "here", knn_k="5")["5-NN top-1 accuracy"]["value"]
    )


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path / "encoder")
    data = write(tmp_path / "data", train=digits(range(60)), test=digits(range(300, 330)))
    protocols = "knn,linear,linear-sgd"
    found = measure(encoder, data, tmp_path / "one", protocols, train_batch_size=16)
    done = run_script(
        *script(
            f"--model={encoder}", f"--dataset_name={data}", f"--output_dir={tmp_path / 'out'}",
            f"--protocols={protocols}", f"--cache_dir={tmp_path / 'cache'}",
            "--train_batch_size=16",
        ),
        processes=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    two = strict(tmp_path / "out" / "results.json")
    assert two["hardware"].endswith("2 processes")
    assert len(two["results"]) == 4
    for each in two["results"]:
        one = found[each["name"]]
        images = 1.01 if each["protocol"] == "linear-sgd" else 0  # of which rounding may decide
        assert each["value"] == pytest.approx(one["value"], abs=images / 30)
    # a frozen encoder: the loss is a smooth function of the features
    losses = two["results"][-1]["details"]["losses"]
    expected = found["linear, authors' protocol top-1 accuracy"]["details"]["losses"]
    assert losses == pytest.approx(expected, rel=1e-4)
    assert done.stdout.count("20-NN top-1 accuracy") == 1

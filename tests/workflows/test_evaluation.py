"""Evaluations as users start them: from the Hub, on several processes, and refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hub import READER, Repository, running_hub
from measuring import digits, measure, script, strict, write, write_encoder, write_few
from warm import run_script
from workflow import run

pytestmark = pytest.mark.usefixtures("one_core", "own_cache")


def test_an_encoder_on_the_hub_is_measured_from_the_command_line(tmp_path: Path) -> None:
    encoder, few = write_encoder(tmp_path / "encoder"), write_few(tmp_path / "few")
    files = {path.name: path.read_bytes() for path in encoder.iterdir()}
    with running_hub() as hub:
        hub.repositories["models/org/theirs"] = Repository(True, [{}, files], {"main": 1})
        done = run(
            [sys.executable, *script(
                "--model=org/theirs", f"--dataset_name={few}", f"--output_dir={tmp_path / 'out'}",
                "--protocols=knn", "--knn_k=5",
            )],
            HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="0",
            HF_TOKEN=READER,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "5-NN top-1 accuracy: " in done.stdout
    results = strict(tmp_path / "out" / "results.json")
    assert results["model"] == "org/theirs"
    expected = measure(encoder, few, tmp_path / "here", knn_k="5")["5-NN top-1 accuracy"]
    assert results["results"][0]["value"] == expected["value"]
    assert list((tmp_path / "home" / "vicreg_hf" / "features").glob("*/*.parquet"))


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


def test_the_command_line_refuses_in_one_sentence(tmp_path: Path) -> None:
    done = run_script(*script(
        f"--model={write_encoder(tmp_path / 'model')}", "--knn_k=50",
        f"--dataset_name={write_few(tmp_path / 'few')}", f"--output_dir={tmp_path / 'out'}",
        f"--cache_dir={tmp_path / 'cache'}",
    ))  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: knn_k must be at most the number of")
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "out").exists()

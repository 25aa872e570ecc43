"""Results are written to files, which keep previous ones, and to the model's card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from measuring import arguments, measure, strict, write_encoder
from workflow import leave_behind, small_files

from vicreg_hf.evaluation.card import add_evaluation
from vicreg_hf.evaluation.evaluate import evaluate
from vicreg_hf.evaluation.measurements import Measurement

pytestmark = pytest.mark.usefixtures("one_core", "own_cache")


def test_results_that_are_not_measured_anew_are_kept(few: Path, tmp_path: Path) -> None:
    out, said = tmp_path / "out", list[str]()

    def again(model: Path, protocols: str, **given: Any) -> dict[str, Any]:
        return evaluate(arguments(model, few, tmp_path, protocols, **given), say=said.append)

    model = write_encoder(tmp_path / "model")
    first = again(model, "collapse,retrieval")
    left = leave_behind(out, hours=2)
    again(model, "retrieval,collapse")  # the same, so that one is enough
    again(model, "collapse,knn,retrieval", knn_k="5")
    assert [path.name for path in out.iterdir() if path.is_dir()] == []
    assert not left.exists()
    wide = strict(out / "results.json")
    assert {m["name"] for m in first["results"]} < {m["name"] for m in wide["results"]}
    report = (out / "report.html").read_bytes()
    again(model, "collapse")
    assert f"What was in {out} before is now in {out / 'earlier-1'}: " in "".join(said)
    assert strict(out / "earlier-1" / "results.json") == wide
    assert (out / "earlier-1" / "report.html").read_bytes() == report
    another = write_encoder(tmp_path / "another", seed=1)
    again(another, "collapse")
    assert strict(out / "earlier-2" / "results.json")["model"] == "model"
    (out / "results.json").write_text('["mine"]')
    again(another, "collapse")
    assert strict(out / "earlier-3" / "results.json") == ["mine"]


def test_results_that_cannot_be_written_leave_others(few: Path, tmp_path: Path) -> None:
    model, out = write_encoder(tmp_path / "model"), tmp_path / "out"
    measure(model, few, tmp_path, "collapse,retrieval")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    message = rf"must be a directory .*large: '{out / 'results.json'}'. What"
    with small_files(len(before["results.json"]) // 2), pytest.raises(ValueError, match=message):
        measure(model, few, tmp_path, "collapse")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_results_stand_without_a_report_that_cannot_be_written(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = write_encoder(tmp_path / "model"), tmp_path / "out"
    before = measure(model, few, tmp_path, "collapse")
    with small_files((out / "report.html").stat().st_size // 2):
        assert measure(model, few, tmp_path, "collapse") == before
    assert f"warning: report.html is left out of {out}: OSError: " in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["results.json"]  # no report of other results


def test_a_card_gets_each_result_once(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    old = {"name": "run", "results": [{
        "task": {"type": "image-classification"}, "dataset": {"type": "a", "name": "a"},
        "metrics": [{"type": "accuracy", "value": 12.5, "name": "of training"}],
    }]}  # fmt: skip
    text = f"---\n{yaml.safe_dump({'license': 'mit', 'model-index': [old]})}---\n# mine\n"
    path.write_text(text + "\n## Training\n\nLong.\n")
    knn = Measurement("knn", "5-NN", 0.5, 20, 0, low=0.4, high=0.6)
    better, linear = replace(knn, value=0.55), replace(knn, name="linear probe", value=0.12345)
    rank = Measurement("collapse", "effective rank of features", 3.25, 20, 0, percent=False)
    for measurements, dataset in (
        ([knn], "few"), ([better, rank], "few"), ([knn], "other"), ([linear], "few")
    ):  # fmt: skip
        add_evaluation(path, measurements, dataset=dataset, split="test")
    after: Any = ModelCard(path.read_text())
    results = after.data.eval_results
    assert len(results) == 4
    assert {(e.dataset_name, e.metric_name): e.metric_value for e in results} == {
        ("a", "of training"): 12.5, ("few", "5-NN"): 55.0, ("few", "linear probe"): 12.35,
        ("other", "5-NN"): 50.0,
    }  # fmt: skip
    section = after.text.split("<!-- evaluation: few (test) -->")[1].split("<!-- end")[0]
    for each in (better, rank, linear):
        assert section.count(f"| {each.name} | {each.shown} | 20 |") == 1
    assert after.text.count("## Evaluation on few (test)") == 1
    assert after.text.count("## Evaluation on other (test)") == 1
    assert after.text.index("## Evaluation on other") < after.text.index("\n## Training\n")
    assert after.data.license == "mit"
    lines = after.text.splitlines()
    for line in ModelCard(text).text.splitlines():  # in their order
        lines = lines[lines.index(line) + 1 :]


def test_an_evaluation_adds_to_a_card_that_can_be_read(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, said = tmp_path / "run", list[str]()
    card = write_encoder(run / "encoder") / "README.md"

    def after(text: str, **given: Any) -> str:
        card.write_text(text)
        evaluate(arguments(run, few, tmp_path, knn_k="5", **given), say=said.append)
        assert strict(tmp_path / "out" / "results.json")["model"] == "run"
        assert [path for path in card.parent.iterdir() if path.suffix == ".partial"] == []
        return card.read_text()

    assert after("# mine\n", update_card=False) == "# mine\n"
    broken = "---\nlicense: [mit\n---\n# mine\n"
    unfinished = "---\nmodel-index:\n- name: a\n  results:\n  - task: {type: x}\n---\n# mine\n"
    for text in (broken, unfinished):
        assert after(text) == text
        assert f"warning: {card} was left as it was: " in capsys.readouterr().err
    found: Any = ModelCard(after("# mine\n\nNo metadata.\n"))
    assert said[-1].startswith(f"The results were added to {card}; --no_update_card")
    assert found.text.strip().startswith("# mine\n\nNo metadata.\n")
    assert [each.metric_name for each in found.data.eval_results] == ["5-NN top-1 accuracy"]

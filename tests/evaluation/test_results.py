"""Results are written to files, which keep previous ones, and to the model's card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from measuring import arguments, digits, measure, strict, write, write_encoder
from workflow import leave_behind, small_files

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


@pytest.mark.parametrize("name", ["results.json", "report.html"])
def test_results_that_cannot_be_written_leave_those_before(
    name: str, few: Path, tmp_path: Path
) -> None:
    model, out = write_encoder(tmp_path / "model"), tmp_path / "out"
    measure(model, few, tmp_path, "collapse,retrieval")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    message = rf"must be a directory .*large: '{out / name}'. What"
    with small_files(len(before[name]) // 2), pytest.raises(ValueError, match=message):
        measure(model, few, tmp_path, "collapse")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_card_gets_each_result_once(few: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_encoder(run / "encoder")
    path = run / "encoder" / "README.md"
    old = {"name": "run", "results": [{
        "task": {"type": "image-classification"}, "dataset": {"type": "a", "name": "a"},
        "metrics": [{"type": "accuracy", "value": 12.5, "name": "of training"}],
    }]}  # fmt: skip
    text = f"---\n{yaml.safe_dump({'license': 'mit', 'model-index': [old]})}---\n# mine\n"
    path.write_text(text + "\n## Training\n\nLong.\n")
    before = path.read_text()
    measure(run, few, tmp_path, "knn", knn_k="5", update_card=False)
    assert path.read_text() == before
    for protocols in ("knn,linear", "knn,retrieval,collapse"):
        found = measure(run, few, tmp_path, protocols, knn_k="5")
    write(tmp_path / "other", train=digits(range(30)), test=digits(range(80, 90)))
    measure(run / "encoder", tmp_path / "other", tmp_path, "knn", knn_k="5")
    measure(run, few, tmp_path, "linear")  # results of earlier evaluations stay
    assert strict(tmp_path / "out" / "results.json")["model"] == "run"
    after: Any = ModelCard(path.read_text())
    results = after.data.eval_results
    values = {(e.dataset_name, e.metric_name): e.metric_value for e in results}
    assert len(values) == len(results) == 1 + 5 + 1 + 1
    section = after.text.split("<!-- evaluation: few (test) -->")[1].split("<!-- end")[0]
    for name, each in found.items():
        shown = Measurement(**each).shown
        assert section.count(f"| {name} | {shown} | 20 |") == 1
        if each["percent"]:
            assert values["few", name] == round(100 * each["value"], 2)
    assert values["a", "of training"] == 12.5
    assert after.text.count("## Evaluation on few (test)") == 1
    assert after.text.count("## Evaluation on other (test)") == 1
    assert after.text.index("## Evaluation on other") < after.text.index("\n## Training\n")
    assert after.data.license == "mit"
    lines = after.text.splitlines()
    for line in ModelCard(before).text.splitlines():  # in their order
        lines = lines[lines.index(line) + 1 :]
    assert not [path for path in (run / "encoder").iterdir() if path.suffix == ".partial"]


def test_a_card_with_metadata_that_cannot_be_read_is_left_as_it_is(
    few: Path, tmp_path: Path
) -> None:
    model = write_encoder(tmp_path / "model")
    broken = "---\nlicense: [mit\n---\n# mine\n"
    unfinished = "---\nmodel-index:\n- name: a\n  results:\n  - task: {type: x}\n---\n# mine\n"
    for text in (broken, unfinished):
        (model / "README.md").write_text(text)
        said: list[str] = []
        evaluate(arguments(model, few, tmp_path, knn_k="5"), say=said.append)
        assert (model / "README.md").read_text() == text
        assert "warning: " in said[-1]
        assert "README.md was left as it was" in said[-1]
        assert strict(tmp_path / "out" / "results.json")["results"]
    (model / "README.md").write_text("# mine\n\nNo metadata.\n")
    said = []
    evaluate(arguments(model, few, tmp_path, knn_k="5"), say=said.append)
    assert said[-1].startswith(f"The results were added to {model / 'README.md'}; --no_update_card")
    card: Any = ModelCard.load(model / "README.md")
    assert card.text.strip().startswith("# mine\n\nNo metadata.\n")
    assert [each.metric_name for each in card.data.eval_results] == ["5-NN top-1 accuracy"]

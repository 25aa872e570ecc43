"""Where results go: into files that keep earlier ones, and into the card of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from measuring import arguments, digits, measure, strict, write, write_encoder, write_few
from workflow import SMALL, leave_behind, small_files

from vicreg_hf import pretrain
from vicreg_hf.evaluation.evaluate import evaluate
from vicreg_hf.evaluation.measurements import Measurement
from vicreg_hf.settings.command_line import parse_arguments

pytestmark = pytest.mark.usefixtures("one_core", "own_cache")


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_few(tmp_path_factory.mktemp("few") / "few")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "untrained")


# Files


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


# The card


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "digits"
    return write(root, train=digits(range(300)), test=digits(range(300, 420)))


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output_dir of a run, with a card."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    own = [f"--dataset_name={data}", f"--output_dir={directory}", "--max_steps=2"]
    pretrain(parse_arguments([*SMALL, *own]))
    return directory


def own_results(card: Any, dataset: str) -> list[tuple[str, float]]:
    results = card.data.eval_results or []
    return [(each.metric_name, each.metric_value) for each in results
            if each.dataset_name == dataset and "accuracy" in each.metric_name]  # fmt: skip


def test_the_card_of_a_run_gets_each_result_once(
    trained: Path, few: Path, encoder: Path, tmp_path: Path
) -> None:
    path = trained / "encoder" / "README.md"
    before = path.read_text()
    measure(trained, few, tmp_path, "knn", knn_k="5", update_card=False)
    assert path.read_text() == before
    card: Any = ModelCard(before)
    others = card.data.eval_results or []
    for protocols in ("knn,linear", "knn,retrieval,collapse"):
        found = measure(trained, few, tmp_path, protocols, knn_k="5")
    write(tmp_path / "other", train=digits(range(30)), test=digits(range(80, 90)))
    measure(trained / "encoder", tmp_path / "other", tmp_path, "knn", knn_k="5")
    measure(trained, few, tmp_path, "linear")  # results of earlier evaluations stay
    assert strict(tmp_path / "out" / "results.json")["model"] == "run"
    after: Any = ModelCard(path.read_text())
    results = {(e.dataset_name, e.metric_name): e.metric_value for e in after.data.eval_results}
    assert len(results) == len(after.data.eval_results) == len(others) + 5 + 1 + 1
    section = after.text.split("<!-- evaluation: few (test) -->")[1].split("<!-- end")[0]
    for name, each in found.items():
        shown = Measurement(**each).shown
        assert section.count(f"| {name} | {shown} | 20 |") == 1
        if each["percent"]:
            assert results["few", name] == round(100 * each["value"], 2)
    assert after.text.count("## Evaluation on few (test)") == 1
    assert after.text.count("## Evaluation on other (test)") == 1
    assert after.text.index("## Evaluation on other") < after.text.index("\n## Training\n")
    assert {(e.dataset_name, e.metric_name) for e in others} <= results.keys()
    assert after.data.license == card.data.license
    assert after.data.tags == card.data.tags
    lines = after.text.splitlines()
    for line in card.text.splitlines():  # in their order
        lines = lines[lines.index(line) + 1 :]
    assert not [path for path in (trained / "encoder").iterdir() if path.suffix == ".partial"]
    assert not (encoder / "README.md").exists()  # none is made where there was none


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
    assert [name for name, _ in own_results(card, "few")] == ["5-NN top-1 accuracy"]

"""The wheel, installed where there is no clone, and the command that comes with it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from workflow import LIMIT, ROOT, SMALL, environment, metrics, write_images

pytestmark = pytest.mark.usefixtures("one_core")
NOT_SHIPPED = {"README.md"}
"""Files of the package's folders that only readers of a clone need."""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the wheel, built from a copy of the sources."""
    place = tmp_path_factory.mktemp("wheel")
    sources = place / "sources"
    ignore = shutil.ignore_patterns("__pycache__", "pictures", "demo")
    for folder in ("vicreg_hf", "model_cards"):
        shutil.copytree(ROOT / folder, sources / folder, ignore=ignore)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, sources)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "--no-cache-dir"]
    alone = ["--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "wheel", *alone, "-w", str(place), str(sources)], check=True)
    (wheel,) = place.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        file.relative_to(sources).as_posix()
        for file in (sources / "vicreg_hf").rglob("*")
        if file.is_file() and file.name not in NOT_SHIPPED
    }
    assert wanted | {"vicreg_hf/model_cards/template.md.jinja"} <= names
    target = place / "installed"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
    return target


def run(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the installed program, or Python on a module, in a folder that is no clone."""
    program = [str(installed / "bin" / "vicreg-hf")] if words[0][0] != "-" else [sys.executable]
    return subprocess.run(
        [*program, *words], cwd=folder, env=environment(PYTHONPATH=str(installed)),
        capture_output=True, text=True, timeout=LIMIT,
    )  # fmt: skip


def test_the_installed_command_lists_recipes_and_refuses_flags(
    installed: Path, tmp_path: Path
) -> None:
    where = run(installed, tmp_path, "-c", "import vicreg_hf; print(vicreg_hf.__file__)")
    assert Path(where.stdout.strip()).is_relative_to(installed)
    done = run(installed, tmp_path, "recipes")
    assert done.returncode == 0, done.stderr
    shipped = sorted(file.stem for file in (ROOT / "vicreg_hf" / "recipes").glob("*.yaml"))
    assert [line for line in done.stdout.splitlines() if line in shipped] == shipped
    done = run(installed, tmp_path, "pretrain", "--epochs", "3")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--num_train_epochs is one" in done.stderr


@pytest.mark.slow
def test_the_installed_command_trains(installed: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "images", rows=32)
    small = [*SMALL, "--dataset_name=images", "--max_steps=2", "--output_dir=out"]
    done = run(installed, tmp_path, "pretrain", *small)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in metrics(tmp_path / "out") if "loss" in row] == [1, 2]
    assert (tmp_path / "out" / "encoder" / "README.md").is_file()  # from the template
    # the same code, as a launcher of several processes starts it
    again = run(installed, tmp_path, "-m", "vicreg_hf.commands.pretrain", *small)
    assert again.returncode == 0, again.stderr
    assert "out/encoder" in again.stdout
    assert {file.name for file in tmp_path.iterdir()} == {"images", "out"}

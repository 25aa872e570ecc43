"""The files for `accelerate launch` that README names."""

from __future__ import annotations

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from workflow import ROOT


@pytest.mark.parametrize(("name", "machines", "processes"), [("8-gpus", 1, 8), ("4x8-gpus", 4, 32)])
def test_accelerate_reads_the_file(name: str, machines: int, processes: int) -> None:
    path = ROOT / "scripts" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert (config.num_machines, config.num_processes) == (machines, processes)  # pyright: ignore
    assert config.mixed_precision == "bf16"
    assert f"scripts/{name}.yaml" in (ROOT / "README.md").read_text()

"""Encoders that stock loaders would not load as they are, which are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from families import same_state, trained
from torch import nn

from vicreg_hf import export_encoder
from vicreg_hf.hub.export import ExportError
from vicreg_hf.hub.layout import files_to_push


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_an_export_that_stock_loaders_would_not_follow_is_refused(tmp_path: Path) -> None:
    exported = trained().train()
    export_encoder(exported, tmp_path)
    assert exported.training  # it is as it was
    assert exported.encoder.training
    assert same_state(exported, trained())
    before = contents(tmp_path)
    other: Any = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"^model must be a VICRegModel, got Linear; VICRegModel"):
        export_encoder(other, tmp_path)
    model = trained("resnet10t")
    backbone: Any = model.backbone
    backbone.maxpool = nn.Identity()
    with pytest.raises(ExportError, match="same features"):
        export_encoder(model, tmp_path)
    backbone.conv1[0] = nn.Conv2d(3, 24, 5, padding=2, bias=False)
    with pytest.raises(ExportError, match="must be able to load"):
        export_encoder(model, tmp_path)
    assert contents(tmp_path) == before


def test_a_directory_is_pushed_with_its_expander_or_as_if_there_were_none(tmp_path: Path) -> None:
    whole = export_encoder(trained(), tmp_path / "whole", include_expander=True)
    bare = export_encoder(trained(), tmp_path / "bare")
    pushed = {
        name: content.read_bytes() if isinstance(content, Path) else content
        for name, content in files_to_push(whole, include_expander=False).items()
    }
    assert pushed == contents(bare)
    paths = files_to_push(whole, include_expander=True)
    assert {name: Path(str(path)).read_bytes() for name, path in paths.items()} == contents(whole)

"""Data sets and an encoder that tests of evaluations share."""

from __future__ import annotations

from pathlib import Path

import pytest
from measuring import digits, write, write_encoder, write_few


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "digits"
    return write(root, train=digits(range(300)), test=digits(range(300, 420)))


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_few(tmp_path_factory.mktemp("few") / "few")


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "untrained")

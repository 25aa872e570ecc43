"""What a stranger may have put in place of files."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


def plant(file: Path, marker: Path, *, as_torch_file: bool = False) -> None:
    """Put a bomb where something harmless is expected, pickled alone or in a file of torch."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if as_torch_file:
        torch.save(Bomb(marker), file)
    else:
        file.write_bytes(pickle.dumps(Bomb(marker), protocol=2))  # torch's own


def write_tar(path: Path, files: dict[str, bytes], mode: Any = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path

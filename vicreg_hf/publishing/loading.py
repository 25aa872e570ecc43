"""Finding and loading what a run made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vicreg_hf.modeling_vicreg import VICRegModel
from vicreg_hf.runtime.checks import one_line


def load_model(directory: Path) -> tuple[VICRegModel, bool]:
    """The model in a directory, and whether its expander is there too and not new.

    Raises:
        ValueError: the directory holds something else.
    """
    try:
        loaded: Any = VICRegModel.from_pretrained(directory, output_loading_info=True)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"{directory} must hold an encoder or a training checkpoint, and does not load: "
            f"{one_line(error)}"
        ) from error
    model, found = loaded
    heads = ("expander.", "local_expander.")
    absent = sorted(name for name in found["missing_keys"] if not name.startswith(heads))
    if absent:
        raise ValueError(
            f"{directory} must hold every weight of {model.config.architecture}, and lacks "
            f"{len(absent)}: {', '.join(absent[:5])}."
        )
    return model, not found["missing_keys"]

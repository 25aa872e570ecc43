"""What `import vicreg_hf` loads, and what it registers once others are loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest
from workflow import ROOT

LIBRARIES = ("timm", "transformers", "accelerate", "datasets", "torchvision", "matplotlib")


def run(code: str) -> str:
    """Run Python in a process of its own, which ends well; its output."""
    python = [sys.executable, "-c", code]
    return subprocess.run(python, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


def test_the_loss_alone_loads_torch_alone() -> None:
    code = (
        "import sys, torch; from vicreg_hf import vicreg_loss; z = torch.eye(4); "
        "assert vicreg_loss(z, z).loss > 0; print(*sys.modules)"
    )
    assert not set(LIBRARIES) & set(run(code).split())


REGISTERED = """
from transformers import AutoConfig, AutoModel
config = AutoConfig.for_model("vicreg", architecture="test_vit", expander_dims=[8])
assert type(AutoModel.from_config(config)).__name__ == "VICRegModel"
assert timm.is_model("resnet18_cifar")
"""


@pytest.mark.parametrize(
    "order", ["vicreg_hf, transformers, timm", "timm, transformers, vicreg_hf"]
)
def test_models_are_registered_whichever_package_is_imported_first(order: str) -> None:
    run(f"import {order}" + REGISTERED)

"""Joining the processes of a run."""

from __future__ import annotations

import pytest
from accelerate.state import AcceleratorState

from vicreg_hf.runtime.machine import start_accelerator


@pytest.mark.usefixtures("one_core")
def test_half_precision_is_said_to_be_ignored_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    AcceleratorState._reset_state(reset_partial_state=True)
    start_accelerator()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert "fp16 is ignored on CPU, which computes in float32" in capsys.readouterr().err

"""What accelerate's configuration may not ask for, and how it wraps models."""

from __future__ import annotations

import warnings

import pytest
import torch
from accelerate.state import AcceleratorState
from gloo import GlooPool
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vicreg_hf.runtime.distributed import rank
from vicreg_hf.runtime.machine import _OwnBuffers, start_accelerator

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("asked", "said", "may_shard"),
    [
        (
            FSDP2,
            "a model must be whole in every process, got FSDP from .*`accelerate config`.$",
            False,
        ),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP must be of version 2, got 1 from", True),
        (
            FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"},
            "fsdp_offload_params must be false .*got true",
            True,
        ),
        (
            FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "fsdp_activation_checkpointing must .*use --gradient_checkpointing true instead",
            True,
        ),
        ({"ACCELERATE_USE_DEEPSPEED": "1"}, "got DeepSpeed from accelerate's configuration", True),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            "gradient_accumulation_steps=4; set it",
            False,
        ),
    ],
)
def test_what_would_change_the_gradient_or_cannot_shard_the_model_is_refused(
    asked: dict[str, str], said: str, may_shard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    threads = torch.get_num_threads()
    try:
        with pytest.raises(ValueError, match=said):
            start_accelerator(may_shard=may_shard)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.set_num_threads(threads)


def buffers_after_a_pass() -> tuple[float, list[str]]:
    """The running mean after a pass of a process's own rows, and what torch warns of."""
    model = nn.BatchNorm1d(1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        wrapped = DistributedDataParallel(model, **_OwnBuffers().to_kwargs())
        for _ in range(2):  # buffers are sent before a pass
            wrapped(torch.full((2, 1), float(rank())))
    assert model.running_mean is not None
    return model.running_mean.item(), [str(w.message) for w in said]


def test_ddp_leaves_buffers_alone_and_warns_of_nothing(gloo: GlooPool) -> None:
    (first, said), (second, said_too) = gloo.run(2, buffers_after_a_pass)
    assert (first, said, said_too) == (0.0, [], [])
    assert second == pytest.approx(0.19)  # 0.1 where the first process had sent its own between

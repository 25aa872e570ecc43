"""What scripts import, for the process that `warm` forks them from."""

from __future__ import annotations

import gc
import importlib

for name in (
    "vicreg_hf.training.pretrain", "vicreg_hf.training.monitoring.preview",
    "vicreg_hf.training.replay", "vicreg_hf.evaluation.evaluate", "vicreg_hf.features.extract",
    "workflow", "torch.distributed", "matplotlib.backends.backend_agg",
    "transformers.models.timm_wrapper.modeling_timm_wrapper",
):  # fmt: skip
    importlib.import_module(name)
# What is here stays: no forked process need look through it, or copy it to mark it.
gc.collect()
gc.freeze()

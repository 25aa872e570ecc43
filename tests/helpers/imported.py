"""Imports of the process that `warm` forks scripts from."""

from __future__ import annotations

import gc
import importlib

for name in (
    "vicreg_hf.training.pretrain", "vicreg_hf.training.monitoring.preview",
    "vicreg_hf.training.replay", "vicreg_hf.evaluation.evaluate", "vicreg_hf.features.extract",
    "gloo", "torch.distributed", "matplotlib.backends.backend_agg",
    "transformers.models.timm_wrapper.modeling_timm_wrapper",
):  # fmt: skip
    importlib.import_module(name)
# Forked processes need not look through these objects, or copy them to mark them.
gc.collect()
gc.freeze()

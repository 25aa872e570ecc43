"""VICReg pretraining of timm backbones, published so that every loader takes them.

Names are loaded when they are first asked for. As soon as transformers' Auto classes and timm's
models are imported, `VICRegModel` is registered with the former, and ResNets that timm lacks with
the latter.
"""

import lazy_loader

from vicreg_hf.runtime.late_imports import import_after

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

import_after("transformers.models.auto.modeling_auto", "vicreg_hf.modeling_vicreg")
import_after("timm.models", "vicreg_hf.models.resnets")

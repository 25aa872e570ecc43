"""VICReg pretraining of timm backbones, published so that every loader takes them.

Importing this registers `VICRegModel` with transformers' Auto classes, and ResNets that timm lacks
with timm.
"""

from vicreg_hf.arguments import PretrainingArguments
from vicreg_hf.augmentation import ViewRecipe
from vicreg_hf.configuration_vicreg import VICRegConfig
from vicreg_hf.conversion import convert_checkpoint
from vicreg_hf.evaluating import evaluate
from vicreg_hf.evaluation import collapse_report, knn_accuracy, linear_probe
from vicreg_hf.evaluation.arguments import EvaluationArguments
from vicreg_hf.evaluation.finetune import FinetuneSettings, finetune
from vicreg_hf.exporting import export_encoder
from vicreg_hf.loss import VICRegLoss, vicreg_loss
from vicreg_hf.modeling_vicreg import VICRegModel, VICRegOutput
from vicreg_hf.multi_view import covariance_term, multi_view_loss, variance_term
from vicreg_hf.optim import LARS
from vicreg_hf.pretraining import pretrain
from vicreg_hf.publishing import publish
from vicreg_hf.views import TwoViews

__version__ = "0.1.0"

__all__ = [
    "LARS",
    "EvaluationArguments",
    "FinetuneSettings",
    "PretrainingArguments",
    "TwoViews",
    "VICRegConfig",
    "VICRegLoss",
    "VICRegModel",
    "VICRegOutput",
    "ViewRecipe",
    "collapse_report",
    "convert_checkpoint",
    "covariance_term",
    "evaluate",
    "export_encoder",
    "finetune",
    "knn_accuracy",
    "linear_probe",
    "multi_view_loss",
    "pretrain",
    "publish",
    "variance_term",
    "vicreg_loss",
]

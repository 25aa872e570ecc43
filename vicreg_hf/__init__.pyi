from .configuration_vicreg import VICRegConfig
from .evaluation.evaluate import evaluate
from .evaluation.finetuning import finetune
from .hub.export import export_encoder
from .loss.local import local_loss
from .loss.multi_view import multi_view_loss
from .loss.regularizers import covariance_term, variance_term
from .loss.vicreg import VICRegLoss, vicreg_loss
from .metrics.collapse import collapse_report
from .metrics.knn import knn_accuracy
from .metrics.linear_probe import linear_probe
from .modeling_vicreg import VICRegModel, VICRegOutput
from .models.batch_norm import synchronize
from .publishing.conversion import convert_checkpoint
from .publishing.publish import publish
from .runtime.distributed import gather_with_gradient
from .settings.evaluation import EvaluationArguments
from .settings.finetuning import FinetuneSettings
from .settings.pretraining import PretrainingArguments
from .training.building.optimizers import LARS
from .training.callbacks import Callback
from .training.gradcache import backward_in_chunks
from .training.pretrain import pretrain
from .training.trainer import LogTerms, ViewCollator
from .views.presets import ViewRecipe
from .views.two_views import TwoViews

__version__: str

__all__ = [
    "LARS",
    "Callback",
    "EvaluationArguments",
    "FinetuneSettings",
    "LogTerms",
    "PretrainingArguments",
    "TwoViews",
    "VICRegConfig",
    "VICRegLoss",
    "VICRegModel",
    "VICRegOutput",
    "ViewCollator",
    "ViewRecipe",
    "backward_in_chunks",
    "collapse_report",
    "convert_checkpoint",
    "covariance_term",
    "evaluate",
    "export_encoder",
    "finetune",
    "gather_with_gradient",
    "knn_accuracy",
    "linear_probe",
    "local_loss",
    "multi_view_loss",
    "pretrain",
    "publish",
    "synchronize",
    "variance_term",
    "vicreg_loss",
]

"""Measures of how good a representation is, for any encoder."""

from vicreg_hf.evaluation.collapse import (
    CollapseReport,
    alignment,
    collapse_report,
    effective_rank,
    embedding_std,
    uniformity,
)
from vicreg_hf.evaluation.features import extract_features, pixel_features
from vicreg_hf.evaluation.knn import knn_accuracy, knn_predict
from vicreg_hf.evaluation.linear import LinearResult, linear_probe

__all__ = [
    "CollapseReport",
    "LinearResult",
    "alignment",
    "collapse_report",
    "effective_rank",
    "embedding_std",
    "extract_features",
    "knn_accuracy",
    "knn_predict",
    "linear_probe",
    "pixel_features",
    "uniformity",
]

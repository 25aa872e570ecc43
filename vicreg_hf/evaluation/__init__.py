"""Measures of how good a representation is, for any encoder."""

from vicreg_hf.evaluation.collapse import (
    alignment,
    effective_rank,
    embedding_std,
    uniformity,
)
from vicreg_hf.evaluation.features import extract_features, pixel_features
from vicreg_hf.evaluation.knn import knn_accuracy, knn_predict

__all__ = [
    "alignment",
    "effective_rank",
    "embedding_std",
    "extract_features",
    "knn_accuracy",
    "knn_predict",
    "pixel_features",
    "uniformity",
]

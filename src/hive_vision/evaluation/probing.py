"""Probes of a frozen encoder."""

from pathlib import Path

from sklearn.neighbors import KNeighborsClassifier

from hive_vision.data.classification import load_classification
from hive_vision.evaluation.features import mean_patch_features


def knn_accuracy(encoder: str | Path, source: str | Path, neighbours: int = 5) -> float:
    """Classify test images by their nearest training images; nothing is trained.

    Args:
        encoder: Folder or hub id of the encoder.
        source: Classification set with splits ``train`` and ``test``.
        neighbours: How many neighbours vote, by cosine similarity of mean patch features.

    Returns:
        Accuracy on the test split, 0 to 1.
    """
    classifier = KNeighborsClassifier(neighbours, metric="cosine")
    classifier.fit(*mean_patch_features(encoder, load_classification(source, "train")))
    features, labels = mean_patch_features(encoder, load_classification(source, "test"))
    return float(classifier.score(features, labels))

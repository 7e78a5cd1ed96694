"""The nearest-neighbour probe against a vote counted by hand and against scikit-learn."""

from pathlib import Path

import datasets
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from hive_vision.data.classification import load_classification
from hive_vision.evaluation.features import mean_patch_features
from hive_vision.evaluation.probing import knn_accuracy

CLASSES = 3


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise around one colour for each class, hard enough that the probe is sometimes wrong."""
    folder = tmp_path_factory.mktemp("labelled")
    random = np.random.default_rng(0)
    colours = random.integers(100, 156, (CLASSES, 3))
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=[f"class {i}" for i in range(CLASSES)]),
        }
    )
    for split, count in (("train", 36), ("test", 24)):
        labels = random.integers(0, CLASSES, count)
        noise = random.normal(0, 20, (count, 1, 1, 3)) + random.normal(0, 60, (count, 32, 32, 3))
        pixels = np.clip(colours[labels][:, None, None] + noise, 0, 255).astype(np.uint8)
        rows = {"image": [Image.fromarray(p) for p in pixels], "label": labels.tolist()}
        data = datasets.Dataset.from_dict(rows, features=features)
        data.to_parquet(folder / f"{split}.parquet")
    return folder


def features_of(encoder: Path, source: Path, split: str) -> tuple[NDArray, NDArray]:
    return mean_patch_features(encoder, load_classification(source, split))


def vote(encoder: Path, source: Path, neighbours: int) -> float:
    """Nearest by cosine; ties go to the smaller class number, as in scikit-learn."""
    known, known_labels = features_of(encoder, source, "train")
    unknown, labels = features_of(encoder, source, "test")
    known /= np.linalg.norm(known, axis=1, keepdims=True)
    unknown /= np.linalg.norm(unknown, axis=1, keepdims=True)
    nearest = np.argsort(-(unknown @ known.T), axis=1)[:, :neighbours]
    answers = [np.bincount(known_labels[row], minlength=CLASSES).argmax() for row in nearest]
    return float(np.mean(np.array(answers) == labels))


@pytest.mark.parametrize("family", ["siglip", "clip"])
@pytest.mark.parametrize("neighbours", [1, 5])
def test_equals_a_vote_by_hand(
    family: str, neighbours: int, backbone_folders: dict[str, Path], labelled: Path
) -> None:
    accuracy = knn_accuracy(backbone_folders[family], labelled, neighbours)
    assert isinstance(accuracy, float)
    assert accuracy == pytest.approx(vote(backbone_folders[family], labelled, neighbours))


def test_equals_scikit_learn(backbone_folders: dict[str, Path], labelled: Path) -> None:
    encoder = backbone_folders["siglip"]
    classifier = KNeighborsClassifier(n_neighbors=5, metric="cosine")
    classifier.fit(*features_of(encoder, labelled, "train"))
    expected = classifier.score(*features_of(encoder, labelled, "test"))
    assert 0.4 < expected < 1, "too easy or too hard to tell anything"
    assert knn_accuracy(encoder, labelled) == pytest.approx(expected)


def test_training_images_are_not_the_test(
    backbone_folders: dict[str, Path], tmp_path: Path
) -> None:
    # The test labels contradict the training labels of the very same images.
    images = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    for split, labels in (("train", [0, 1]), ("test", [1, 0])):
        data = datasets.Dataset.from_dict(
            {"image": images, "label": labels},
            features=datasets.Features(
                {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
            ),
        )
        data.to_parquet(tmp_path / f"{split}.parquet")
    assert knn_accuracy(backbone_folders["siglip"], tmp_path, neighbours=1) == 0.0


def test_missing_split(backbone_folders: dict[str, Path], tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict(
        {"image": [Image.new("RGB", (32, 32))] * 2, "label": [0, 1]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    data.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="no split 'test'"):
        knn_accuracy(backbone_folders["siglip"], tmp_path, neighbours=1)

import pytest

from hive_vision.data.miniature import MiniatureData, build_miniature_data

SETTINGS = MiniatureData(
    seed=3,
    train_scenes=240,
    validation_scenes=60,
    classification_train=72,
    classification_test=40,
)


@pytest.fixture(scope="package")
def miniature(tmp_path_factory):
    """A small miniature's data, built once."""
    folder = tmp_path_factory.mktemp("miniature") / "data"
    build_miniature_data(folder, SETTINGS)
    return folder

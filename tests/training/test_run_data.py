from hive_vision.models.processing import HiveProcessor
from hive_vision.training.run_data import load_run_data


def test_captions_are_split_and_tokenized(recipe):
    arguments = recipe()
    processor = HiveProcessor.from_backbones(arguments.model.vision, arguments.model.language)
    data = load_run_data(arguments.data, processor)
    assert len(data.train) + len(data.held_out) == 40
    assert data.train[0]["input_ids"][0] == processor.start_token_id

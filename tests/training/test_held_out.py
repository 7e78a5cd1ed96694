import torch
from hypothesis import given
from hypothesis import strategies as st

from hive_vision.training.held_out import ShuffledImages, _share
from tests.training.test_trainer import make_trainer


class Pairs:
    """Six samples whose image is their number."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return {"image": index, "input_ids": [index], "sample_id": index, "bad_samples": []}

    def with_images_of(self, row, other):
        return {**self[row], "image": other}


def test_shuffled_images_come_from_half_the_data_away():
    shuffled = ShuffledImages(Pairs())
    assert [shuffled[i]["image"] for i in range(6)] == [3, 4, 5, 0, 1, 2]
    assert [shuffled[i]["input_ids"] for i in range(6)] == [[i] for i in range(6)]


@given(st.integers(1, 200), st.integers(1, 16), st.integers(1, 8))
def test_every_row_once_in_equally_many_batches(count, batch_size, ranks):
    shares = [_share(count, batch_size, rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    rows = [row for share in shares for batch in share for row in batch]
    assert sorted(rows) == list(range(count))
    assert all(len(batch) <= batch_size for share in shares for batch in share)


def test_random_numbers_of_training_are_left_alone(recipe):
    """Else evaluating more often would give other weights where there is dropout."""
    _, trainer = make_trainer(recipe())
    before = torch.get_rng_state()
    trainer.held_out_loss()
    trainer.held_out_loss("shuffled")
    assert torch.equal(torch.get_rng_state(), before)

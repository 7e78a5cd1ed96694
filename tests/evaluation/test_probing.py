"""Probes on features against scikit-learn, votes by hand, and what their choices may see."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn.functional import cross_entropy

from hive_vision.evaluation.arguments import FastProtocol
from hive_vision.evaluation.features import Features, FrozenEncoder, Reading, read_features
from hive_vision.evaluation.probing import (
    LabelledFeatures,
    _Attentive,
    _batches,
    _hold_out,
    probe_fast,
    probe_neighbours,
)
from hive_vision.models.probes import AttentiveProbe
from tests.evaluation.helpers import colour_set

CLASSES, WIDTH = 10, 16
LINEAR = FastProtocol(inverse_penalties=(0.01, 1.0))


def clouds(count: int, seed: int, spread: float = 1.6) -> LabelledFeatures:
    """Ten overlapping clouds that have neither mean 0 nor one scale."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(CLASSES, WIDTH))
    labels = np.arange(count) % CLASSES
    values = centres[labels] + random.normal(0, spread, (count, WIDTH))
    scales = np.geomspace(0.1, 10, WIDTH)
    return LabelledFeatures(Features((5 + values * scales).astype(np.float32)), labels)


@pytest.fixture(scope="module")
def train() -> LabelledFeatures:
    return clouds(300, 1)


@pytest.fixture(scope="module")
def test() -> LabelledFeatures:
    return clouds(2000, 2)


@pytest.fixture(scope="module")
def colours(
    backbone_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[LabelledFeatures, LabelledFeatures]:
    """What a tiny encoder says about images of three colours."""
    encoder = FrozenEncoder.load(backbone_folders["siglip"])
    cache = tmp_path_factory.mktemp("features")
    data = colour_set(45, 60, spread=120)
    first, second = (
        LabelledFeatures(read_features(encoder, part, [Reading(8)], cache)[0], part.labels)
        for part in (data.train, data.test)
    )
    return first, second


def shuffled(data: LabelledFeatures) -> LabelledFeatures:
    return LabelledFeatures(data.features, np.random.default_rng(9).permutation(data.labels))


class TestNeighbours:
    @pytest.mark.parametrize("neighbours", [1, 2, 5, 300])
    def test_equals_scikit_learn(
        self, train: LabelledFeatures, test: LabelledFeatures, neighbours: int
    ) -> None:
        reference = KNeighborsClassifier(neighbours, metric="cosine")
        reference.fit(np.asarray(train.features.values), train.labels)
        expected = reference.predict(test.features.values) == test.labels
        outcome = probe_neighbours(train, test, neighbours)
        assert outcome.correct.dtype == bool
        np.testing.assert_array_equal(outcome.correct, expected[None])
        assert (outcome.seeds, outcome.chosen) == ((), ())

    @pytest.mark.parametrize("neighbours", [1, 5])
    def test_equals_a_vote_by_hand(
        self, colours: tuple[LabelledFeatures, LabelledFeatures], neighbours: int
    ) -> None:
        """Nearest by cosine; ties go to the smaller class number, as in scikit-learn."""
        (known, unknown), (train, test) = ([f.features.values for f in colours], colours)
        known = known / np.linalg.norm(known, axis=1, keepdims=True)
        unknown = unknown / np.linalg.norm(unknown, axis=1, keepdims=True)
        nearest = np.argsort(-(unknown @ known.T), axis=1)[:, :neighbours]
        votes = np.array([np.bincount(train.labels[row], minlength=3).argmax() for row in nearest])
        outcome = probe_neighbours(train, test, neighbours)
        np.testing.assert_array_equal(outcome.correct[0], votes == test.labels)
        assert 0.4 < outcome.correct.mean() < 1, "too easy or too hard to tell anything"

    def test_length_does_not_count(self, train: LabelledFeatures, test: LabelledFeatures) -> None:
        lengths = np.random.default_rng(3).uniform(0.1, 10, (len(test.labels), 1))
        scaled = (test.features.values * lengths).astype(np.float32)
        outcome = probe_neighbours(train, LabelledFeatures(Features(scaled), test.labels), 1)
        same = outcome.correct == probe_neighbours(train, test, 1).correct
        assert same.mean() > 0.999  # rounding may turn a tie

    def test_training_images_are_not_the_test(self) -> None:
        """The test labels contradict the training labels of the very same images."""
        values = Features(np.eye(2, dtype=np.float32))
        train, test = (LabelledFeatures(values, np.array(labels)) for labels in ([0, 1], [1, 0]))
        assert probe_neighbours(train, test, 1).correct.tolist() == [[False, False]]

    @pytest.mark.parametrize("neighbours", [0, 301])
    def test_more_neighbours_than_images(
        self, train: LabelledFeatures, test: LabelledFeatures, neighbours: int
    ) -> None:
        with pytest.raises(ValueError, match=f"neighbours is {neighbours}; .* 300 training") as bad:
            probe_neighbours(train, test, neighbours)
        assert "\n" not in str(bad.value)


def reference_search(
    train: LabelledFeatures, test: LabelledFeatures, settings: FastProtocol, held_out: Any
) -> tuple[dict[str, float], NDArray[np.bool_]]:
    """The same choice by scikit-learn's grid search, and which test images its head got right."""
    fold = np.full(len(train.labels), -1)
    fold[held_out] = 0
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=settings.max_iterations)),
        {"logisticregression__C": list(settings.inverse_penalties)},
        cv=PredefinedSplit(fold),
    )
    search.fit(np.asarray(train.features.values), train.labels)
    correct = search.predict(np.asarray(test.features.values)) == test.labels
    penalty = search.best_params_["logisticregression__C"]
    return {"inverse_penalty": penalty, "held_out_accuracy": search.best_score_}, correct


class TestLinear:
    def test_agrees_with_scikit_learn(
        self, train: LabelledFeatures, test: LabelledFeatures
    ) -> None:
        settings = FastProtocol(inverse_penalties=(0.001, 0.1, 10.0))
        outcome = probe_fast(train, test, CLASSES, settings, (0, 1))
        for row, seed in enumerate((0, 1)):
            _, held_out = _hold_out(train.labels, settings.holdout, seed)
            chosen, expected = reference_search(train, test, settings, held_out)
            assert chosen.items() <= outcome.chosen[row].items()
            assert 1 < outcome.chosen[row]["iterations"] < settings.max_iterations
            assert abs(outcome.correct[row].mean() - expected.mean()) < 0.005
            assert (outcome.correct[row] == expected).mean() > 0.99
        assert 0.5 < outcome.correct.mean() < 0.95, "too easy or too hard to tell anything"

    def test_agrees_with_scikit_learn_on_an_encoder(
        self, colours: tuple[LabelledFeatures, LabelledFeatures]
    ) -> None:
        train, test = colours
        settings = FastProtocol(inverse_penalties=(0.1, 1.0))
        outcome = probe_fast(train, test, 3, settings, (5,))
        _, held_out = _hold_out(train.labels, settings.holdout, 5)
        _, expected = reference_search(train, test, settings, held_out)
        np.testing.assert_array_equal(outcome.correct[0], expected)
        assert outcome.correct.mean() > 0.5

    def test_shapes(self, train: LabelledFeatures, test: LabelledFeatures) -> None:
        outcome = probe_fast(train, test, CLASSES, LINEAR, (7, 3, 5))
        assert (outcome.correct.shape, outcome.correct.dtype) == ((3, 2000), bool)
        assert outcome.seeds == (7, 3, 5)
        assert [set(chosen) for chosen in outcome.chosen] == [
            {"inverse_penalty", "held_out_accuracy", "iterations"}
        ] * 3
        short = probe_fast(train, test, CLASSES, replace(LINEAR, max_iterations=2), (7,))
        assert short.chosen[0]["iterations"] == 2, "it stopped short of the optimum, and says so"

    def test_the_head_learns_from_all_training_images(self, test: LabelledFeatures) -> None:
        """Whatever was held out for the choice: with one candidate no seed matters."""
        train = clouds(60, 1)
        settings = FastProtocol(inverse_penalties=(1.0,))
        outcome = probe_fast(train, test, CLASSES, settings, (0, 1))
        np.testing.assert_array_equal(outcome.correct[0], outcome.correct[1])
        reference = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        reference.fit(train.features.values, train.labels)
        expected = reference.predict(test.features.values) == test.labels
        np.testing.assert_array_equal(outcome.correct[0], expected)

    def test_test_labels_have_no_part(
        self, train: LabelledFeatures, test: LabelledFeatures
    ) -> None:
        first = probe_fast(train, test, CLASSES, LINEAR, (0, 1))
        other = shuffled(test)
        second = probe_fast(train, other, CLASSES, LINEAR, (0, 1))
        assert first.chosen == second.chosen
        # Both outcomes are of the same predictions: where both are right, the labels are one.
        both = first.correct & second.correct
        assert (np.where(both, test.labels, 0) == np.where(both, other.labels, 0)).all()
        same_label = test.labels == other.labels
        np.testing.assert_array_equal(first.correct[:, same_label], second.correct[:, same_label])

    def test_classes_that_the_test_lacks(self, train: LabelledFeatures) -> None:
        test = LabelledFeatures(Features(clouds(50, 3).features.values[3:4]), np.array([3]))
        assert probe_fast(train, test, CLASSES, LINEAR, (0,)).correct.shape == (1, 1)


class TestHoldOut:
    @pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
    def test_splits_each_class_in_proportion(self, share: float) -> None:
        labels = np.repeat([0, 1, 2], [200, 100, 20])
        first, second = _hold_out(labels, share, 0)
        np.testing.assert_array_equal(np.sort([*first, *second]), np.arange(320))
        np.testing.assert_allclose(np.bincount(labels[second]), share * np.array([200, 100, 20]))

    def test_every_class_is_on_both_sides_of_a_small_set(self) -> None:
        labels = np.repeat(np.arange(5), 2)
        first, second = _hold_out(labels, 0.5, 3)
        assert set(labels[first]) == set(labels[second]) == set(range(5))

    @pytest.mark.parametrize(
        "labels",
        [
            np.array([0, 1, 1, 1, 2, 2, 2, 2]),
            np.repeat(np.arange(50), 2),
            np.array([7, 7, 7, 3, 3, 3, 3, 3]),
        ],
        ids=["a class of one", "more classes than held-out images", "gaps"],
    )
    def test_where_classes_cannot_be_kept_in_proportion(self, labels: Any) -> None:
        first, second = _hold_out(labels, 0.2, 0)
        np.testing.assert_array_equal(np.sort([*first, *second]), np.arange(len(labels)))
        assert len(second) == np.ceil(0.2 * len(labels))

    def test_the_seed_chooses(self) -> None:
        labels = np.arange(100) % 4
        same, again, other = (_hold_out(labels, 0.2, seed)[1].tolist() for seed in (0, 0, 1))
        assert same == again != other

    @pytest.mark.parametrize("seed", [0, 1])
    def test_batches_are_epochs(self, seed: int) -> None:
        rows = np.arange(100, 125)
        batches = list(_batches(rows, 10, 7, seed))
        assert [len(batch) for batch in batches] == [10, 10, 5, 10, 10, 5, 10]
        for start in (0, 3):
            epoch = np.concatenate(batches[start : start + 3])
            np.testing.assert_array_equal(np.sort(epoch), rows)
        assert not np.array_equal(batches[0], batches[3])
        again = list(_batches(rows, 10, 7, seed))
        assert all(np.array_equal(*pair) for pair in zip(batches, again, strict=True))
        assert not np.array_equal(batches[0], next(_batches(rows, 10, 7, seed + 1)))


ATTENTIVE = FastProtocol(
    learning_rates=(1e-6, 1e-2), weight_decays=(0.01,), epochs=4, min_steps=60, batch_size=32
)


def needle(count: int, seed: int, padded: bool = False) -> LabelledFeatures:
    """Six tokens of noise; one of them, at any place, has the class, and a mark that it has."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    values = random.normal(0, 1, (count, 6, 8))
    place = random.integers(0, 3 if padded else 6, count)
    values[np.arange(count), place] = 0
    values[np.arange(count), place, labels] = 4
    values[np.arange(count), place, 7] = 6
    mask = None
    if padded:  # by tokens that say another class
        mask = np.tile(np.arange(6) < 3, (count, 1))
        values[:, 3:] = 0
        values[np.arange(count), 3:, (labels + 1) % 3] = 4
        values[:, 3:, 7] = 6
    return LabelledFeatures(Features(values.astype(np.float16), mask), labels)


class TestAttentive:
    @pytest.mark.parametrize("padded", [False, True])
    def test_finds_the_token_that_has_the_class(self, padded: bool) -> None:
        train, test = needle(150, 0, padded), needle(200, 1, padded)
        outcome = probe_fast(train, test, 3, ATTENTIVE, (0, 1), heads=2)
        assert outcome.correct.shape == (2, 200)
        assert outcome.correct.mean() > 0.9
        for chosen in outcome.chosen:
            assert chosen["learning_rate"] == 1e-2, "the other one learns nothing"
            assert chosen["held_out_accuracy"] > 0.9

    def test_the_seed_makes_the_head(self) -> None:
        train, test = needle(60, 0), needle(150, 1)
        settings = replace(ATTENTIVE, learning_rates=(3e-3,), min_steps=15, epochs=1)
        state = torch.random.get_rng_state()
        outcome = probe_fast(train, test, 3, settings, (0, 1, 0), heads=2)
        np.testing.assert_array_equal(outcome.correct[0], outcome.correct[2])
        assert not np.array_equal(outcome.correct[0], outcome.correct[1])
        assert outcome.chosen[0] == outcome.chosen[2]
        assert torch.equal(torch.random.get_rng_state(), state), "nobody else's numbers"

    def test_equals_a_loop_by_hand(self) -> None:
        """AdamW with cosine to 0; biases and norms do not decay; padding is not attended."""
        train = needle(50, 0, padded=True)
        settings = replace(ATTENTIVE, epochs=5, min_steps=0, batch_size=20)
        point = {"learning_rate": 3e-3, "weight_decay": 20.0}
        rows = np.arange(2, 47)
        (head,) = _Attentive(train, 3, settings, 2).fit(rows, [point], seed=4)
        torch.manual_seed(4)
        expected = AttentiveProbe(8, 3, 2)
        tokens = torch.from_numpy(train.features.values).float()
        mask, labels = torch.from_numpy(train.features.mask), torch.from_numpy(train.labels)
        momenta = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in expected.parameters()}
        for step, batch in enumerate(_batches(rows, 20, 15, 4)):
            rate = 3e-3 * (1 + np.cos(np.pi * step / 15)) / 2
            loss = cross_entropy(expected(tokens[batch], mask[batch]), labels[batch])
            gradients = torch.autograd.grad(loss, list(momenta))
            with torch.no_grad():
                for (parameter, (first, second)), g in zip(momenta.items(), gradients, strict=True):
                    parameter *= 1 - rate * 20.0 if parameter.dim() > 1 else 1
                    first.mul_(0.9).add_(0.1 * g)
                    second.mul_(0.999).add_(0.001 * g * g)
                    size = torch.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8
                    parameter -= rate * first / (1 - 0.9 ** (step + 1)) / size
        for trained in (head, expected):  # has no part in the result: its gradient is rounding
            trained.attention.in_proj_bias.data[8:16] = 0
        found, wanted = head.state_dict(), expected.state_dict()
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-4, msg=name)
        assert wanted["norm.weight"].min() > 0.9, "not decayed"
        assert wanted["classifier.weight"].abs().max() < 0.3, "decayed"

    def test_a_candidate_does_not_depend_on_the_others(self) -> None:
        train, test = needle(60, 0), needle(100, 1)
        settings = replace(ATTENTIVE, weight_decays=(0.0, 5.0), min_steps=25, epochs=1)
        (chosen,) = (outcome := probe_fast(train, test, 3, settings, (0,), heads=2)).chosen
        assert set(chosen) == {"learning_rate", "weight_decay", "held_out_accuracy"}
        alone = replace(
            settings,
            learning_rates=(chosen["learning_rate"],),
            weight_decays=(chosen["weight_decay"],),
        )
        again = probe_fast(train, test, 3, alone, (0,), heads=2)
        assert again.chosen == outcome.chosen
        np.testing.assert_array_equal(again.correct, outcome.correct)

    def test_test_labels_have_no_part(self) -> None:
        train, test = needle(60, 0), needle(100, 1)
        settings = replace(ATTENTIVE, min_steps=20, epochs=1)
        first, second = (
            probe_fast(train, data, 3, settings, (0,), heads=2) for data in (test, shuffled(test))
        )
        assert first.chosen == second.chosen
        same_label = test.labels == shuffled(test).labels
        np.testing.assert_array_equal(first.correct[:, same_label], second.correct[:, same_label])

    def test_many_images_are_judged_in_parts(self) -> None:
        train, test = needle(60, 0), needle(1500, 1)
        settings = replace(ATTENTIVE, min_steps=20, epochs=1)
        whole = probe_fast(train, test, 3, settings, (0,), heads=2)
        part = LabelledFeatures(Features(test.features.values[1000:1100]), test.labels[1000:1100])
        some = probe_fast(train, part, 3, settings, (0,), heads=2)
        np.testing.assert_array_equal(whole.correct[:, 1000:1100], some.correct)

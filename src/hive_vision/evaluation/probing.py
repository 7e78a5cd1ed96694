"""Probes on features that were computed once: protocol ``fast``, and nearest neighbours.

Shapes: M images, N tokens of one image, D encoder width, C classes, S seeds.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hive_vision.evaluation.arguments import FastProtocol
from hive_vision.evaluation.features import Features
from hive_vision.models.probes import AttentiveProbe

PREDICTION_BATCH = 1024
SMALL_PRODUCT = 2**28  # multiplications


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a probe found.

    Attributes:
        correct: (S, M) which test images each seed's head classified correctly.
        seeds: One of each row; empty where nothing is random.
        chosen: For each seed what was chosen on the held-out training images, and with what
            accuracy on them; of a linear head also the solver's iterations (at the limit it
            stopped short of the optimum).
    """

    correct: NDArray[np.bool_]
    seeds: tuple[int, ...] = ()
    chosen: tuple[dict[str, float], ...] = field(default=())


@dataclass(frozen=True, eq=False)
class LabelledFeatures:
    """Features of M images and their classes (M,)."""

    features: Features
    labels: NDArray[np.int64]


def probe_neighbours(train: LabelledFeatures, test: LabelledFeatures, neighbours: int) -> Outcome:
    """Classify by the nearest training images, by cosine similarity of (M, D) features.

    Raises:
        ValueError: If there are fewer training images than neighbours.
    """
    if not 1 <= neighbours <= len(train.labels):
        raise ValueError(
            f"neighbours is {neighbours}; there are {len(train.labels)} training images"
        )
    classifier = KNeighborsClassifier(neighbours, metric="cosine")
    classifier.fit(train.features.values, train.labels)
    return Outcome((classifier.predict(test.features.values) == test.labels)[None])


def probe_fast(
    train: LabelledFeatures,
    test: LabelledFeatures,
    classes: int,
    settings: FastProtocol,
    seeds: Sequence[int],
    heads: int | None = None,
) -> Outcome:
    """Train a head for each seed, its hyper-parameters chosen on training images.

    Args:
        train: Features (M, D) for a linear head, (M, N, D) for an attentive one.
        test: The same of the test images.
        classes: C.
        settings: The protocol's numbers.
        seeds: S of them.
        heads: Attention heads of an attentive head.
    """
    head: _Linear | _Attentive = _Linear(train, settings)
    if train.features.values.ndim == 3:
        assert heads is not None
        head = _Attentive(train, classes, settings, heads)
    correct, chosen = [], []
    for seed in seeds:
        fitted, held_out = _hold_out(train.labels, settings.holdout, seed)
        accuracies = [
            float((head.predict(candidate, train, held_out) == train.labels[held_out]).mean())
            for candidate in head.fit(fitted, head.grid, seed)
        ]
        best = int(np.argmax(accuracies))
        trained, facts = head.fit_all(head.grid[best], seed)
        correct.append(head.predict(trained, test, np.arange(len(test.labels))) == test.labels)
        chosen.append({**head.grid[best], "held_out_accuracy": accuracies[best], **facts})
    return Outcome(np.stack(correct), tuple(seeds), tuple(chosen))


def _hold_out(
    labels: NDArray[np.int64], share: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split training rows; each class in its proportion, where every class has two images.

    Raises:
        ValueError: If too few are left to learn from.
    """
    counts = np.bincount(labels)
    enough = counts[counts > 0].min() > 1 and round(share * len(labels)) >= np.count_nonzero(counts)
    first, second = train_test_split(
        np.arange(len(labels)),
        test_size=share,
        random_state=seed,
        stratify=labels if enough else None,
    )
    if len(np.unique(labels[first])) < 2:
        raise ValueError(
            f"{len(labels)} training images are too few: without the {len(second)} that choices "
            "are made on, one class is left; give more images, or probe=knn"
        )
    return np.sort(first), np.sort(second)


@dataclass(frozen=True, eq=False)
class _Linear:
    """Logistic regression on standardised features."""

    train: LabelledFeatures
    settings: FastProtocol
    solved: dict[float, Any] = field(default_factory=dict)

    @property
    def grid(self) -> list[dict[str, float]]:
        """What to choose from."""
        return [{"inverse_penalty": c} for c in self.settings.inverse_penalties]

    def fit_all(self, point: dict[str, float], seed: int) -> tuple[Any, dict[str, float]]:
        """Solve on all rows, once for all seeds; say in how many steps of the solver."""
        c = point["inverse_penalty"]
        if c not in self.solved:
            (self.solved[c],) = self.fit(np.arange(len(self.train.labels)), [point], seed)
        return self.solved[c], {"iterations": int(self.solved[c][-1].n_iter_.max())}

    def fit(
        self, rows: NDArray[np.int64], grid: Sequence[dict[str, float]], seed: int
    ) -> list[Any]:
        """Solve one head for each point of the grid; the seed has no part in an optimum."""
        values, labels = self.train.features.values[rows], self.train.labels[rows]
        heads: list[Any] = []
        # Threads that wait for each other at every small product cost 17 times what they save.
        small = values.size * len(np.unique(labels)) < SMALL_PRODUCT
        for point in grid:
            solver = LogisticRegression(
                C=point["inverse_penalty"], max_iter=self.settings.max_iterations
            )
            with warnings.catch_warnings(), threadpool_limits(1 if small else None):
                # Where C is large, the loss's last digits take thousands of steps.
                warnings.simplefilter("ignore", ConvergenceWarning)
                heads.append(make_pipeline(StandardScaler(), solver).fit(values, labels))
        return heads

    def predict(
        self, head: Any, data: LabelledFeatures, rows: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Give the most likely class of some images."""
        predicted: NDArray[np.int64] = head.predict(data.features.values[rows])
        return predicted


@dataclass(frozen=True, eq=False)
class _Attentive:
    """An attentive probe on all tokens."""

    train: LabelledFeatures
    classes: int
    settings: FastProtocol
    heads: int
    device: torch.device = field(
        default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )

    @property
    def grid(self) -> list[dict[str, float]]:
        """What to choose from."""
        rates, decays = self.settings.learning_rates, self.settings.weight_decays
        return [{"learning_rate": rate, "weight_decay": d} for rate, d in product(rates, decays)]

    def fit_all(self, point: dict[str, float], seed: int) -> tuple[Any, dict[str, float]]:
        """Train on all rows."""
        (head,) = self.fit(np.arange(len(self.train.labels)), [point], seed)
        return head, {}

    def fit(
        self, rows: NDArray[np.int64], grid: Sequence[dict[str, float]], seed: int
    ) -> list[nn.Module]:
        """Train one head for each point of the grid, all on the same batches."""
        heads: list[nn.Module] = []
        groups: list[dict[str, Any]] = []
        width = self.train.features.values.shape[-1]
        for point in grid:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                heads.append(AttentiveProbe(width, self.classes, self.heads).to(self.device))
            for decays in (True, False):
                parameters = [p for p in heads[-1].parameters() if (p.dim() > 1) == decays]
                decay = point["weight_decay"] if decays else 0.0
                rate = point["learning_rate"]
                groups.append({"params": parameters, "lr": rate, "weight_decay": decay})
        size = self.settings.batch_size
        steps = max(self.settings.min_steps, self.settings.epochs * -(-len(rows) // size))
        optimizer = torch.optim.AdamW(groups, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for batch in _batches(rows, size, steps, seed):
            values, mask = self._take(self.train, batch)
            labels = torch.from_numpy(self.train.labels[batch]).to(self.device)
            loss = torch.stack([cross_entropy(head(values, mask), labels) for head in heads]).sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        return heads

    @torch.no_grad()
    def predict(
        self, head: nn.Module, data: LabelledFeatures, rows: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Give the most likely class of some images."""
        batches = np.array_split(rows, -(-len(rows) // PREDICTION_BATCH))
        logits = (head(*self._take(data, batch)) for batch in batches)
        return np.concatenate([scores.argmax(dim=1).cpu().numpy() for scores in logits])

    def _take(
        self, data: LabelledFeatures, rows: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor | None]:
        values = torch.from_numpy(data.features.values[rows]).to(self.device).float()
        mask = data.features.mask
        return values, None if mask is None else torch.from_numpy(mask[rows]).to(self.device)


def _batches(
    rows: NDArray[np.int64], size: int, steps: int, seed: int
) -> Iterator[NDArray[np.int64]]:
    """Give that many batches of rows, every epoch in another order."""
    random = np.random.default_rng(seed)
    while True:
        order = random.permutation(rows)
        for start in range(0, len(order), size):
            if steps == 0:
                return
            steps -= 1
            yield np.sort(order[start : start + size])  # sorted: one pass over the disk

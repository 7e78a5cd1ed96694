"""Recipes on tiny models, as the tests of training have them."""

from tests.training.conftest import recipe

__all__ = ["recipe"]

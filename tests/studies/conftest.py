"""Recipes on tiny models, as the tests of training have them."""

from tests.training.conftest import recipe, vlm_recipe

__all__ = ["recipe", "vlm_recipe"]

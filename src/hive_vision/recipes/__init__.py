"""Recipes: one commented YAML file for each experiment."""

"""Recipes of hive-vision finetune."""

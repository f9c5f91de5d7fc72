"""Recipes: what a batch is attacked with, how a model learns from it, how an expert and how the mixture is trained."""

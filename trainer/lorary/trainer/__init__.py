"""Train adapters: recipe, data, method, loop, evaluation, output folder.

Importing this package loads no torch; training does.
"""

from lorary.trainer.recipe import Recipe
from lorary.trainer.recipe_file import load_recipe

__all__ = ["Recipe", "load_recipe"]

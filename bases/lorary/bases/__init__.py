"""Base models: found by name, folder or Hub id, converted once, loaded whole or quantized.

Importing this package loads no torch; ``lorary.bases.load`` does, when called.
"""

from lorary.bases.assets import fetch_assets, find_asset
from lorary.bases.find import Base, find_base
from lorary.bases.prompts import PromptBuilder

__all__ = ["Base", "PromptBuilder", "fetch_assets", "find_asset", "find_base"]

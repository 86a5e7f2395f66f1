"""Versions under traffic: aliases that move, canaries, shadows, gates, and who is told."""

"""Train a version again from its own manifest, and say how far the result is from what it was."""

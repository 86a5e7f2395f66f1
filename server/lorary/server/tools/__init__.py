"""Functions that a model may ask its caller to call: checked, told to it, asked of it, read from its answer."""

"""Search for the best recipe: trials over a space of its keys, judged by validation loss alone."""

"""One recipe, several tasks: one adapter for all of them, or one for each, and what each forgets of the others."""

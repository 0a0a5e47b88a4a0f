"""Records of a run: the training journal, its way to MLflow, and the provenance of every file."""

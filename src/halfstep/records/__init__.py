"""Records of a run: the journal of a training, its way into MLflow, provenance of every output."""

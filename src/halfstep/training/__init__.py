"""Training: the loop, optimiser, moving average, state that survives an interruption."""

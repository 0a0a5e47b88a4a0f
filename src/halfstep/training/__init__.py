"""Training: the loop, one step, the state that survives an interruption, optimizer and average."""

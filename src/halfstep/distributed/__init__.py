"""Several processes for one job: the launcher, the group of ranks, the device of each rank."""

"""Several processes for one job: the launcher, the process group, the device of each process."""

"""Plain Python behind the Snakemake rules: targets, machines, messages, the Slurm plugin."""

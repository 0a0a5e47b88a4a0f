#!/usr/bin/env bash
# Snakemake runs this once, inside a conda environment it has just made (--sdm conda), from the repository's root.
pip install --no-deps -e .

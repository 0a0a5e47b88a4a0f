#!/usr/bin/env bash
# Snakemake runs this once in each conda environment that it makes (--sdm conda), at the root of the
# repository.
pip install --no-deps -e .

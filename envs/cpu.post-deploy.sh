#!/usr/bin/env bash
# Snakemake runs this once in each conda environment that it makes (--sdm conda). rules/common.smk
# sets the variable: the halfstep that runs Snakemake, as `pip install` takes it.
pip install --no-deps "${HALFSTEP_SOURCE:?is not set; call snakemake or halfstep run}"

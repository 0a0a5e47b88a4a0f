"""Masked diffusion: schedule, masking, objective, samplers. Torch only; written against a Denoiser."""

"""Masked diffusion: schedules, masking, objective, samplers; written against a Denoiser."""

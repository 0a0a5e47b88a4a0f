"""Networks: the paper's DiT, its autoregressive peer, and the Denoiser that mathematics is written against."""

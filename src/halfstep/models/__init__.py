"""Networks: the DiT of the paper, the autoregressive baseline, and denoisers made of them."""

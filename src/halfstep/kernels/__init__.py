"""Arithmetic below the networks: matrix products, chunked logits, categorical draws."""

"""Measures of texts and models: perplexity, diversity, MAUVE and last words, with intervals."""

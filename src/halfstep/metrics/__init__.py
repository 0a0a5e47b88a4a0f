"""Measures of texts and of models: perplexity under a judge, diversity, last words; every number with its interval and protocol."""

"""The protocols of each metric, with the version of each protocol's definition.

A number means nothing without its protocol: rows of two protocols, or of two versions of one, never
share a column. The version of a protocol goes up when the same model and the same seed would give
another number.

Definitions: perplexity.py (ids, retokenized), lambada.py (parallel, confidence, elbo-exact,
elbo-mc, ar), tasks.py (elbo, elbo-per-token, ar), answers.py (written), `window_nll` of elbo.py
(elbo and ar of zero_shot_perplexity), diversity.py (unigram, bigrams, fourgrams), mauve.py and
commands/continuations.py (continuations), commands/variety.py (groups-of-5, windows),
commands/benchmark.py (interleaved), infilling.py (exact, grammar and tokens of its two metrics).
`grammar` is `judge_window` of data/stories.py, a share of the whole stories in the texts; its
num_samples counts those stories, or the accepted ones for distinct_stories and fact_divergence, or
the sentences of those stories for sentence_share.
`responses` is `empty_rows` of commands/evaluate.py.
The metrics of frontier.py are read off perplexities, and have the protocols of those.
"""

PROTOCOLS: dict[str, dict[str, int]] = {  # metric: {protocol: version}
    "generative_perplexity": {"ids": 1, "retokenized": 1},
    "entropy": {"unigram": 1},
    "distinct_2": {"bigrams": 1},
    "repetition": {"fourgrams": 1},
    "sample_self_bleu": {"groups-of-5": 1},
    "sample_mauve": {"windows": 1},
    "sentence_share": {"grammar": 1},
    "accepted_share": {"grammar": 1},
    "consistent_share": {"grammar": 1},
    "frontier_perplexity": {"ids": 1, "retokenized": 1},
    "frontier_entropy": {"unigram": 1},
    "perplexity_at_data_entropy": {"ids": 1, "retokenized": 1},
    "perplexity_ratio_at_equal_entropy": {"ids": 1, "retokenized": 1},
    "distinct_stories": {"grammar": 1},
    "fact_divergence": {"grammar": 1},
    "only_end_of_text": {"responses": 1},
    "lambada_accuracy": {"parallel": 1, "confidence": 1, "ar": 1},
    "lambada_perplexity": {"elbo-exact": 1, "elbo-mc": 1, "ar": 1},
    "infilling_accuracy": {"exact": 1, "grammar": 1, "tokens": 1},
    "accuracy_under_parallelism": {"exact": 1, "grammar": 1, "tokens": 1},
    "task_score": {"elbo": 1, "elbo-per-token": 1, "ar": 1, "written": 1},
    "zero_shot_perplexity": {"elbo": 1, "ar": 1},
    "self_bleu": {"continuations": 1},
    "mauve": {"continuations": 1},
    "continuation_perplexity": {"continuations": 1},
    "continuation_distinct_2": {"continuations": 1},
    "latency_s": {"interleaved": 3},
}

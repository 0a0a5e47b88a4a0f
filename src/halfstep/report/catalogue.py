"""The catalogue: one row for each table and figure, read by rules, commands, report and tests.

To add a figure, write a function in figures.py and a row in FIGURES. To add a table, write a
function in tables.py, another in markdown.py, and a row in TABLES. A test fails until functions and
rows agree.

Snakemake imports this module at every start, so it imports nothing heavy. Functions are named as
"module:function"; `pkgutil.resolve_name` imports them when they are called.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from halfstep.config import Config

JOURNALS = "journals"  # the one need of a figure that is not a table


@dataclass(frozen=True)
class Table:
    """A table that `halfstep tabulate` writes as CSV and Markdown.

    Attributes:
        title: what the table holds, for `halfstep tabulate --help`
        caption: the text of the table in the Snakemake report
        metrics: the metrics in the table and their titles, in the order of its Markdown
        inputs: files of metric rows. {model} and {teacher} stand for every one; {sampled},
            {continued}, {swept} and {examined} for every model that is sampled, that continues
            prompts, that is on the frontier, or that answers tasks; {varied} for every model and
            variant of its samples, {varied_frontier} for those on the frontier; {infilled} for
            every denoiser and variant that fills in positions; {timed} for every job that times
        select: "module:function", from all metric rows to the rows of this table
        markdown: "module:function", from the rows of this table to its Markdown
        section: the section or key of config.yaml without which the table does not exist, if any
    """

    title: str
    caption: str
    metrics: Mapping[str, str]
    inputs: tuple[str, ...]
    select: str
    markdown: str
    section: str | None = None


@dataclass(frozen=True)
class Figure:
    """A figure that `halfstep plot` draws as PDF and SVG, with its points as CSV.

    Attributes:
        title: what the figure shows, for `halfstep plot --help`
        caption: the text of the figure in the Snakemake report
        needs: the tables that the figure is drawn from, by name, or JOURNALS. The figure exists
            where these tables exist
        draw: "module:function", from {name: DataFrame} of the needs to (Figure, points)
        published: whether published values can be drawn under ours
        baseline: whether it exists only where a teacher has a baseline
        only_in_paper: whether only an item of the paper shows it (paper.py)
        section: the key of config.yaml without which the figure does not exist, if any
    """

    title: str
    caption: str
    needs: tuple[str, ...]
    draw: str
    published: bool = False
    baseline: bool = False
    only_in_paper: bool = False
    section: str | None = None


TABLES: dict[str, Table] = {
    "steps": Table(
        title="quality of samples: every model at every step count, naive samplers, held-out text",
        caption="Quality of samples: one row per metric, model and step count, with 95% intervals "
        "in the columns ``low`` and ``high``. Held-out text and naive samplers (without a network: "
        "random tokens, random token pairs, shuffled sentences) are measured in the same way.",
        metrics={
            "generative_perplexity": "Generative perplexity, lower is better",
            "entropy": "Unigram entropy of a sample in nats, and its difference from held-out text",
            "sentence_share": "Share of sentences of the right form",
            "consistent_share": "Share of consistent stories",
            "accepted_share": "Share of stories that the grammar accepts",
            "distinct_stories": "Share of different stories among 20 accepted ones, higher is more "
            "varied",
            "fact_divergence": "Divergence of the facts in accepted stories from the grammar's law "
            "in nats, 0 is the law",
            "sample_mauve": "MAUVE against windows of the corpus, higher is better",
            "sample_self_bleu": "Self-BLEU between five samples, 0 to 100: low is varied",
            "distinct_2": "Share of distinct bigrams in a sample",
            "repetition": "Share of a sample's 4-grams that occurred before in it",
            "only_end_of_text": "Share of responses that are only end-of-text, 0 is best",
        },
        inputs=(
            "results/metrics/{sampled}/samples.json",
            "results/metrics/{teacher}/naive/samples.json",
            "results/metrics/{teacher}/data.json",
        ),
        select="halfstep.report.tables:select_steps",
        markdown="halfstep.report.markdown:steps_markdown",
    ),
    "temperatures": Table(
        title="the generative frontier: perplexity at equal entropy, over temperatures",
        caption="The generative frontier: perplexity and entropy of every model at each step count "
        "and temperature, and perplexities at equal entropy, log-linear between temperatures. A "
        "curve is not extrapolated: the column ``reached`` says where it has no such entropy.",
        metrics={
            "frontier_perplexity": "Generative perplexity at each temperature",
            "frontier_entropy": "Unigram entropy of a sample in nats at each temperature",
            "perplexity_at_data_entropy": "Perplexity at the entropy of held-out text",
            "perplexity_ratio_at_equal_entropy": "A student's perplexity divided by its teacher's "
            "at equal entropy and steps: below 1 the student is better",
        },
        inputs=("results/metrics/{swept}/frontier.json",),
        select="halfstep.report.tables:select_temperatures",
        markdown="halfstep.report.markdown:temperatures_markdown",
        section="sampling.temperatures",
    ),
    "variants": Table(
        title="quality of samples that are drawn in several ways",
        caption="The same models, drawn in several ways (column ``variant``): with the options of "
        "``sampling`` (default), and with those of each variant. 95% intervals are in the columns "
        "``low`` and ``high``. Perplexities at the entropy of held-out text are read off the curve "
        "over temperatures; the column ``reached`` says where it has no such entropy.",
        metrics={
            "generative_perplexity": "Generative perplexity, lower is better",
            "entropy": "Unigram entropy of a sample in nats",
            "perplexity_at_data_entropy": "Perplexity at the entropy of held-out text",
            "sample_mauve": "MAUVE against windows of the corpus, higher is better",
            "accepted_share": "Share of stories that the grammar accepts",
        },
        inputs=(
            "results/metrics/{varied}/samples.json",
            "results/metrics/{varied_frontier}/frontier.json",
            "results/metrics/{sampled}/samples.json",
            "results/metrics/{swept}/frontier.json",
            "results/metrics/{teacher}/data.json",
        ),
        select="halfstep.report.tables:select_variants",
        markdown="halfstep.report.markdown:variants_markdown",
        section="sampling.variants",
    ),
    "lambada": Table(
        title="last words (LAMBADA): accuracy and perplexity of every model",
        caption="Last words (LAMBADA): one row per model, metric and protocol, with 95% intervals "
        "in the columns ``low`` and ``high``.",
        metrics={"lambada_accuracy": "accuracy", "lambada_perplexity": "perplexity"},
        inputs=("results/metrics/{last_words}/lambada.json",),
        select="halfstep.report.tables:select_lambada",
        markdown="halfstep.report.markdown:lambada_markdown",
        section="evaluation.lambada",
    ),
    "infilling": Table(
        title="filled-in positions: accuracy at each number of tokens per forward, and its area",
        caption="Masked positions that denoisers fill in: one row per model, way to draw (column "
        "``variant``), task and limit of steps, with 95% intervals over windows in the columns "
        "``low`` and ``high``. Right is a last word of which all tokens are the original ones "
        "(exact), a story that the grammar finds consistent after filling in all mentions of one "
        "of its facts (grammar), or a single token that is the original one (tokens). The area is "
        "the mean accuracy over doublings of the tokens per forward, from one to all at once.",
        metrics={
            "infilling_accuracy": "Accuracy",
            "accuracy_under_parallelism": "Mean accuracy over doublings of the tokens per forward",
        },
        inputs=("results/metrics/{infilled}/infilling.json",),
        select="halfstep.report.tables:select_infilling",
        markdown="halfstep.report.markdown:infilling_markdown",
        section="evaluation.infilling_items",
    ),
    "tasks": Table(
        title="tasks of lm-eval, such as ARC and HellaSwag: accuracy of every model",
        caption="Tasks of lm-eval: one row per model, task, measure and protocol, with 95% "
        "intervals in the columns ``low`` and ``high``. A denoiser chooses the answer with the "
        "largest ELBO of the whole text (elbo), or the largest per token (elbo-per-token), or "
        "writes it in a number of steps (written), where the task wants that.",
        metrics={"task_score": "score"},
        inputs=("results/metrics/{examined}/tasks.json",),
        select="halfstep.report.tables:select_tasks",
        markdown="halfstep.report.markdown:tasks_markdown",
        section="evaluation.tasks",
    ),
    "zero_shot": Table(
        title="zero-shot perplexity per token of texts that no model was trained on",
        caption="Zero-shot perplexity: one row per model and text, with 95% intervals over windows "
        "in the columns ``low`` and ``high``. A denoiser's is an upper bound (protocol elbo).",
        metrics={"zero_shot_perplexity": "perplexity per token, lower is better"},
        inputs=("results/metrics/{examined}/zero_shot.json",),
        select="halfstep.report.tables:select_zero_shot",
        markdown="halfstep.report.markdown:zero_shot_markdown",
        section="evaluation.perplexity",
    ),
    "speed": Table(
        title="time to write: students at every step count, and autoregressive baselines",
        caption="Time to write: one row per model, step count, length and batch size. Rows with a "
        "``variant`` are of another way to draw, and of the baselines that took turns with it. The "
        "value is the median in seconds; the column ``bounds`` says what ``low`` and ``high`` are: "
        "quartiles, or with fewer than eight runs the shortest and the longest run.",
        metrics={"latency_s": "seconds to write"},
        inputs=("results/benchmarks/{timed}.json",),
        select="halfstep.report.tables:select_speed",
        markdown="halfstep.report.markdown:speed_markdown",
    ),
    "continuations": Table(
        title="continuations of held-out prompts: MAUVE, self-BLEU, perplexity, distinct bigrams",
        caption="Continuations of held-out prompts: one row per metric, model and step count, "
        "with 95% intervals in the columns ``low`` and ``high``.",
        metrics={
            "mauve": "MAUVE against the documents' own continuations, higher is better",
            "self_bleu": "Self-BLEU within a prompt, 0 to 100: low is diverse",
            "continuation_perplexity": "Perplexity of the continuations, given their prompts",
            "continuation_distinct_2": "Share of distinct bigrams among a prompt's continuations",
        },
        inputs=("results/metrics/{continued}/continuations.json",),
        select="halfstep.report.tables:select_continuations",
        markdown="halfstep.report.markdown:continuations_markdown",
        section="continuations",
    ),
}

FIGURES: dict[str, Figure] = {
    "ppl_vs_steps": Figure(
        title="generative perplexity against sampling steps",
        caption="Generative perplexity against sampling steps: the teacher and every round as "
        "curves, a ring at the steps that a round was trained for. Held-out text, naive samplers "
        "and the autoregressive baseline, if there is one, stand at the right edge, with an arrow "
        "where they are outside of the axis. Lower is better only where the entropy stays near "
        "that of held-out text.",
        needs=("steps",),
        draw="halfstep.report.figures:ppl_vs_steps",
        published=True,
    ),
    "entropy_vs_steps": Figure(
        title="unigram entropy against sampling steps",
        caption="Unigram entropy of the same samples, in nats. The gray band is 5% around "
        "held-out text; a model well below it repeats itself.",
        needs=("steps",),
        draw="halfstep.report.figures:entropy_vs_steps",
        published=True,
    ),
    "ppl_by_variant": Figure(
        title="generative perplexity against sampling steps, for several ways to draw",
        caption="Generative perplexity against sampling steps: a panel for each way to draw "
        "samples, the options of ``sampling`` (default) and each variant. Compare the entropy in "
        "the table ``variants``: noise of low precision lowers both.",
        needs=("variants",),
        draw="halfstep.report.figures:ppl_by_variant",
    ),
    "decoders": Figure(
        title="generative perplexity against network evaluations per text, for several ways to "
        "draw",
        caption="Generative perplexity against network evaluations per text: a line for each way "
        "to draw, in a panel for the teacher and for each last round. Passes of an autoregressive "
        "model that a sampler asks are not counted: the table ``variants`` has them. H is the "
        "entropy, where it differs by more than 2% from that of the default draws. Where there is "
        "a frontier, further panels have the perplexity at the entropy of held-out text: "
        "it shows what remains of a gain at equal entropy.",
        needs=("variants",),
        draw="halfstep.report.speed_figures:decoders",
    ),
    "frontier": Figure(
        title="generative perplexity against entropy over temperatures",
        caption="The generative frontier: perplexity against entropy, a curve over temperatures "
        "for each model. Lower is better at equal entropy. The dotted line is the entropy of "
        "held-out text; references outside of the axes are named at the edge, with an arrow.",
        needs=("temperatures", "steps"),
        draw="halfstep.report.figures:frontier",
    ),
    "ppl_vs_latency": Figure(
        title="generative perplexity against the time to write",
        caption="Generative perplexity against the time to write texts as long as the samples, on "
        "the machine that made this report.",
        needs=("steps", "speed"),
        draw="halfstep.report.speed_figures:ppl_vs_latency",
    ),
    "lambada_vs_round": Figure(
        title="last-word accuracy and perplexity (LAMBADA) against the round",
        caption="Accuracy and perplexity of last words (LAMBADA), from the teacher (round 0) to "
        "the last round.",
        needs=("lambada",),
        draw="halfstep.report.figures:lambada_vs_round",
        published=True,
    ),
    "task_accuracy_vs_steps": Figure(
        title="accuracy of answers that models write against sampling steps",
        caption="Accuracy of written answers to tasks of lm-eval against sampling steps: the "
        "teacher and the last round of each run as curves, the autoregressive baseline, if there "
        "is one, as a line.",
        needs=("tasks",),
        draw="halfstep.report.figures:task_accuracy_vs_steps",
        section="evaluation.task_steps",
    ),
    "accuracy_vs_parallelism": Figure(
        title="accuracy of filled-in positions against tokens per forward",
        caption="Accuracy of filled-in positions against tokens per forward, as counted: windows "
        "of last words, and held-out windows of the corpus. Tokens that are drawn in one pass do "
        "not see one another, so items with several masked tokens suffer where many are.",
        needs=("infilling",),
        draw="halfstep.report.speed_figures:accuracy_vs_parallelism",
    ),
    "latency_vs_length": Figure(
        title="time to write against the number of tokens",
        caption="Time to write against the number of tokens: students at each step count, and "
        "autoregressive baselines with a KV cache. Medians, with quartiles of at least ten runs.",
        needs=("speed",),
        draw="halfstep.report.speed_figures:latency_vs_length",
        published=True,
    ),
    "speedup_vs_batch": Figure(
        title="speed-up over the fastest baseline against the batch size",
        caption="How many times faster than the fastest autoregressive baseline, against the "
        "batch size. In the gray area the baseline is faster.",
        needs=("speed",),
        draw="halfstep.report.speed_figures:speedup_vs_batch",
        baseline=True,
    ),
    "loss_curves": Figure(
        title="training loss and held-out loss of every training",
        caption="Training loss and held-out loss of every model that is trained here: a running "
        "mean, and thin lines as logged. Of rounds the training loss is the divergence from the "
        "teacher.",
        needs=(JOURNALS,),
        draw="halfstep.report.figures:loss_curves",
    ),
    "mauve_vs_steps": Figure(
        title="MAUVE of continuations against sampling steps",
        caption="MAUVE of continuations of held-out prompts against sampling steps: the teacher "
        "and its rounds as curves, the autoregressive baseline, if there is one, as a line. 1 "
        "means that the texts cannot be told apart from the documents' own continuations.",
        needs=("continuations",),
        draw="halfstep.report.figures:mauve_vs_steps",
    ),
    "mauve_by_round": Figure(
        title="MAUVE of continuations against sampling steps, by round",
        caption="MAUVE of continuations of held-out prompts against sampling steps: a panel for "
        "each round, a curve for each run.",
        needs=("continuations",),
        draw="halfstep.report.paper_figures:mauve_by_round",
        only_in_paper=True,
    ),
    "continuation_ppl_vs_steps": Figure(
        title="perplexity of continuations against sampling steps",
        caption="Perplexity of continuations of held-out prompts, prompts not counted, against "
        "sampling steps.",
        needs=("continuations",),
        draw="halfstep.report.paper_figures:continuation_ppl_vs_steps",
        only_in_paper=True,
    ),
    "quality_vs_self_bleu": Figure(
        title="perplexity of continuations against their self-BLEU",
        caption="Perplexity of continuations against their self-BLEU, which is low where they "
        "are diverse: a curve over step counts for each round.",
        needs=("continuations",),
        draw="halfstep.report.paper_figures:quality_vs_self_bleu",
        only_in_paper=True,
    ),
    "ppl_by_size": Figure(
        title="generative perplexity against sampling steps, by network size",
        caption="Generative perplexity against sampling steps: teachers and last rounds of "
        "several network sizes.",
        needs=("steps",),
        draw="halfstep.report.paper_figures:ppl_by_size",
        only_in_paper=True,
    ),
    "lambada_by_size": Figure(
        title="last words (LAMBADA) against the round, by network size",
        caption="Accuracy and perplexity of last words (LAMBADA) against the round, a line for "
        "each network size.",
        needs=("lambada",),
        draw="halfstep.report.paper_figures:lambada_by_size",
        only_in_paper=True,
    ),
}


def table_inputs(config: Config, **names: Iterable[str]) -> dict[str, list[str]]:
    """The metric files of every table that exists under this configuration.

    Args:
        config: the resolved configuration
        names: the values of each placeholder in `Table.inputs`, such as model=["a/teacher"]
    """
    return {
        name: expand_paths(table.inputs, **names)
        for name, table in TABLES.items()
        if table.section is None or attrgetter(table.section)(config)
    }


def figure_inputs(
    config: Config, tables: Iterable[str], models: Sequence[str], trained: Sequence[str]
) -> dict[str, list[str]]:
    """The files that every figure is drawn from, where the tables that it needs are among these.

    `trained` are the models that are trained here; without any, no figure shows journals. Without a
    baseline among the models, the figures that compare with it do not exist. Figures that only the
    paper's items show are not among them.
    """
    compares = any(model.endswith("/baseline") for model in models)
    known = {name: [f"results/tables/{name}.csv"] for name in tables}
    if trained:
        known[JOURNALS] = [f"results/models/{model}/journal.jsonl" for model in trained]
    return {
        name: [file for need in figure.needs for file in known[need]]
        for name, figure in FIGURES.items()
        if known.keys() >= set(figure.needs)
        and (compares or not figure.baseline)
        and not figure.only_in_paper
        and (figure.section is None or attrgetter(figure.section)(config))
    }


def expand_paths(patterns: Iterable[str], **names: Iterable[str]) -> list[str]:
    """Every pattern with every value of its placeholder: a/{model} with model=["b", "c"]."""
    paths = []
    for pattern in patterns:
        (placeholder,) = (name for name in names if f"{{{name}}}" in pattern)
        paths += [pattern.format(**{placeholder: value}) for value in names[placeholder]]
    return paths

"""The figures and tables of the SDTT paper (arXiv 2410.21035, second version) by their numbers.

An item is a figure or a table of the catalogue with the rows that the paper shows. It exists where
the configuration has what it needs; `missing` says what is not there. docs/paper.md says of each
what differs from the paper.

Snakemake imports this module at every start, so it imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from halfstep.report.catalogue import FIGURES, JOURNALS, TABLES

if TYPE_CHECKING:
    from halfstep.config import Config

Where = dict[str, list[str]]
"""Values by column: the rows that an item shows"""
KLD = "kl_backward"  # the paper's main run
TIMES = "latency_vs_length"
ON_HUB = {KLD: "kld"}
"""Names of runs whose students are the released ones, where they differ"""
SCALING = ("small", "medium", "large")  # sizes of the scaling study
TIMED = ("small", "medium", "large", "1.3B", "3B", "8B")  # sizes of figures 20 and 21


@dataclass(frozen=True)
class Item:
    """A figure or a table of the paper.

    Attributes:
        title: what the paper shows there
        shows: a row of catalogue.FIGURES or TABLES
        runs: the runs that it compares, by the names that our presets give them
        sizes: network sizes, each of another teacher; of one teacher if empty
        where: further values by column
        preset: a preset that makes it
    """

    title: str
    shows: str
    runs: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    where: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    preset: str = "sdtt-losses"

    @property
    def is_figure(self) -> bool:
        """Is it drawn, and not written as a table?"""
        return self.shows in FIGURES

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables that it is made from."""
        return FIGURES[self.shows].needs if self.is_figure else (self.shows,)


def _losses(title: str, shows: str, *others: str, **where: tuple[str, ...]) -> Item:
    """KLD and other divergences."""
    return Item(title, shows, (KLD, *others), where=where)


def _ablation(title: str, shows: str, *runs: str) -> Item:
    """KLD and runs with other options."""
    return Item(title, shows, (KLD, *runs), preset="sdtt-ablations")


def _timing(title: str, batch_size: int, size: str) -> Item:
    where = {"batch_size": (str(batch_size),)}
    return Item(title, TIMES, (), (size,), where, "sdtt-small")


ACCURACY, PERPLEXITY = ("lambada_accuracy",), ("lambada_perplexity",)
PARALLEL = ("parallel", "ar")  # of the paper's protocols of accuracy; ar is the baseline's

ITEMS: dict[str, Item] = {
    "figure-1": Item("perplexity against the time to write", "ppl_vs_latency", (KLD,)),
    "figure-2a": _losses(
        "LAMBADA accuracy", "lambada_vs_round", "mse", "tvd", metric=ACCURACY, protocol=PARALLEL
    ),
    "figure-2b": _losses(
        "LAMBADA perplexity", "lambada_vs_round", "mse", "tvd", metric=PERPLEXITY
    ),
    "figure-3b": _timing("time to write, 1.3B", 8, "1.3B"),
    "figure-4a": Item("quality against self-BLEU, KLD", "quality_vs_self_bleu", (KLD,)),
    "figure-4b": Item(
        "perplexity of three sizes", "ppl_by_size", (KLD,), SCALING, preset="sdtt-scaling"
    ),
    "figure-5": _losses("MAUVE, a panel for each round", "mauve_by_round", "mse", "tvd"),
    "figure-6a": _losses("perplexity, KLD and MSE", "ppl_vs_steps", "mse"),
    "figure-6b": _losses("perplexity, KLD and TVD", "ppl_vs_steps", "tvd"),
    "figure-7a": _ablation("MAUVE, rounds of 5,000 steps", "mauve_vs_steps", "steps-5k"),
    "figure-7b": _ablation("MAUVE, rounds of 2,500 steps", "mauve_vs_steps", "steps-2.5k"),
    "figure-8a": _ablation("perplexity, rounds of 5,000 steps", "ppl_vs_steps", "steps-5k"),
    "figure-8b": _ablation("perplexity, rounds of 2,500 steps", "ppl_vs_steps", "steps-2.5k"),
    "figure-9": Item(
        "perplexity with float64 noise and the released one", "ppl_by_variant", (KLD,),
        preset="sdtt-small",
    ),
    "figure-10": _ablation(
        "LAMBADA with shorter rounds", "lambada_vs_round", "steps-5k", "steps-2.5k"
    ),
    "figure-13a": _ablation("perplexity, 4 substeps", "ppl_vs_steps", "substeps-4"),
    "figure-13b": _ablation("perplexity, 8 substeps", "ppl_vs_steps", "substeps-8"),
    "figure-13c": _ablation(
        "LAMBADA, 4 and 8 substeps", "lambada_vs_round", "substeps-4", "substeps-8"
    ),
    "figure-14a": _ablation("perplexity, reset optimizer", "ppl_vs_steps", "reset-optimizer"),
    "figure-14b": _ablation(
        "perplexity, reset optimizer and EMA, EMA as teacher", "ppl_vs_steps",
        "reset-optimizer-ema", "ema-teacher",
    ),
    "figure-15a": _ablation("MAUVE, reset optimizer", "mauve_vs_steps", "reset-optimizer"),
    "figure-15b": _ablation(
        "MAUVE, reset optimizer and EMA, EMA as teacher", "mauve_vs_steps",
        "reset-optimizer-ema", "ema-teacher",
    ),
    "figure-16": Item(
        "MAUVE of the larger sizes", "mauve_vs_steps", (KLD,), SCALING[1:], preset="sdtt-scaling"
    ),
    "figure-17a": Item(
        "LAMBADA accuracy of three sizes", "lambada_by_size", (KLD,), SCALING,
        {"metric": ACCURACY, "protocol": PARALLEL}, "sdtt-scaling",
    ),
    "figure-17b": Item(
        "LAMBADA perplexity of three sizes", "lambada_by_size", (KLD,), SCALING,
        {"metric": PERPLEXITY}, "sdtt-scaling",
    ),
    "figure-18a": _losses("perplexity of continuations, KLD", "continuation_ppl_vs_steps"),
    "figure-18b": Item("perplexity of continuations, MSE", "continuation_ppl_vs_steps", ("mse",)),
    "figure-18c": Item("perplexity of continuations, TVD", "continuation_ppl_vs_steps", ("tvd",)),
    "figure-19a": Item("quality against self-BLEU, MSE", "quality_vs_self_bleu", ("mse",)),
    "figure-19b": Item("quality against self-BLEU, TVD", "quality_vs_self_bleu", ("tvd",)),
    **{f"figure-20{'abcdef'[i]}": _timing(f"time to write, {size}, 8 texts", 8, size)
       for i, size in enumerate(TIMED)},
    **{f"figure-21{'abcdef'[i]}": _timing(f"time to write, {size}, 4 texts", 4, size)
       for i, size in enumerate(TIMED)},
    "figure-22": Item(
        "perplexity against the time to write, 16 to 256 steps", "ppl_vs_latency", (KLD,)
    ),
    "table-1": _losses("accuracy of six tasks", "tasks", "mse", "tvd"),
    "table-mdlm-3": Item("zero-shot perplexity (MDLM's table 3)", "zero_shot", (KLD,)),
}  # fmt: skip


def paper_items(config: Config, tables: Collection[str]) -> dict[str, Where]:
    """The items that this configuration can make, each with the rows that it shows.

    Args:
        config: the resolved configuration
        tables: names of the tables that it makes
    """
    found = {}
    for name, item in ITEMS.items():
        if not missing(item, config, tables):
            teachers = _teachers(item, config)
            where = {column: list(values) for column, values in item.where.items()}
            if item.runs:
                known = config.teachers[teachers[0]].runs
                where["run"] = [_run_name(run, known) for run in item.runs]
            found[name] = {"teacher": teachers, **where}
    return found


def _run_name(run: str, known: Collection[str]) -> str:
    """What a run is called among these: by its own name, or as on the hub."""
    return ON_HUB[run] if run in ON_HUB and run not in known else run


def missing(item: Item, config: Config, tables: Collection[str]) -> str | None:
    """What an item needs and this configuration lacks, and a preset that has it; or None."""
    lacking = None
    for table in item.tables:
        if table not in tables and table != JOURNALS:
            lacking = f"the section {TABLES[table].section}"
    for batch_size in map(int, item.where.get("batch_size", ())):
        if batch_size not in config.benchmark.batch_sizes:
            lacking = f"benchmark.batch_sizes with {batch_size}"
    if lacking is None and len(_teachers(item, config)) < max(len(item.sizes), 1):
        lacking = f"a teacher with the runs {' and '.join(item.runs)}"
        if item.shows == TIMES:
            lacking = f"benchmark.sizes with {item.sizes[0]}"
        elif item.sizes:
            lacking = f"teachers of the sizes {', '.join(item.sizes)}, each with {item.runs[0]}"
    return lacking and f"{lacking}, as in --config preset={item.preset}"


def _teachers(item: Item, config: Config) -> list[str]:
    """The teachers that an item shows, in the column `teacher` of its rows.

    Without sizes it is the first one that has all runs; of each size it is the last one, because
    the scaling study has teachers apart. Timings also know untrained networks.
    """
    able = [
        name
        for name, teacher in config.teachers.items()
        if all(_run_name(run, teacher.runs) in teacher.runs for run in item.runs)
    ]
    if not item.sizes:
        return able[:1]
    of_size = {config.teachers[name].network.size: name for name in able}
    if item.shows == TIMES:
        of_size = {size: f"{size}-untrained" for size in config.benchmark.sizes} | of_size
    return [of_size[size] for size in item.sizes if size in of_size]

"""A toy copy of the paper's graph: `snakemake paper` with tiny networks and inline tasks.

Network sizes are those of the paper only in name tables, so figures of several sizes are not among
its targets here (tests/report/test_paper.py draws them).
"""

import json

from dryrun import copy
from questions import write_generation, write_task
from whole_graph import LITTLE, ONE_ROUND, run_graph, write_models

from halfstep.report.paper import ITEMS

RUNS = {
    "kl_backward": {},
    "mse": {"divergence": "mse"},
    "tvd": {"divergence": "tvd"},
    "steps-5k": {"num_steps": 3},
    "steps-2.5k": {"num_steps": 1, "warmup_steps": 0},
    "substeps-4": {"substeps": 4},
    "substeps-8": {"substeps": 8},
    "reset-optimizer": {"reset_optimizer": True},
    "reset-optimizer-ema": {"reset_optimizer": True, "reset_ema": True},
    "ema-teacher": {"next_teacher": "ema"},
}
QUESTIONS = [
    {"question": "Once there was", "choices": [" a cat", " a farm"], "label": 0},
    {"question": "She was", "choices": [" happy", " sad"], "label": 1},
]


def test_the_papers_targets_and_report_are_made(tmp_path_factory, tmp_path):
    models = write_models(tmp_path_factory.mktemp("models"))
    task = write_task(models, "riddles", QUESTIONS)
    sums = [{"question": f"{i} and {i} is", "answer": str(2 * i)} for i in range(3)]
    written = write_generation(models, "sums", sums)
    text = models / "text.txt"
    text.write_text("Tom the cat had a red ball. He was happy.\n" * 40)
    baseline = {"from": str(models / "gpt2")}
    evaluation = {"judge": "baseline", "lambada_items": 4, "bootstrap": 100}
    evaluation |= {"tasks": [task, written], "task_steps": [2, "own"]}
    evaluation |= {"task_draws": 4, "perplexity": [str(text)], "perplexity_draws": 2}
    config = {
        "preset": "ci",
        "teachers": {"stories-ci": {**ONE_ROUND, "baseline": baseline, "runs": RUNS}},
        "evaluation": evaluation,
        "published": True,
        **LITTLE,
        "sampling": {**LITTLE["sampling"], "variants": {"noise": {"sampler": "ancestral_float32"}}},
        "benchmark": {"lengths": [16, 128], "batch_sizes": [4, 8], "benchmark_steps": [8]},
    }
    results = run_graph(copy(tmp_path), config, "paper")
    of_sizes = {name for name, item in ITEMS.items() if item.sizes}
    made = {file.name.partition(".")[0] for file in (results / "paper").iterdir()}
    assert made == ITEMS.keys() - of_sizes | {"table-2", "report"}
    panels = (results / "paper/figure-9.csv").read_text()
    assert "kl_backward · default" in panels and "kl_backward · noise" in panels
    assert "steps-5k" in (results / "paper/figure-7a.csv").read_text()
    assert "riddles" in (results / "paper/table-1.md").read_text()
    table = (results / "tables/tasks.md").read_text()
    assert "sums: exact_match (protocol written)" in table and "2 (2)" in table
    report = (results / "paper/report.md").read_text()
    assert "not comparable: 169M parameters there, the size tiny here" in report
    claim = next(line for line in report.splitlines() if "better than TVD" in line)
    assert "not measured" not in claim
    written = json.loads((results / "paper/figure-6a.provenance.json").read_text())
    assert any(path.endswith("tables/steps.csv") for path in written["inputs"])

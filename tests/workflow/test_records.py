"""The rules declare every record that the commands write: every path is written in a rule."""

import re
from pathlib import Path

from halfstep.records.provenance import is_record


def test_every_job_has_one_record_under_the_name_that_its_command_writes(workflow, pipeline):
    jobs = re.findall(
        r"^(?:local)?rule (\w+):\n(?: +input: .*\n)?(?: +output: (.*)\n)?",
        workflow.plan("--config", "preset=laptop"),
        re.MULTILINE,
    )
    declared = {rule: set() for rule, _ in jobs}
    for rule, outputs in jobs:
        records = {path for path in outputs.split(", ") if is_record(Path(path))}
        # score_frontier writes the rows of two kinds of tables.
        expected = {"all": 0, "track": 0, "score_frontier": 2}.get(rule, 1)
        assert len(records) == expected, (rule, outputs)
        declared[rule] |= records
    assert len(jobs) > 40 and declared["merge_provenance"] == {"results/provenance.json"}
    written = {
        str(path.relative_to(pipeline.root))
        for path in pipeline.results.rglob("*.json")
        if is_record(path)
    }
    # By hand one set of samples was drawn; the rule draws all of a model, with one record.
    of_rules = {path.replace("/steps-8/", "/") for path in written}
    assert len(written) == 8 and of_rules <= set().union(*declared.values())

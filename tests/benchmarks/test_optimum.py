"""`python benchmarks/optimum.py`: entropies of the best students of a round."""

import subprocess
import sys

from dryrun import REPOSITORY
from small import done


def test_the_entropies_of_the_optima_are_printed(tmp_path):
    """A mean of distributions has at least their mean entropy, because entropy is concave."""
    corpus, teacher = tmp_path / "corpus", tmp_path / "teacher"
    of_corpus = "--kind stories --length 64 --vocab-size 300 --num-documents 300"
    done(f"prepare-corpus --output {corpus} {of_corpus} --validation-documents 100 --workers 1")
    training = "--size 1x16x2 --num-steps 2 --warmup-steps 1 --batch-size 4 --validate-every 2"
    done(f"pretrain --corpus {corpus} --output {teacher} {training}")
    call = [sys.executable, REPOSITORY / "benchmarks/optimum.py", teacher, corpus]
    ran = subprocess.run(call, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    header, *lines = ran.stdout.splitlines()
    rows = [[float(part) for part in line.split("|")] for line in lines]
    assert [row[0] for row in rows] == [1, 4, 16, 32]
    assert header.count("|") == 4
    for _, one_step, targets, mean, geometric in rows:
        assert 0 < targets <= mean + 1e-3
        assert min(one_step, geometric) > 0

"""All commands of a small graph in one process, for graphs whose jobs would mostly start Python."""

import json
import re
import subprocess
import sys
from pathlib import Path

from dryrun import Workflow, clean_environment
from published import save_gpt2
from small import done

ONE_ROUND = {
    "pretraining": {"num_steps": 2, "warmup_steps": 1, "validate_every": 2},
    "distillation": {"num_steps": 2, "rounds": 1, "validate_every": 2},
}
LITTLE = {
    "sampling": {"steps": [8], "num_samples": 8, "temperatures": [0.8, 1.2], "top_p": 0.95},
    "continuations": {"num_prompts": 4, "continuation_rounds": [1]},
    "benchmark": {"baselines": ["halfstep", "transformers"], "lengths": [16, 128]},
}


def write_models(folder: Path) -> Path:
    """Write a corpus like that of preset ci, and two GPT-2 with its tokenizer."""
    corpus = "--kind stories --length 128 --vocab-size 640 --num-documents 400"
    done(f"prepare-corpus --output {folder}/corpus {corpus} --validation-documents 60 --workers 1")
    facts = json.loads((folder / "corpus/manifest.json").read_text())
    for name in ("judge", "gpt2"):
        save_gpt2(folder / name, facts["vocab_size"], 128, folder / "corpus/tokenizer.json")
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "judge/tokenizer_config.json").write_text(json.dumps(about))
    return folder


def run_graph(tree: Workflow, config: dict, target: str, *more: str) -> Path:
    """Run the commands that Snakemake prints for a target, and `more`; the folder of results.

    They run one after another in one process, and all must succeed.
    """
    (tree.folder / "config.yaml").write_text(json.dumps(config))
    printed = tree.plan("-p", "--cores", "1", target).replace("\\\n", " ")
    printed = re.sub(r"\$\{SLURM_JOB_ID:\+.*?\}", "", printed)
    commands = re.findall(r"^ +halfstep (.*?) 2>&1 \| tee ", printed, re.MULTILINE)
    program = """
import shlex, sys
from halfstep.cli import main
for line in sys.stdin.read().splitlines():
    code = main(shlex.split(line))
    if code:
        sys.exit(f"{line}: exit code {code}")
"""
    call, text = [sys.executable, "-c", program], "\n".join([*commands, *more])
    how = {"cwd": tree.folder, "env": clean_environment(), "timeout": 900}
    ran = subprocess.run(call, input=text, text=True, capture_output=True, **how)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return tree.folder / "results"

"""A results folder as the pipeline leaves it, made of formulas: journals, metric rows, timings and samples, for tests and for looking."""

import json
import math
import random
from pathlib import Path

from halfstep.metrics.protocols import PROTOCOLS
from halfstep.records.journal import Journal

STEPS = [8, 16, 32, 64, 128, 256, 512, 1024]
ITEMS = "last_words.jsonl[2000]@66778899aabb"
NO_JUDGE = {"judge": None, "judge_dtype": None}
LOSSES = ("kl_backward", "mse", "tvd")


def write(
    results: Path,
    teacher="stories-tiny",
    runs=LOSSES,
    rounds=7,
    steps=STEPS,
    points=40,
    benchmark=True,
) -> Path:
    """All files of one teacher under `results`."""
    models = [("teacher", 0, "teacher")] + [
        (run, r, f"{run}/round-{r}") for run in runs for r in range(1, rounds + 1)
    ]
    for run, r, name in models:
        sha = train(results / "models" / teacher / name, f"{teacher}/{name}", run, r, points)
        rows = [row for n in steps for row in sampled(teacher, run, r, f"{teacher}/{name}", n, sha)]
        dump(results / "metrics" / teacher / name / "samples.json", rows)
        dump(
            results / "metrics" / teacher / name / "lambada.json",
            last_words(teacher, run, r, f"{teacher}/{name}", sha),
        )
        rows = [
            row
            for n in steps
            for row in continued(
                common(teacher, run, r, f"{teacher}/{name}", n, sha), 0.9 - 0.4 / n + 0.005 * r
            )
        ]
        dump(results / "metrics" / teacher / name / "continuations.json", rows)
        for n in steps:
            text = f"=== 0\nAt {n} steps {name} wrote that Mira found a red kite.\nShe kept it.\n=== 1\nAnother text.\n"
            file = results / "samples" / teacher / name / f"steps-{n}" / "samples.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    sha = train(
        results / "models" / teacher / "baseline", f"{teacher}/baseline", "baseline", 0, points
    )
    base = common(teacher, "baseline", 0, f"{teacher}/baseline", None, sha) | {
        "network_evaluations": 1024,
        "sampler": None,
    }
    dump(
        results / "metrics" / teacher / "baseline" / "samples.json", quality(base, 9.4, 3.91, 0.97)
    )
    dump(results / "metrics" / teacher / "baseline" / "lambada.json", [base | NO_JUDGE | {"data": ITEMS} | one for one in (
        row("lambada_accuracy", "ar", 0.58, 0.02), row("lambada_perplexity", "ar", 4.1, 0.3))])  # fmt: skip
    dump(results / "metrics" / teacher / "baseline" / "continuations.json", continued(base, 0.93))
    data = common(teacher, "data", 0, "data", None, None) | {"sampler": None, "weights": None}
    dump(results / "metrics" / teacher / "data.json", quality(data, 7.2, 3.95, 1.0))
    if benchmark:
        dump(
            results / "benchmarks" / teacher / "latency.json",
            timings(teacher, runs[0] if runs else "teacher", rounds),
        )
    return results


def train(folder: Path, model: str, run: str, r: int, points: int) -> str:
    """A finished training: journal and weights. Returns the first 16 digits of the weights' checksum."""
    noise, scale = (
        random.Random(f"{run}{r}"),
        {"kl_backward": 1.0, "mse": 3.0, "tvd": 0.3}.get(run, 2.5),
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ema.safetensors").write_bytes(f"{model} weights".encode())
    (folder / "meta.json").write_text(
        json.dumps({"student_steps": 1024 // 2**r} if r else {}) + "\n"
    )
    params = {"distillation": {"divergence": run, "lr": 6e-5, "rounds": 7}, "round": r, "seed": 1}
    with Journal(folder, name=model.split("/", 1)[1], node=f"distill-round/{model}", params=params, tags={"rule": "distill_round"},
                 datasets=[{"name": "stories", "digest": "0f" * 32, "source": "results/data/stories"}]) as journal:  # fmt: skip
        for i in range(1, points + 1):
            loss = (
                scale
                * (0.15 + math.exp(-i / points * 4) * (0.5 if r else 4))
                * (1 + 0.08 * noise.gauss(0, 1))
            )
            journal.log(
                {
                    "train/loss": loss,
                    "train/lr": 6e-5 * min(1, i / 5),
                    "train/grad_norm": 0.5 + noise.random(),
                    "train/tokens_per_s": 12e3,
                },
                50 * i,
            )
            if i % 10 == 0:
                journal.log(
                    {
                        "val/nll" if run == "baseline" else "val/nelbo": 1.1
                        + 2.5 * math.exp(-i / points * 4)
                        - 0.01 * r
                    },
                    50 * i,
                )
        journal.artifact(folder / "meta.json")
        journal.close(checkpoint=folder)
    return json.loads((folder / "run.json").read_text())["checkpoint"]["sha256"]["ema"][:16]


def row(metric, protocol, value, spread) -> dict:
    return {
        "metric": metric,
        "protocol": protocol,
        "version": PROTOCOLS[metric][protocol],
        "value": value,
        "low": value - spread,
        "high": value + spread,
    }


def common(teacher, run, r, model, steps, sha) -> dict:
    return {
        "model": model, "teacher": teacher, "run": run, "round": r, "steps": steps, "sampler": "ancestral", "network_evaluations": steps,
        "num_samples": 512, "seed": 1, "weights": "ema", "draw_dtype": "float64",
        "judge": f"results/models/{teacher}/baseline@aabbccddeeff", "judge_dtype": "float32", "data": "stories@001122334455", "checkpoint": sha,
        "commit": "0123456789ab",
    }  # fmt: skip


def quality(base, perplexity, entropy, consistent) -> list[dict]:
    return [base | one for one in (
        row("generative_perplexity", "ids", perplexity, 0.04 * perplexity),
        row("generative_perplexity", "retokenized", 1.1 * perplexity, 0.04 * perplexity), row("entropy", "unigram", entropy, 0.01) | NO_JUDGE,
        row("distinct_2", "bigrams", 0.31, 0.01) | NO_JUDGE, row("consistent_share", "grammar", consistent, 0.02) | NO_JUDGE,
    )]  # fmt: skip


def sampled(teacher, run, r, model, steps, sha) -> list[dict]:
    gain = {"teacher": 0, "kl_backward": 0.24, "mse": 0.17, "tvd": 0.21}.get(run, 0.2) * r
    perplexity = (11 - 0.25 * r) + 139 * (8 / steps) ** 1.25 * math.exp(
        -gain * (1 + 0.1 * math.log2(8 / steps))
    )
    return quality(
        common(teacher, run, r, model, steps, sha),
        perplexity,
        3.97 + 0.09 * (8 / steps) - 0.012 * r,
        min(0.99, 0.9 - 3 / steps + 0.03 * r),
    )


def continued(base, mauve) -> list[dict]:
    base = base | {"length": 100, "num_samples": 960}
    return [base | row(metric, "continuations", value, spread) | extra for metric, value, spread, extra in (
        ("mauve", mauve, 0.01, {}), ("self_bleu", 12 - 5 * mauve, 0.4, NO_JUDGE), ("continuation_perplexity", 30 - 10 * mauve, 2, {}),
        ("continuation_distinct_2", 0.8, 0.01, NO_JUDGE),
    )]  # fmt: skip


def last_words(teacher, run, r, model, sha) -> list[dict]:
    base = (
        common(teacher, run, r, model, None, sha)
        | NO_JUDGE
        | {"sampler": None, "num_samples": 2000, "data": ITEMS}
    )
    lift = {"kl_backward": 0.011, "mse": 0.006, "tvd": 0.009}.get(run, 0) * r
    return [base | one for one in (
        row("lambada_accuracy", "parallel", 0.41 + lift, 0.02), row("lambada_accuracy", "confidence", 0.44 + lift, 0.02),
        row("lambada_perplexity", "elbo-exact", 9.1 + 0.2 * r, 0.5), row("lambada_perplexity", "elbo-mc", 9.3 + 0.2 * r, 0.6),
    )]  # fmt: skip


def timings(teacher, run, r) -> list[dict]:
    rows = []
    for length in (64, 128, 256, 512):
        for batch in (1, 8):
            for steps in (None, 8, 16, 32, 64):
                model, who = (
                    (f"{teacher}/baseline", "baseline")
                    if steps is None
                    else (f"{teacher}/{run}/round-{r}", run)
                )
                one = 0.004 * (1 + 0.02 * batch * length / 64)  # a pass over the window
                latency = length * 0.0041 * (1 + 0.03 * batch) if steps is None else steps * one
                rows.append({
                    "metric": "latency_s", "protocol": "interleaved", "version": 2, "value": latency, "low": 0.97 * latency, "high": 1.06 * latency, "model": model, "teacher": teacher,
                    "run": who, "round": 0 if steps is None else r, "steps": steps, "network_evaluations": steps or length, "sampler": "ancestral" if steps else "kv_cache",
                    "length": length, "batch_size": batch, "tokens_per_s": batch * length / latency, "tokens_per_forward": length / (steps or length), "device": "cpu", "dtype": "float32", "params": 2_100_000,
                    "num_samples": batch, "seed": 1, "weights": "ema", "checkpoint": None, "commit": "0123456789ab", "judge": None, "draw_dtype": "float64",
                })  # fmt: skip
    return rows


def dump(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows, indent=1))

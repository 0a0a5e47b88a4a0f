"""A results folder as the pipeline writes it, made from formulas, for tests and for inspection.

It holds journals, metric rows, timings and samples.
"""

import json
import math
import random
from pathlib import Path

from halfstep.config import NAIVE
from halfstep.metrics.protocols import PROTOCOLS
from halfstep.records.journal import Journal

STEPS = [8, 16, 32, 64, 128, 256, 512, 1024]
ITEMS = "last_words.jsonl[2000]@66778899aabb"
NO_JUDGE = {"judge": None, "judge_dtype": None}
TEMPERATURES = (0.7, 0.85, 1.0, 1.15)
LOSSES = ("kl_backward", "mse", "tvd")
SCALE = {"kl_backward": 1.0, "mse": 3.0, "tvd": 0.3}  # of the training loss


def write(
    results: Path,
    teacher="stories-tiny",
    runs=LOSSES,
    rounds=7,
    steps=STEPS,
    points=40,
    benchmark=True,
) -> Path:
    """Write all files of one teacher into the folder `results`."""
    students = [(run, r, f"{run}/round-{r}") for run in runs for r in range(1, rounds + 1)]
    words = {run: [] for run in ("teacher", *runs)}  # a file for all rounds of a run
    for run, r, name in [("teacher", 0, "teacher"), *students]:
        model = f"{teacher}/{name}"
        metrics = results / "metrics" / model
        sha = train(results / "models" / model, model, run, r, points)
        samples, continuations = [], []
        for n in steps:
            made_for = {"student_steps": 1024 // 2**r} if r else {}
            samples += [row | made_for for row in sampled(teacher, run, r, model, n, sha)]
            mauve = 0.9 - 0.4 / n + 0.005 * r
            continuations += continued(common(teacher, run, r, model, n, sha), mauve)
            text = f"At {n} steps {name} wrote that Mira found a red kite.\nShe kept it."
            file = results / "samples" / model / f"steps-{n}" / "samples.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"=== 0\nAnother text.\n=== 1\n{text}\n")
        dump(metrics / "samples.json", samples)
        dump(metrics / "released-noise" / "samples.json", varied(samples))
        if r in (0, rounds):
            dump(metrics / "frontier.json", swept(samples))
            drawn = swept(varied(samples))
            curves = [row for row in drawn if "ratio" not in row["metric"]]
            dump(metrics / "released-noise" / "frontier.json", curves)
            base = common(teacher, run, r, model, None, sha) | NO_JUDGE | {"sampler": None}
            answers = answered(base, ("elbo", "elbo-per-token"))
            answers += [row for n in steps for row in written(base, r, n)]
            dump(metrics / "tasks.json", answers)
            dump(metrics / "zero_shot.json", zero_shot(base, "elbo", 30.0 + r))
        dump(metrics / "continuations.json", continuations)
        words[run] += last_words(teacher, run, r, model, sha)
        filled = filled_in(common(teacher, run, r, model, None, sha) | NO_JUDGE, r)
        dump(metrics / "infilling.json", filled)
    for run, rows in words.items():
        dump(results / "metrics" / teacher / run / "lambada.json", rows)
    write_baseline(results, teacher, points)
    data = common(teacher, "data", 0, "data", None, None) | {"sampler": None, "weights": None}
    dump(results / "metrics" / teacher / "data.json", quality(data, 7.2, 3.95, 1.0))
    naive = [
        common(teacher, run, 0, f"{teacher}/{run}", None, None) | {"sampler": run, "weights": None}
        for run in NAIVE
    ]
    rows = [row for base in naive for row in quality(base, 180.0, 3.9, 0.0)]
    dump(results / "metrics" / teacher / "naive" / "samples.json", rows)
    if benchmark:
        rows = timings(teacher, runs[0] if runs else "teacher", rounds)
        dump(results / "benchmarks" / teacher / "trained" / "length-64-256-512-1024.json", rows)
    return results


def write_baseline(results: Path, teacher: str, points: int) -> None:
    """The files of a teacher's baseline."""
    model = f"{teacher}/baseline"
    metrics = results / "metrics" / model
    sha = train(results / "models" / model, model, "baseline", 0, points)
    base = common(teacher, "baseline", 0, model, None, sha)
    base |= {"network_evaluations": 1024, "sampler": None}
    words = base | NO_JUDGE | {"data": ITEMS}
    accuracy = row("lambada_accuracy", "ar", 0.58, 0.02)
    perplexity = row("lambada_perplexity", "ar", 4.1, 0.3)
    dump(metrics / "samples.json", quality(base, 9.4, 3.91, 0.97))
    dump(metrics / "frontier.json", swept(quality(base, 9.4, 3.91, 0.97)))
    dump(metrics / "lambada.json", [words | accuracy, words | perplexity])
    dump(metrics / "continuations.json", continued(base, 0.93))
    answers = answered(words, ("ar",)) + written(words | {"sampler": "autoregressive"}, 0, None)
    dump(metrics / "tasks.json", answers)
    dump(metrics / "zero_shot.json", zero_shot(words, "ar", 25.0))


def train(folder: Path, model: str, run: str, r: int, points: int) -> str:
    """A finished training: journal and weights.

    Returns the first 16 digits of the checksum of the weights.
    """
    noise, scale = random.Random(f"{run}{r}"), SCALE.get(run, 2.5)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ema.safetensors").write_bytes(f"{model} weights".encode())
    meta = {"student_steps": 1024 // 2**r} if r else {}
    (folder / "meta.json").write_text(json.dumps(meta) + "\n")
    with Journal(
        folder,
        name=model.split("/", 1)[1],
        node=f"distill-round/{model}",
        params={
            "distillation": {"divergence": run, "lr": 6e-5, "rounds": 7},
            **({"divergence": run} if r else {}),
            "round": r,
            "seed": 1,
        },
        tags={"rule": "distill_round"},
        datasets=[{"name": "stories", "digest": "0f" * 32, "source": "results/data/stories"}],
    ) as journal:
        for i in range(1, points + 1):
            decay = math.exp(-i / points * 4)
            loss = scale * (0.15 + decay * (0.5 if r else 4)) * (1 + 0.08 * noise.gauss(0, 1))
            metrics = {
                "train/loss": loss,
                "train/lr": 6e-5 * min(1, i / 5),
                "train/grad_norm": 0.5 + noise.random(),
                "train/tokens_per_s": 12e3,
            }
            journal.log(metrics, 50 * i)
            if i % 10 == 0:
                key = "val/nll" if run == "baseline" else "val/nelbo"
                journal.log({key: 1.1 + 2.5 * decay - 0.01 * r}, 50 * i)
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
    """The columns that all rows of a model share."""
    return {
        "model": model,
        "teacher": teacher,
        "run": run,
        "round": r,
        "steps": steps,
        "tokens_per_step": steps and 1024 / steps,
        "sampler": "ancestral",
        "network_evaluations": steps,
        "num_samples": 512,
        "seed": 1,
        "weights": "ema",
        "draw_dtype": "float64",
        "judge": f"results/models/{teacher}/baseline@aabbccddeeff",
        "judge_dtype": "float32",
        "data": "stories@001122334455",
        "checkpoint": sha,
        "commit": "0123456789ab",
    }


def quality(base, perplexity, entropy, consistent) -> list[dict]:
    """The rows of samples at one step count."""
    spread = 0.04 * perplexity
    return [
        base | row("generative_perplexity", "ids", perplexity, spread) | {"median_text": 1},
        base | row("generative_perplexity", "retokenized", 1.1 * perplexity, spread),
        base | row("entropy", "unigram", entropy, 0.01) | NO_JUDGE,
        base | row("distinct_2", "bigrams", 0.31, 0.01) | NO_JUDGE,
        base | row("consistent_share", "grammar", consistent, 0.02) | NO_JUDGE,
    ]


def sampled(teacher, run, r, model, steps, sha) -> list[dict]:
    """The rows of a denoiser's samples at one step count."""
    gain = {"teacher": 0, "kl_backward": 0.24, "mse": 0.17, "tvd": 0.21}.get(run, 0.2) * r
    few = 8 / steps
    lower = math.exp(-gain * (1 + 0.1 * math.log2(few)))
    perplexity = (11 - 0.25 * r) + 139 * few**1.25 * lower
    entropy = 3.97 + 0.09 * few - 0.012 * r
    consistent = min(0.99, 0.9 - 3 / steps + 0.03 * r)
    return quality(common(teacher, run, r, model, steps, sha), perplexity, entropy, consistent)


def varied(samples) -> list[dict]:
    """The rows of the same samples, drawn with noise of low precision."""
    about = {"variant": "released-noise", "sampler": "ancestral_float32"}
    factors = {"generative_perplexity": 0.6, "entropy": 0.98}
    rows = [row for row in samples if row["metric"] in factors]
    numbers = ("value", "low", "high")
    return [
        row | about | {key: factors[row["metric"]] * row[key] for key in numbers} for row in rows
    ]


def swept(samples) -> list[dict]:
    """The rows of the frontier of a model with these rows of samples at temperature 1."""
    entropy = {row["steps"]: row["value"] for row in samples if row["metric"] == "entropy"}
    rows = []
    for one in samples:
        new = f"frontier_{one['metric'].removeprefix('generative_')}"
        if new not in PROTOCOLS:
            continue
        for temperature in TEMPERATURES:
            at = {"temperature": None if temperature == 1 else temperature}
            cold = (1 - temperature) * (0.15 + 0.002 * (one["steps"] or 64))
            value = one["value"] - cold if "entropy" in new else one["value"] * (1 - 2.5 * cold)
            spread = 0.01 if "entropy" in new else 0.04 * value
            rows.append(one | at | row(new, one["protocol"], value, spread))
        if new == "frontier_perplexity":
            rows += readings(one, entropy[one["steps"]])
    return rows


def readings(one, entropy) -> list[dict]:
    """What is read off the curve of a row of samples, reached or not."""
    protocol, found = one["protocol"], []
    names = {"perplexity_at_data_entropy": 3.95, "perplexity_ratio_at_equal_entropy": entropy}
    for name, at in names.items():
        if "ratio" in name and not one["round"]:
            continue
        reached = {"at_entropy": at, "reached": "yes"} | row(name, protocol, one["value"] / 9, 0.1)
        if one["steps"] == 8 and "ratio" not in name:
            gone = {"value": None, "low": None, "high": None, "reached": "no: below the curve"}
            reached |= gone
        elif one["steps"] == 16:
            reached |= {"high": None}
        found.append(one | reached)
    return found


def continued(base, mauve) -> list[dict]:
    """The rows of continuations at one step count."""
    base = base | {"length": 100, "num_samples": 960}
    name = "continuations"
    return [
        base | row("mauve", name, mauve, 0.01),
        base | row("self_bleu", name, 12 - 5 * mauve, 0.4) | NO_JUDGE,
        base | row("continuation_perplexity", name, 30 - 10 * mauve, 2),
        base | row("continuation_distinct_2", name, 0.8, 0.01) | NO_JUDGE,
    ]


def last_words(teacher, run, r, model, sha) -> list[dict]:
    """The rows of a denoiser's last words."""
    base = common(teacher, run, r, model, None, sha) | NO_JUDGE
    base |= {"sampler": None, "num_samples": 2000, "data": ITEMS}
    lift = {"kl_backward": 0.011, "mse": 0.006, "tvd": 0.009}.get(run, 0) * r
    return [
        base | row("lambada_accuracy", "parallel", 0.41 + lift, 0.02),
        base | row("lambada_accuracy", "confidence", 0.44 + lift, 0.02),
        base | row("lambada_perplexity", "elbo-exact", 9.1 + 0.2 * r, 0.5),
        base | row("lambada_perplexity", "elbo-mc", 9.3 + 0.2 * r, 0.6),
    ]


def filled_in(base, r) -> list[dict]:
    """The rows of two infilling tasks."""
    tasks = {"last_words": ("exact",), "infilling": ("grammar", "tokens")}
    rows = []
    for task, protocols in tasks.items():
        about = base | {"task": task, "data": f"{task}[24 windows, 200 positions]@0123456789ab"}
        about |= {"num_samples": 24, "network_evaluations": None}
        for name in protocols:
            area = row("accuracy_under_parallelism", name, 0.4 + 0.01 * r, 0.05)
            rows.append(about | area)
            for limit in (8, 4, 2, 1):
                counted = {"network_evaluations": 0.8 * limit, "tokens_per_forward": 10 / limit}
                accuracy = row("infilling_accuracy", name, 0.5 - 0.2 / limit + 0.01 * r, 0.08)
                rows.append(about | {"steps": limit} | counted | accuracy)
    return rows


def answered(base, protocols) -> list[dict]:
    """The rows of two tasks of lm-eval."""
    rows = []
    for task, value in (("piqa", 0.6), ("arc_easy", 0.4)):
        about = {"task": task, "measure": "acc", "data": f"{task}[500]@0123456789ab"}
        about |= {"num_samples": 500, "network_evaluations": 1.0 if "ar" in protocols else 64.0}
        rows += [base | about | row("task_score", name, value, 0.04) for name in protocols]
    return rows


def written(base, r, steps) -> list[dict]:
    """The rows of a task whose answers are written."""
    about = {"task": "gsm8k", "measure": "exact_match, strict-match", "num_samples": 1319}
    about |= {"data": "gsm8k[1319]@0123456789ab", "temperature": 0.0, "steps": steps}
    about |= {"network_evaluations": 250.0, "student_steps": 1024 // 2**r if r else None}
    if steps:
        about |= {"sampler": "ancestral", "tokens_per_step": 256 / steps}
        about["network_evaluations"] = 0.8 * steps
    return [base | about | row("task_score", "written", 0.3 - 0.2 / (steps or 9) + 0.01 * r, 0.02)]


def zero_shot(base, protocol, value) -> list[dict]:
    """The rows of two texts."""
    rows = []
    for task in ("ptb", "wikitext"):
        about = {"task": task, "data": f"{task}[80]@0123456789ab", "num_samples": 80}
        about |= {"length": 1024, "network_evaluations": 1.0 if protocol == "ar" else 8.0}
        rows.append(base | about | row("zero_shot_perplexity", protocol, value, 2.0))
    return rows


def timings(teacher, run, r) -> list[dict]:
    """The rows of seconds of the baseline and of one student."""
    rows = []
    for length in (64, 256, 512, 1024):
        for batch in (1, 8):
            baseline = length * 0.0041 * (1 + 0.03 * batch)
            rows.append(timing(teacher, "baseline", 0, None, length, batch, baseline))
            one = 0.004 * (1 + 0.02 * batch * length / 64)  # a pass over the window
            for steps in (8, 16, 32, 64):
                rows.append(timing(teacher, run, r, steps, length, batch, steps * one))
    return rows


def timing(teacher, run, r, steps, length, batch, latency) -> dict:
    """One row of seconds; steps is None for the baseline."""
    model = f"{teacher}/baseline" if steps is None else f"{teacher}/{run}/round-{r}"
    passes = steps or length
    return {
        "metric": "latency_s",
        "protocol": "interleaved",
        "version": PROTOCOLS["latency_s"]["interleaved"],
        "value": latency,
        "low": 0.97 * latency,
        "high": 1.06 * latency,
        "model": model,
        "teacher": teacher,
        "run": run,
        "round": r,
        "steps": steps,
        "network_evaluations": passes,
        "sampler": "ancestral" if steps else "kv_cache",
        "length": length,
        "batch_size": batch,
        "bounds": "quartiles of 10",
        "cache": None if steps else "static",
        "tokens_per_s": batch * length / latency,
        "tokens_per_forward": length / passes,
        "device": "cpu",
        "dtype": "float32",
        "params": 2_100_000,
        "num_samples": batch,
        "seed": 1,
        "weights": "ema",
        "checkpoint": None,
        "commit": "0123456789ab",
        "judge": None,
        "draw_dtype": "float64",
    }


def dump(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows, indent=1))

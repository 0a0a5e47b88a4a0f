"""`make bench`: every hot path against its textbook version, timed in turns in one process.

Writes a table, and JSON with machine, versions and commit. On a CUDA device the cases are those of
the H100 table. --tiny runs every case at a toy size, for the tests.

A second table holds ratios against the released code, which others measured. This program does not
run that code and does not need it.
"""

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import textbook
import torch
from torch import Tensor

from halfstep.commands.distill import sdtt_loss
from halfstep.config import SIZES, Distillation, Machine, Training
from halfstep.data import pack, stories
from halfstep.data.batches import batch_indices
from halfstep.data.tokenizer import EOS, train_bpe
from halfstep.data.windows import Layout
from halfstep.diffusion.contracts import Draws
from halfstep.diffusion.masking import corrupt
from halfstep.diffusion.objective import nelbo, stratified_times
from halfstep.diffusion.samplers import sample
from halfstep.diffusion.schedules import LogLinear
from halfstep.distill.divergences import kl_backward
from halfstep.distill.rounds import Round
from halfstep.distributed.device import prepare_process
from halfstep.files import write_atomic, write_json
from halfstep.gpus import GPUS
from halfstep.kernels.precision import cast_matrices
from halfstep.meta import Framing
from halfstep.models import flops
from halfstep.models.denoiser import SubsDenoiser
from halfstep.models.dit import DiT
from halfstep.records.journal import Journal, commit
from halfstep.timing import device_name, machine, measure, measure_in_turns
from halfstep.training.ema import EMA
from halfstep.training.loop import SAVE_EVERY_S
from halfstep.training.optim import FusedAdamW
from halfstep.training.state import Run, TrainingState, save_state
from halfstep.training.step import step_generator


class Size(NamedTuple):
    vocabulary: int
    width: int
    blocks: int
    heads: int
    length: int
    batch: int

    def __str__(self) -> str:
        return (
            f"vocabulary {self.vocabulary:,}, width {self.width}, {self.blocks} blocks, "
            f"{self.length} tokens, batch {self.batch}"
        )


class ReleasedRatio(NamedTuple):
    """How many times faster halfstep is than the released code. It is not measured here."""

    path: str
    """the beginning of the path of the measured rows"""
    against: str
    size: str
    times_faster: float
    source: str = "others, on one CPU, November 2026"


SCHEDULE, TEACHER_STEPS, SUBSTEPS = LogLinear(), 1024, 2
CPU = Size(50_257, 256, 4, 4, 128, 8)
BLOCKS, WIDTH, HEADS = SIZES["small"]
H100 = Size(50_257, WIDTH, BLOCKS, HEADS, 1024, 32)
TINY = Size(301, 32, 2, 2, 16, 4)
WARM_UP = Size(301, 512, 1, 4, 16, 4)
PEAK_FLOPS = GPUS["h100"].bfloat16

SAMPLING_GOALS = {8: 20, 32: 22, 128: 36, 1024: 170}  # sampling steps -> times faster
TRAINING_GOALS = {  # path -> times faster, times less memory
    "distillation step, round 1": (9, 10),
    "distillation step, round 7": (6, 10),
    "pretraining step": (2, 5),
}
NOT_RECORDED, DEMO = "not recorded", "the demo's size"
RELEASED_RATIOS = (
    ReleasedRatio("sample, 8 steps", "SDTT", NOT_RECORDED, 21.8),
    ReleasedRatio("sample, 1024 steps", "MDLM with its cache", NOT_RECORDED, 183),
    ReleasedRatio("distillation step", "the released code", NOT_RECORDED, 7.4),
    ReleasedRatio("pretraining step", "the released code", NOT_RECORDED, 4.0),
    # The source gives these three without names. They are in the order of the paths above.
    ReleasedRatio("sample", "the released code", f"{DEMO}; steps {NOT_RECORDED}", 2.1),
    ReleasedRatio("distillation step", "the released code", DEMO, 2.0),
    ReleasedRatio("pretraining step", "the released code", DEMO, 1.45),
)
TEXTBOOK_STEPS = 2  # all its sampling steps cost the same, so a few are timed and multiplied


def build(size: Size, device: str = "cpu") -> SubsDenoiser:
    """A network of random weights.

    The readout is random too: it starts at zero, a distribution that no trained network has.
    """
    torch.manual_seed(0)
    network = DiT(size.vocabulary, size.width, size.blocks, size.heads)
    torch.nn.init.normal_(network.output_layer.linear.weight, std=2 / size.width**0.5)
    return SubsDenoiser(network.to(device), LogLinear())


class Trial:
    """A student, its teacher, and one batch: texts, stratified times and uniforms."""

    def __init__(self, size: Size, device: str = "cpu"):
        self.student, self.teacher = build(size, device), build(size, device)
        random, shape = torch.Generator().manual_seed(1), (size.batch, size.length)
        t = stratified_times(torch.rand(size.batch, generator=random, dtype=torch.float64), 1e-3)
        self.u = torch.rand(3, *shape, generator=random, dtype=torch.float64)
        self.x0 = torch.randint(0, size.vocabulary, shape, generator=random)
        self.xt = corrupt(self.x0, t, self.u[0], SCHEDULE, self.student.mask_id)
        self.t = t.float()

    def pretraining_loss(self) -> Tensor:
        return nelbo(self.student, self.x0, self.t, self.u[0])

    def distillation_loss(self, dt: float) -> Tensor:
        part = {"xt": self.xt, "t": self.t, "u_reveal": self.u[1], "u_token": self.u[2]}
        round = Round(1, dt, SUBSTEPS, TEACHER_STEPS // SUBSTEPS)
        return sdtt_loss(self.student, self.teacher, part, round, Distillation())

    def textbook_pretraining_loss(self) -> Tensor:
        return textbook.pretraining_loss(self.student, self.x0, self.t, self.u[0], SCHEDULE)

    def textbook_distillation_loss(self, dt: float) -> Tensor:
        return textbook.distillation_loss(
            self.student, self.teacher, kl_backward, self.xt, self.t, dt, SUBSTEPS, SCHEDULE
        )

    def backward(self, loss: Callable[[], Tensor]) -> None:
        """Forward and backward pass of the batch."""
        self.student.network.zero_grad(set_to_none=True)
        (loss() / self.xt.numel()).backward()


def training_steps(size: Size) -> dict[str, dict[str, Callable[[], None]]]:
    """{path: {"ours", "textbook"}}: forward and backward pass of one batch."""
    trial = Trial(size)
    paths = {}
    for round in (1, 7):
        dt = SUBSTEPS ** (round - 1) / TEACHER_STEPS
        paths[f"distillation step, round {round}"] = {
            "ours": partial(trial.backward, partial(trial.distillation_loss, dt)),
            "textbook": partial(trial.backward, partial(trial.textbook_distillation_loss, dt)),
        }
    paths["pretraining step"] = {
        "ours": partial(trial.backward, trial.pretraining_loss),
        "textbook": partial(trial.backward, trial.textbook_pretraining_loss),
    }
    return paths


def process_status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))


def peak_memory(path: str, side: str, size: Size) -> int:
    """Bytes of resident memory above the weights at the peak of one step of this fresh process."""
    # Freed memory goes back at once, so that the peak is what is needed, on both sides.
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 16)
    libc.mallopt(-1, 0)
    # The libraries load what they need: oneDNN forms products of matrices of this width.
    training_steps(WARM_UP)[path][side]()
    step = training_steps(size)[path][side]
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
        file.write("5")
    before = process_status("VmRSS")
    step()
    return process_status("VmHWM") - before


def peak_memory_of(path: str, side: str, tiny: bool) -> int:
    """`peak_memory` in a new process."""
    command = [sys.executable, __file__, "--peak", path, side, *(["--tiny"] if tiny else [])]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def comparison(path: str, ours_s: float, textbook_s: float, goal: float, **more: object) -> dict:
    return {
        "path": path,
        "ours_s": ours_s,
        "textbook_s": textbook_s,
        "times_faster": textbook_s / ours_s,
        "goal": goal,
        **more,
    }


def sampling(size: Size, repeats: int) -> list[dict]:
    """Sampling at each step count, and the cost of more steps than there are tokens."""
    denoiser = build(size)
    ours = partial(sample, denoiser.inference_copy, size.batch, size.length)  # as `generate` does
    cases: dict = {steps: partial(ours, steps) for steps in SAMPLING_GOALS}
    cases["textbook"] = partial(
        textbook.sample,
        denoiser,
        size.batch,
        size.length,
        max(SAMPLING_GOALS),
        SCHEDULE,
        stop=TEXTBOOK_STEPS,
    )
    times = measure_in_turns(cases, repeats)
    textbook_step_s = times["textbook"].median_s / TEXTBOOK_STEPS
    rows = [
        comparison(
            f"sample, {steps} steps",
            times[steps].median_s,
            steps * textbook_step_s,
            goal,
            timings=asdict(times[steps]),
            textbook_timings=asdict(times["textbook"]),
        )
        for steps, goal in SAMPLING_GOALS.items()
    ]
    few, many = 1024, 8192
    times = measure_in_turns({steps: partial(ours, steps) for steps in (few, many)}, repeats)
    passes = {steps: ours(steps).network_evaluations.sum().item() for steps in (few, many)}
    label = f"(network evaluations {passes[many] / passes[few]:.3f})"
    ratio = times[many].median_s / times[few].median_s
    path = f"sample, {many} steps over {few} steps {label}"
    return [*rows, {"path": path, "ratio": ratio, "goal": 1.05}]


def training(size: Size, repeats: int, tiny: bool) -> list[dict]:
    """Time and peak memory of each training step."""
    parameters = build(size).network.parameters()
    gradient_bytes = sum(p.numel() * p.element_size() for p in parameters)
    rows = []
    for path, cases in training_steps(size).items():
        times = measure_in_turns(cases, repeats)
        memory = {side: peak_memory_of(path, side, tiny) for side in cases}
        speed_goal, memory_goal = TRAINING_GOALS[path]
        row = comparison(
            path,
            times["ours"].median_s,
            times["textbook"].median_s,
            speed_goal,
            peak_bytes=memory["ours"],
            textbook_peak_bytes=memory["textbook"],
            memory_ratio=memory["textbook"] / max(1, memory["ours"]),
            memory_goal=memory_goal,
            gradient_bytes=gradient_bytes,
            timings=asdict(times["ours"]),
            textbook_timings=asdict(times["textbook"]),
        )
        rows.append(row)
    return rows


def tokenizing(repeats: int, tiny: bool) -> list[dict]:
    """Packing of spooled documents against encode_batch of the same texts, each on all cores."""
    texts = list(stories.sample_stories(200 if tiny else 60_000, 1))
    tokenizer, cores = train_bpe(texts[:2000], 2000), machine()["cores"]
    ends = [tokenizer.token_to_id(EOS)]
    layout = Layout(128, ends[0], Framing(begin=ends, end=ends))
    with (
        tempfile.TemporaryDirectory() as folder,
        pack.Spool(Path(folder) / "spool", iter(texts)) as spool,
    ):
        splits = {"train": range(len(spool))}
        cases = {
            "ours": lambda: pack.pack_windows(
                spool, tokenizer, layout, Path(folder), splits, cores
            ),
            "encode_batch": lambda: tokenizer.encode_batch(texts),
        }
        times = measure_in_turns(cases, repeats)
        path = f"tokenize and pack, {spool.bytes / 1e6:.0f} MB"
    return [comparison(path, times["ours"].median_s, times["encode_batch"].median_s, 0.9)]


def overhead(size: Size, repeats: int) -> list[dict]:
    """Cost of data, journal, EMA and checkpoint as a share of a step, each timed by itself.

    A step is forward pass, backward pass and AdamW; a checkpoint is written every SAVE_EVERY_S.
    """
    trial, train = Trial(size), Training()
    network = trial.student.network
    optimizer, ema = FusedAdamW(network, train), EMA(network, 0.9999)
    shape = (4096, size.length)
    windows = torch.randint(0, size.vocabulary, shape).numpy().astype("uint16")

    def data() -> None:
        rows = windows[batch_indices(len(windows), size.batch, 1, 7)]
        x0 = torch.from_numpy(rows.astype("int64"))
        random = step_generator(1, 7)
        torch.rand(size.batch, generator=random, dtype=torch.float64)
        torch.rand(*x0.shape, generator=random, dtype=torch.float64)

    def step() -> None:
        trial.backward(trial.pretraining_loss)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0, foreach=True)
        optimizer.step()

    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder), name="bench", node="bench", params={})
        run = Run(torch.device("cpu"), size.batch, Path(folder), "bench", journal)
        state = TrainingState(network, optimizer, ema, torch.zeros(()), torch.zeros(()))
        cases = {
            "step": step,
            "data": data,
            "ema": ema.update,
            "journal": lambda: journal.log({"train/loss": 1.0}, 1),
        }
        times = measure_in_turns(cases, repeats)
        save = measure(lambda: save_state(state, run), 1, warmup=0)
        journal.close()
    step_s = times["step"].median_s
    shares = {name: times[name].median_s / step_s for name in ("data", "ema", "journal")}
    shares["checkpoint"] = save.median_s / SAVE_EVERY_S
    path, ratio = "loop overhead, share of a step", sum(shares.values())
    return [{"path": path, "ratio": ratio, "goal": 0.03, "shares": shares, "step_s": step_s}]


def target(path: str, ours: float, must: float, aim: float, **more: object) -> dict:
    """A row of the H100 table."""
    return {"path": path, "ours": ours, "must": must, "aim": aim, **more}


def on_cuda(size: Size, device: str, tiny: bool, repeats: int) -> list[dict]:
    """The H100 table: 169M, L = 1024, bfloat16 autocast.

    The tests run it on the CPU, with TINY and float32 weights.
    """
    return [
        *cuda_training(size, device, repeats),
        *cuda_sampling(size, device, repeats, texts=8 if tiny else 1024, steps=4 if tiny else 8),
    ]


def cuda_training(size: Size, device: str, repeats: int) -> list[dict]:
    trial = Trial(size, device)
    student, xt = trial.student, trial.xt
    optimizer = FusedAdamW(student.network, Training())
    distillation = partial(trial.distillation_loss, 1 / TEACHER_STEPS)

    def step(loss: Callable[[], Tensor], micro_batches: int) -> None:
        for _ in range(micro_batches):
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                value = loss() / xt.numel()
            value.backward()
        optimizer.step()
        optimizer.zero_grad()

    def peak_bytes() -> int:
        if torch.device(device).type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats(device)
        step(distillation, 1)
        return torch.cuda.max_memory_allocated(device)

    pretraining_s = measure(partial(step, trial.pretraining_loss, 1), repeats, 2, device).median_s
    masked = int((xt == student.mask_id).sum())
    work = flops.training_flops(
        flops.network_shape(student.network), size.batch, size.length, masked
    )
    distillation_s = measure(partial(step, distillation, 128 // 32), repeats, 1, device).median_s
    return [
        target(
            "pretraining, tokens/s",
            xt.numel() / pretraining_s,
            must=350e3,
            aim=460e3,
            mfu=work / pretraining_s / PEAK_FLOPS,
        ),
        target("distillation step, batch 128, s", distillation_s, must=0.65, aim=0.40),
        target("peak memory, micro-batch 32, GB", peak_bytes() / 1e9, must=30, aim=16),
    ]


def cuda_sampling(size: Size, device: str, repeats: int, texts: int, steps: int) -> list[dict]:
    denoiser, cuda = build(size, device), torch.device(device).type == "cuda"
    network = denoiser.network.eval().requires_grad_(False)
    cast_matrices(network, torch.bfloat16 if cuda else torch.float32)
    low_precision = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=cuda)

    @low_precision
    def write(denoiser: SubsDenoiser, texts: int) -> None:
        for first in range(0, texts, 128):
            sample(
                denoiser,
                min(128, texts - first),
                size.length,
                steps,
                draws=Draws(first=first),
                device=device,
            )

    @low_precision
    @torch.no_grad()
    def network_alone() -> None:
        for first in range(0, texts, 128):
            shape = (min(128, texts - first), size.length)
            x = torch.full(shape, denoiser.mask_id, device=device)
            for _ in range(steps):
                denoiser.features(x, torch.ones(len(x), device=device))

    copy = denoiser.inference_copy
    cases = {"write": partial(write, copy, texts), "bare": network_alone}
    times = measure_in_turns(cases, repeats, 1, device)
    cases = {"eager": partial(write, denoiser, 1), "replayed": partial(write, copy, 1)}
    one_text = measure_in_turns(cases, 4 * repeats, 1, device)
    write_s, bare_s = times["write"].median_s, times["bare"].median_s
    return [
        target("sampling, times the bare network", write_s / bare_s, must=1.15, aim=1.05),
        target("1,024 samples of 1,024 tokens at 8 steps, s", write_s, must=15, aim=6),
        target(
            f"one text at {steps} steps: CUDA graphs against eager passes, times faster",
            one_text["eager"].median_s / one_text["replayed"].median_s,
            must=1,
            aim=1,
            timings={name: asdict(timing) for name, timing in one_text.items()},
        ),
    ]


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| path | ours | textbook | ratio | goal | peak memory above the weights | goal |",
        "|---|---|---|---|---|---|---|",
    ]
    if "must" in rows[0]:
        lines = ["| path | ours | must | aim |", "|---|---|---|---|"]
    for row in rows:
        path = row["path"]
        if "must" in row:
            lines.append(f"| {path} | {row['ours']:.4g} | {row['must']:g} | {row['aim']:g} |")
        elif "ratio" in row:
            lines.append(f"| {path} | | | {row['ratio']:.3f} | at most {row['goal']} | | |")
        else:
            times = f"{row['ours_s']:.3g} s | {row['textbook_s']:.3g} s"
            speed = f"{row['times_faster']:.2f}x | {row['goal']}x"
            lines.append(f"| {path} | {times} | {speed} | {_memory_cells(row)} |")
    return "\n".join(lines) + "\n"


def released_table(ratios: tuple[ReleasedRatio, ...]) -> str:
    """Ratios against the released code as a Markdown table."""
    lines = [
        "Against the released code: not measured in this run, but earlier by others.",
        "",
        "| path | against | size | times faster | measured by |",
        "|---|---|---|---|---|",
    ]
    for row in ratios:
        cells = (row.path, row.against, row.size, f"{row.times_faster}x", row.source)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _memory_cells(row: dict) -> str:
    if "peak_bytes" not in row:
        return " | "
    ours, textbook, gradients = (
        row[key] for key in ("peak_bytes", "textbook_peak_bytes", "gradient_bytes")
    )
    ratio = (textbook - gradients) / (ours - gradients)
    return (
        f"{ours / 1e6:.0f} MB of {textbook / 1e6:.0f} MB: 1/{row['memory_ratio']:.1f}; "
        f"1/{ratio:.1f} above the gradients too | 1/{row['memory_goal']}"
    )


def on_cpu(size: Size, repeats: int, tiny: bool) -> list[dict]:
    few = min(repeats, 3)
    return [
        *sampling(size, few),
        *training(size, repeats, tiny),
        *tokenizing(few, tiny),
        *overhead(size, repeats),
    ]


def write_results(
    output: Path,
    device: str,
    size: Size,
    note: str,
    rows: list[dict],
    released: tuple[ReleasedRatio, ...],
    seconds: float,
) -> None:
    """Write and print the tables; write the JSON file next to them."""
    load = os.getloadavg()[0]
    facts = {
        "machine": machine(device),
        "commit": commit(),
        "date": str(date.today()),
        "versions": {name: metadata.version(name) for name in ("torch", "numpy", "tokenizers")},
        "load_average": load,
        "seconds": seconds,
        "size": size,
        "note": note,
        "rows": rows,
        "released_ratios": [row._asdict() for row in released],
    }
    where = f"{device_name(device)}, {date.today()}, commit {commit()}, load {load:.1f}"
    text = f"{where}; {size}; {note}\n\n{table(rows)}"
    if released:
        text += f"\n{released_table(released)}"
    name = f"{'-'.join(device_name(device).replace('/', ' ').split())}-{date.today()}"
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / f"{name}.json", facts)
    write_atomic(output / f"{name}.md", text)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--h100", action="store_true", help="the H100 table, on any device")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, for the tests")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument(
        "--peak",
        nargs=2,
        metavar=("PATH", "SIDE"),
        help="print the peak memory of one step, in bytes",
    )
    args = parser.parse_args()
    size = TINY if args.tiny else CPU
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if args.peak:
        print(peak_memory(*args.peak, size))
        return
    # As every command does; the textbook's tensors are too large for it. Not where memory is
    # measured, because memory that is kept would hide what is needed.
    prepare_process(Machine())
    start = time.monotonic()
    if args.h100 or torch.device(args.device).type == "cuda":
        size = TINY if args.tiny else H100
        released = ()  # they are of a CPU
        rows = on_cuda(size, args.device, args.tiny, args.repeats)
        note = (
            "goals are for one H100 80GB SXM at 169M, L = 1024, bfloat16; "
            "they do not apply to another device"
        )
    else:
        rows = on_cpu(size, args.repeats, args.tiny)
        released = RELEASED_RATIOS
        gradient_mb = max(row.get("gradient_bytes", 0) for row in rows) / 1e6
        note = (
            f"textbook sampling: {TEXTBOOK_STEPS} steps timed and multiplied; memory: VmHWM above "
            "VmRSS of a fresh process whose allocator gives back what is freed, "
            f"gradients ({gradient_mb:.0f} MB) included; "
            "tokenize: the column textbook is encode_batch"
        )
    seconds = time.monotonic() - start
    write_results(args.output, args.device, size, note, rows, released, seconds)


if __name__ == "__main__":
    main()

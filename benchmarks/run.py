"""`make bench`: each hot path against its textbook version, in turns in one process; a table, and JSON with machine, versions and commit.

On a CUDA device the cases are those of the H100 table instead. --tiny runs every case at a toy size, for the tests.
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
from importlib import metadata
from pathlib import Path

import textbook
import torch

from halfstep.config import SIZES, Machine, Training
from halfstep.data import pack, stories
from halfstep.data.batches import batch_indices
from halfstep.data.tokenizer import train_bpe
from halfstep.diffusion import samplers
from halfstep.diffusion.contracts import Draws
from halfstep.diffusion.masking import corrupt, mask_indices
from halfstep.diffusion.objective import nelbo, stratified_times
from halfstep.diffusion.schedules import LogLinear
from halfstep.distill.divergences import kl_backward
from halfstep.distill.targets import divergence_loss, teacher_targets
from halfstep.distributed.device import prepare_process
from halfstep.files import write_atomic, write_json
from halfstep.models import flops
from halfstep.models.cuda_graphs import cast_matrices
from halfstep.models.denoiser import SubsDenoiser
from halfstep.models.dit import DiT
from halfstep.records.journal import Journal, commit
from halfstep.timing import device_name, machine, measure, measure_in_turns
from halfstep.training.ema import EMA
from halfstep.training.loop import SAVE_EVERY_S
from halfstep.training.optim import adamw
from halfstep.training.state import Run, TrainingState, save_state
from halfstep.training.step import step_generator

SCHEDULE, TEACHER_STEPS, SUBSTEPS = LogLinear(), 1024, 2
STEPS = {8: 20, 32: 22, 128: 36, 1024: 170}  # sampling steps -> goal, times faster
PEAK_FLOPS = 989e12  # H100 SXM, dense bfloat16 (NVIDIA's data sheet)
Size = tuple[int, int, int, int, int, int]  # vocabulary, width, blocks, heads, length, batch
CPU: Size = (50_257, 256, 4, 4, 128, 8)
TINY: Size = (301, 32, 2, 2, 16, 4)


def build(size: Size, device="cpu", dtype=torch.float32) -> SubsDenoiser:
    """A network of random weights, the readout included (it begins at zero, a law that no trained network has)."""
    vocabulary, width, blocks, heads, _, _ = size
    torch.manual_seed(0)
    network = DiT(vocabulary, width, blocks, heads)
    torch.nn.init.normal_(network.output_layer.linear.weight, std=2 / width**0.5)
    return SubsDenoiser(network.to(device, dtype), LogLinear())


def draws(size: Size, device="cpu") -> dict:
    """Inputs of a training step: texts, stratified times, uniforms."""
    vocabulary, _, _, _, length, batch = size
    random = torch.Generator().manual_seed(1)
    t = stratified_times(torch.rand(batch, generator=random, dtype=torch.float64), 1e-3)
    u = torch.rand(3, batch, length, generator=random, dtype=torch.float64)
    return {
        "x0": torch.randint(0, vocabulary, (batch, length), generator=random).to(device),
        "t": t.to(device),
        "u": u.to(device),
    }


def grad_step(network, loss: Callable[[], torch.Tensor], rows: int) -> None:
    network.zero_grad(set_to_none=True)
    (loss() / rows).backward()


def training_steps(size: Size) -> dict[str, dict[str, Callable]]:
    """{path: {"ours", "textbook"}}: forward and backward of one batch."""
    student, teacher, d = build(size), build(size), draws(size)
    xt = corrupt(d["x0"], d["t"], d["u"][0], SCHEDULE, student.mask_id)
    t, masked, divergence = d["t"].float(), xt == student.mask_id, kl_backward

    def ours(dt: float) -> torch.Tensor:
        goal = teacher_targets(teacher, xt, t, dt, SUBSTEPS, d["u"][1], d["u"][2])
        return divergence_loss(
            divergence, student.features(xt, t, masked), student.readout, goal, teacher.readout
        )

    paths = {}
    for round in (1, 7):
        dt = SUBSTEPS ** (round - 1) / TEACHER_STEPS
        paths[f"distillation step, round {round}"] = {
            "ours": lambda dt=dt: grad_step(student.network, lambda: ours(dt), xt.numel()),
            "textbook": lambda dt=dt: grad_step(
                student.network,
                lambda: textbook.distillation_loss(
                    student, teacher, divergence, xt, t, dt, SUBSTEPS, SCHEDULE
                ),
                xt.numel(),
            ),
        }
    paths["pretraining step"] = {
        "ours": lambda: grad_step(
            student.network, lambda: nelbo(student, d["x0"], t, d["u"][0]), xt.numel()
        ),
        "textbook": lambda: grad_step(
            student.network,
            lambda: textbook.pretraining_loss(student, d["x0"], t, d["u"][0], SCHEDULE),
            xt.numel(),
        ),
    }
    return paths


GOALS = {
    "distillation step, round 1": (9, 10),
    "distillation step, round 7": (6, 10),
    "pretraining step": (2, 5),
}  # speed, memory


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))


def peak(path: str, side: str, size: Size) -> int:
    """Bytes of resident memory above the weights at the peak of one step, in this process, which should be fresh."""
    libc = ctypes.CDLL(None)
    (
        libc.mallopt(-3, 1 << 16),
        libc.mallopt(-1, 0),
    )  # what is freed goes back at once: the peak is what is needed, on both sides
    training_steps((301, 512, 1, 4, 16, 4))[path][
        side
    ]()  # libraries load what they need: oneDNN forms products of matrices of this width
    step = training_steps(size)[path][side]
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
        file.write("5")
    before = status("VmRSS")
    step()
    return status("VmHWM") - before


def peak_of(path: str, side: str, tiny: bool) -> int:
    """`peak` in a process of its own."""
    command = [sys.executable, __file__, "--peak", path, side, *(["--tiny"] if tiny else [])]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def sampling(size: Size, repeats: int) -> list[dict]:
    """The textbook's steps all cost the same, so `stop` of them are timed and multiplied."""
    denoiser, stop, (*_, length, batch) = build(size), 2, size
    ours = denoiser.inference_copy  # as `generate` does
    cases: dict = {s: lambda s=s: samplers.sample(ours, batch, length, s) for s in STEPS}
    cases["textbook"] = lambda: textbook.sample(
        denoiser, batch, length, max(STEPS), SCHEDULE, stop=stop
    )
    times = measure_in_turns(cases, repeats)
    step = times["textbook"].median_s / stop
    rows = [
        {"path": f"sample, {s} steps", "ours_s": times[s].median_s, "textbook_s": s * step, "times_faster": s * step / times[s].median_s, "goal": goal,
         "timings": asdict(times[s]), "textbook_timings": asdict(times["textbook"])}
        for s, goal in STEPS.items()
    ]  # fmt: skip
    passes, beyond = {}, {}
    for s in (1024, 8192):
        beyond[s] = lambda s=s: passes.update(
            {s: samplers.sample(ours, batch, length, s).network_evaluations.sum().item()}
        )
    flat = measure_in_turns(beyond, repeats)
    rows.append({"path": f"sample, 8192 steps over 1024 steps (network evaluations {passes[8192] / passes[1024]:.3f})",
                 "ratio": flat[8192].median_s / flat[1024].median_s, "goal": 1.05})  # fmt: skip
    return rows


def training(size: Size, repeats: int, tiny: bool) -> list[dict]:
    rows, gradients = (
        [],
        sum(p.numel() * p.element_size() for p in build(size).network.parameters()),
    )
    for path, cases in training_steps(size).items():
        times = measure_in_turns(cases, repeats)
        memory = {side: peak_of(path, side, tiny) for side in cases}
        ours, theirs = times["ours"].median_s, times["textbook"].median_s
        rows.append({"path": path, "ours_s": ours, "textbook_s": theirs, "times_faster": theirs / ours, "goal": GOALS[path][0], "peak_bytes": memory["ours"],
                     "textbook_peak_bytes": memory["textbook"], "memory_ratio": memory["textbook"] / max(1, memory["ours"]), "memory_goal": GOALS[path][1], "gradient_bytes": gradients,
                     "timings": asdict(times["ours"]), "textbook_timings": asdict(times["textbook"])})  # fmt: skip
    return rows


def tokenising(repeats: int, tiny: bool) -> list[dict]:
    """Packing documents already spooled, on all cores, against encode_batch of the same texts in memory, on all cores."""
    texts = list(stories.sample_stories(200 if tiny else 60_000, 1))
    tokenizer, cores = train_bpe(texts[:2000], 2000), machine()["cores"]
    with (
        tempfile.TemporaryDirectory() as folder,
        pack.Spool(Path(folder) / "spool", iter(texts)) as spool,
    ):
        cases = {
            "ours": lambda: pack.pack_windows(
                spool, tokenizer, 128, Path(folder), {"train": range(len(spool))}, cores
            ),
            "encode_batch": lambda: tokenizer.encode_batch(texts),
        }
        times = measure_in_turns(cases, repeats)
        size = spool.bytes
    ours, theirs = times["ours"].median_s, times["encode_batch"].median_s
    return [
        {
            "path": f"tokenise and pack, {size / 1e6:.0f} MB",
            "ours_s": ours,
            "textbook_s": theirs,
            "times_faster": theirs / ours,
            "goal": 0.9,
        }
    ]


def overhead(size: Size, repeats: int) -> list[dict]:
    """Data, journal, EMA and checkpoint, each timed by itself, as a share of a step (forward, backward, AdamW); a checkpoint comes every 300 s."""
    denoiser, (vocabulary, *_, length, batch) = build(size), size
    network, d, train = denoiser.network, draws(size), Training()
    optimizer, ema = adamw(network, train), EMA(network, 0.9999)
    windows = torch.randint(0, vocabulary, (4096, length)).numpy().astype("uint16")

    def data() -> None:
        x0 = torch.from_numpy(windows[batch_indices(len(windows), batch, 1, 7)].astype("int64"))
        random = step_generator(1, 7)
        (
            torch.rand(batch, generator=random, dtype=torch.float64),
            torch.rand(*x0.shape, generator=random, dtype=torch.float64),
        )

    def step() -> None:
        grad_step(
            network,
            lambda: nelbo(denoiser, d["x0"], d["t"].float(), d["u"][0]),
            d["x0"].numel(),
        )
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0, foreach=True)
        optimizer.step()

    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder), name="bench", node="bench", params={})
        run = Run(torch.device("cpu"), batch, Path(folder), "bench", journal)
        state = TrainingState(network, optimizer, ema, torch.zeros(()), torch.zeros(()))
        times = measure_in_turns(
            {
                "step": step,
                "data": data,
                "ema": ema.update,
                "journal": lambda: journal.log({"train/loss": 1.0}, 1),
            },
            repeats,
        )
        save = measure(lambda: save_state(state, run), 1, warmup=0)
        journal.close()
    bare = times["step"].median_s
    share = {name: times[name].median_s / bare for name in ("data", "ema", "journal")} | {
        "checkpoint": save.median_s / SAVE_EVERY_S
    }
    return [
        {
            "path": "loop overhead, share of a step",
            "ratio": sum(share.values()),
            "goal": 0.03,
            "shares": share,
            "step_s": bare,
        }
    ]


def on_cuda(device: str, tiny: bool, repeats: int) -> list[dict]:
    """The H100 table: 169M, L = 1024, bfloat16 autocast (TINY and float32 weights on the CPU for the tests)."""
    blocks, width, heads = SIZES["small"]
    size: Size = TINY if tiny else (50_257, width, blocks, heads, 1024, 32)
    *_, length, micro = size
    student, teacher, cuda = (
        build(size, device),
        build(size, device),
        torch.device(device).type == "cuda",
    )
    d, optimizer, rows = draws(size, device), None, []
    optimizer = adamw(student.network, Training())
    xt = corrupt(d["x0"], d["t"], d["u"][0], SCHEDULE, student.mask_id)
    t, dt = d["t"].float(), 1 / TEACHER_STEPS

    def run(loss: Callable[[], torch.Tensor], micros: int) -> Callable[[], None]:
        def step() -> None:
            for _ in range(micros):
                with torch.autocast(torch.device(device).type, torch.bfloat16):
                    value = loss() / xt.numel()
                value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def sdtt() -> torch.Tensor:
        masked = mask_indices((xt == student.mask_id).cpu(), xt.device)
        goal = teacher_targets(teacher, xt, t, dt, SUBSTEPS, d["u"][1], d["u"][2])
        return divergence_loss(
            kl_backward, student.features(xt, t, masked), student.readout, goal, teacher.readout
        )

    def peak_bytes(step) -> int:
        if not cuda:
            return 0
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)

    pretrain = run(lambda: nelbo(student, d["x0"], t, d["u"][0]), 1)
    seconds = measure(pretrain, repeats, 2, device).median_s
    work = flops.training_flops(student.network, micro, length, int((xt == student.mask_id).sum()))
    rows.append(
        {
            "path": "pretraining, tokens/s",
            "ours": xt.numel() / seconds,
            "must": 350e3,
            "aim": 460e3,
            "mfu": work / seconds / PEAK_FLOPS,
        }
    )
    distil = run(sdtt, 128 // 32)
    rows.append(
        {
            "path": "distillation step, batch 128, s",
            "ours": measure(distil, repeats, 1, device).median_s,
            "must": 0.65,
            "aim": 0.40,
        }
    )
    rows.append(
        {
            "path": "peak memory, micro-batch 32, GB",
            "ours": peak_bytes(run(sdtt, 1)) / 1e9,
            "must": 30,
            "aim": 16,
        }
    )

    light, low = (
        build(size, device),
        torch.autocast(torch.device(device).type, torch.bfloat16, enabled=cuda),
    )
    cast_matrices(
        light.network.eval().requires_grad_(False), torch.bfloat16 if cuda else torch.float32
    )
    texts, steps = (8, 4) if tiny else (1024, 8)

    @low
    def write(denoiser: SubsDenoiser = light.inference_copy, texts: int = texts) -> None:
        for first in range(0, texts, 128):
            samplers.sample(
                denoiser,
                min(128, texts - first),
                length,
                steps,
                draws=Draws(first=first),
                device=device,
            )

    @low
    @torch.no_grad()
    def bare() -> None:
        for first in range(0, texts, 128):
            x = torch.full((min(128, texts - first), length), light.mask_id, device=device)
            for _ in range(steps):
                light.features(x, torch.ones(len(x), device=device))

    times = measure_in_turns({"write": write, "bare": bare}, repeats, 1, device)
    rows.append(
        {
            "path": "sampling, times the bare network",
            "ours": times["write"].median_s / times["bare"].median_s,
            "must": 1.15,
            "aim": 1.05,
        }
    )
    rows.append(
        {
            "path": "1,024 samples of 1,024 tokens at 8 steps, s",
            "ours": times["write"].median_s,
            "must": 15,
            "aim": 6,
        }
    )
    one = measure_in_turns(
        {"eager": lambda: write(light, 1), "replayed": lambda: write(light.inference_copy, 1)},
        4 * repeats,
        1,
        device,
    )
    faster = one["eager"].median_s / one["replayed"].median_s
    rows.append({"path": f"one text at {steps} steps: CUDA graphs against eager passes, times faster", "ours": faster, "must": 1, "aim": 1,
                 "timings": {name: asdict(timing) for name, timing in one.items()}})  # fmt: skip
    return rows


def table(rows: list[dict]) -> str:
    lines = [
        "| path | ours | textbook | ratio | goal | peak memory above the weights | goal |",
        "|---|---|---|---|---|---|---|",
    ]
    if "must" in rows[0]:
        lines = ["| path | ours | must | aim |", "|---|---|---|---|"]
    for r in rows:
        if "must" in r:
            lines.append(f"| {r['path']} | {r['ours']:.4g} | {r['must']:g} | {r['aim']:g} |")
        elif "ratio" in r:
            lines.append(f"| {r['path']} | | | {r['ratio']:.3f} | at most {r['goal']} | | |")
        else:
            memory, goal = "", ""
            if "peak_bytes" in r:
                memory = f"{r['peak_bytes'] / 1e6:.0f} MB of {r['textbook_peak_bytes'] / 1e6:.0f} MB: 1/{r['memory_ratio']:.1f}"
                memory += f"; 1/{(r['textbook_peak_bytes'] - r['gradient_bytes']) / (r['peak_bytes'] - r['gradient_bytes']):.1f} above the gradients too"
                goal = f"1/{r['memory_goal']}"
            lines.append(
                f"| {r['path']} | {r['ours_s']:.3g} s | {r['textbook_s']:.3g} s | {r['times_faster']:.2f}x | {r['goal']}x | {memory} | {goal} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--h100", action="store_true", help="the cases of the H100 table on whatever --device is"
    )
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
        print(peak(*args.peak, size))
        return
    # As for every command; the textbook's tensors are too large for it. Not where memory is
    # measured: what the allocator keeps would hide what is needed.
    prepare_process(Machine())
    started, cuda = time.monotonic(), args.h100 or torch.device(args.device).type == "cuda"
    if cuda:
        rows = on_cuda(args.device, args.tiny, args.repeats)
        note = "goals are for one H100 80GB SXM at 169M, L = 1024, bfloat16; on another device they are no measure"
    else:
        few = min(args.repeats, 3)
        rows = (
            sampling(size, few)
            + training(size, args.repeats, args.tiny)
            + tokenising(few, args.tiny)
            + overhead(size, args.repeats)
        )
        note = (
            "textbook sampling: 2 steps timed and multiplied; memory: VmHWM above VmRSS of a fresh process whose allocator gives back what is freed, "
            f"gradients ({max(r.get('gradient_bytes', 0) for r in rows) / 1e6:.0f} MB) included; "
            "tokenise: encode_batch stands under textbook"
        )
    load = os.getloadavg()[0]
    facts = {"machine": machine(args.device), "commit": commit(), "date": str(date.today()), "versions": {p: metadata.version(p) for p in ("torch", "numpy", "tokenizers")},
             "load_average": load, "seconds": time.monotonic() - started, "size": size, "note": note, "rows": rows}  # fmt: skip
    text = f"{device_name(args.device)}, {date.today()}, commit {commit()}, load {load:.1f}; {note}\n\n{table(rows)}"
    name = f"{'-'.join(device_name(args.device).replace('/', ' ').split())}-{date.today()}"
    args.output.mkdir(parents=True, exist_ok=True)
    write_json(args.output / f"{name}.json", facts)
    write_atomic(args.output / f"{name}.md", text)
    print(text)


if __name__ == "__main__":
    main()

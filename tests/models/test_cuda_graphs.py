"""Replayed passes equal eager passes.

A tape stands in for a CUDA graph: it keeps tensors, not the code that made them, and hears the host
asking.
"""

import inspect
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from small import MACHINE, done
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from halfstep.commands.distill import sdtt_loss
from halfstep.config import Distillation
from halfstep.diffusion.contracts import Draws
from halfstep.diffusion.masking import corrupt
from halfstep.diffusion.objective import nelbo
from halfstep.diffusion.plans import run_plan
from halfstep.diffusion.samplers import sample
from halfstep.diffusion.schedules import LogLinear
from halfstep.distill.rounds import Round
from halfstep.distill.targets import exact_times, reveal_substep
from halfstep.models import cuda_graphs
from halfstep.models.cuda_graphs import GraphedNetwork
from halfstep.models.denoiser import SubsDenoiser
from halfstep.models.dit import DiT

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.is_nonzero,
    aten.equal,
}  # the host would wait for the device: no graph may hold one
EMPTY = {aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty}


class Tape(TorchDispatchMode):
    """The operations of a pass on the tensors that it used.

    A replay writes each result where the first result was.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert op.overloadpacket not in WAITS, op
        out = op(*args, **(kwargs or {}))
        self.calls.append((op, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for op, args, kwargs, out in self.calls:
                if op.overloadpacket in EMPTY:
                    continue
                again = op(*args, **kwargs)
                for old, new in zip(
                    *(o if isinstance(o, tuple) else (o,) for o in (out, again)), strict=True
                ):
                    if (
                        isinstance(old, torch.Tensor)
                        and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr()
                    ):
                        old.copy_(new)


@pytest.fixture
def tapes(monkeypatch) -> list[Tape]:
    """Tapes recorded in place of CUDA graphs, on the CPU.

    As with CUDA graphs, a capture leaves the memory of the output unwritten.
    """
    made = []

    def record(run, device):
        with Tape() as tape:
            value = run()
        value.fill_(torch.nan)
        made.append(tape)
        return tape.replay, value

    monkeypatch.setattr(GraphedNetwork, "DEVICE", "cpu")
    monkeypatch.setattr(cuda_graphs, "capture_graph", record)
    return made


def denoiser(timed: bool = False) -> SubsDenoiser:
    torch.manual_seed(0)
    network = DiT(31, 32, 2, 4, dropout=0.1)
    for p in network.parameters():  # gates begin at zero: the blocks would do nothing
        torch.nn.init.normal_(p, std=0.2)
    return SubsDenoiser(network.eval().requires_grad_(False), LogLinear(), timed)


@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("timed", [False, True], ids=["blind", "timed"])
def test_any_number_of_texts_in_any_order(tapes, timed, compute):
    """Features equal those of eager passes, whatever earlier passes left in the bucket.

    Results stay unchanged after later passes; there is one capture per power of two.
    """
    eager, random = denoiser(timed), torch.Generator().manual_seed(1)
    ours, held = eager.inference_copy, []
    with torch.no_grad(), torch.autocast("cpu", compute, enabled=compute is not None):
        for B in (3, 1, 8, 4, 5, 2, 7, 6, 1, 3, 0, 8):
            x, t = torch.randint(0, 32, (B, 12), generator=random), torch.rand(B, generator=random)
            held.append((ours.features(x, t), eager.features(x, t)))
            where = torch.rand(B, 12, generator=random) < 0.3
            held += [
                (ours.features(x, t, some), eager.features(x, t, where))
                for some in (where, where.nonzero(as_tuple=True))
                if B
            ]
        for found, expected in held:
            assert found.dtype == expected.dtype and found.shape == expected.shape
            assert torch.allclose(
                found, expected, rtol=1e-5, atol=1e-5 if compute is None else 2e-2
            )
    assert len(tapes) == 4 and {key[0] for key in ours._pass.captured} == {1, 2, 4, 8}


def test_each_length_and_compute_dtype_has_its_own(tapes):
    ours, eager = denoiser().inference_copy, denoiser()
    with torch.no_grad():
        for length, compute in (
            (6, None),
            (9, None),
            (6, torch.bfloat16),
            (6, torch.float16),
            (6, None),
        ):
            x, t = torch.arange(length)[None], torch.zeros(1)
            with torch.autocast("cpu", compute, enabled=compute is not None):
                assert torch.equal(ours.features(x, t), eager.features(x, t))
    assert len(tapes) == 4


def test_weights_that_change_in_place_count(tapes):
    eager, x, t = denoiser(), torch.arange(12)[None], torch.zeros(1)
    with torch.no_grad():
        before = eager.inference_copy.features(x, t)
        for p in eager.network.parameters():
            p.mul_(1.1)
        after = eager.inference_copy.features(x, t)
        assert (
            torch.equal(after, eager.features(x, t))
            and not torch.allclose(before, after)
            and len(tapes) == 1
        )


def test_memory_made_in_inference_mode_serves_outside_of_it(tapes):
    eager, x, t = denoiser(), torch.arange(24).view(2, 12), torch.zeros(2)
    with torch.inference_mode():
        inside = eager.inference_copy.features(x, t)
    with torch.no_grad():
        assert torch.equal(eager.inference_copy.features(x, t), inside) and len(tapes) == 1


def test_what_is_not_replayed(tapes):
    """Passes with gradients, with dropout, or with too many tokens are not replayed."""
    ours, x, t = denoiser().inference_copy, torch.zeros(5, 12, dtype=torch.long), torch.zeros(5)
    ours.network.requires_grad_()
    assert ours.features(x, t).requires_grad
    with torch.no_grad():
        ours.network.train()
        assert not torch.equal(ours.features(x, t), ours.features(x, t))
        ours.network.eval()
        ours._pass.TOKENS = 8 * 12 - 1
        ours.features(x, t)
        assert not tapes
        ours._pass.TOKENS = 8 * 12
        ours.features(x, t)
    assert len(tapes) == 1


@pytest.mark.parametrize("timed", [False, True], ids=["blind", "timed"])
def test_samples_are_those_of_eager_passes(tapes, timed):
    """Texts are equal while finished texts leave the passes; a second call captures nothing."""
    one, given = denoiser(timed), torch.full((7, 10), 31)
    for i in range(7):
        given[i, : i + 3] = i
    expected = sample(one, 7, 10, 6, draws=Draws(seed=3), given=given)
    for _ in range(2):
        found = sample(one.inference_copy, 7, 10, 6, draws=Draws(seed=3), given=given)
        assert torch.equal(found.ids, expected.ids) and torch.equal(
            found.network_evaluations, expected.network_evaluations
        )
    assert len(tapes) == len(one.inference_copy._pass.captured) > 1


class Device(TorchDispatchMode):
    """The meta device as a device other than the host.

    An operation has all its tensors on one of the two, except copies. Copies to the host return
    `answers` in turn; the host cannot ask for a number or a count at all. Answers, passes of a
    network and copies to the device are noted.
    """

    def __init__(self, *answers):
        super().__init__()
        self.answers, self.notes = list(answers), []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        to = (kwargs or {}).get("device")
        if op.overloadpacket is aten._to_copy and to is not None and to != args[0].device:
            self.notes.append("answer" if to.type == "cpu" else "sent")
            return self.answers.pop(0) if to.type == "cpu" else op(*args, **kwargs)
        if op.overloadpacket is aten.embedding:
            self.notes.append("pass")
        out = op(*args, **(kwargs or {}))
        assert op.overloadpacket is not aten.index_put_ or all(
            index is None or index.dtype != torch.bool for index in args[1]
        ), "a mask is counted"
        assert (
            len(
                {
                    part.device
                    for part in tree_leaves((args, kwargs, out))
                    if isinstance(part, torch.Tensor)
                }
            )
            < 2
        ), op
        return out


@pytest.mark.parametrize("timed", [False, True], ids=["blind", "timed"])
def test_no_pass_waits_for_the_device(monkeypatch, timed):
    """The host reads the frame and the plan before the first pass; afterwards it only sends."""
    monkeypatch.setattr(
        torch, "autocast", lambda *args, **how: nullcontext()
    )  # which meta has none of
    one = denoiser(timed)
    given, plan = (
        torch.full((5, 10), 31),
        torch.randint(0, 4, (5, 10), generator=torch.Generator().manual_seed(1)),
    )
    given[:2, :3], given[4] = 7, 1
    times, u = torch.linspace(1, 0, 5)[:-1], torch.rand(5, 10, dtype=torch.float64)
    expected = run_plan(one, given, plan, times, u)
    one.network.to("meta")
    far = [tensor.to("meta") for tensor in (given, plan, times, u)]
    with Device(given, plan) as device:
        out = run_plan(one, *far)
    assert (
        out.ids.device.type == "meta"
        and expected.network_evaluations.max() == 4
        and expected.ids.max() < 31
    )
    assert (
        device.notes[:2] == ["answer", "answer"]
        and device.notes.count("answer") == 2
        and device.notes.count("pass") == 4
    )


@pytest.mark.parametrize("timed", [False, True], ids=["blind", "timed"])
def test_a_training_step_asks_nothing_of_the_device(monkeypatch, timed):
    """Masks and the substeps of the reveals are known on the host, where their noise is drawn."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **how: nullcontext())
    one, random, schedule = denoiser(timed), torch.Generator().manual_seed(2), LogLinear()
    one.network.requires_grad_().train()
    x0, t = torch.randint(0, 31, (4, 10), generator=random), torch.tensor([0.9, 0.3, 0.6, 0.8])
    u = torch.rand(3, 4, 10, generator=random, dtype=torch.float64)
    xt = corrupt(x0, t, u[0], schedule, 31)
    step_of = reveal_substep(exact_times(t.double(), 0.2, 3), 0.2, u[1], schedule).masked_fill(
        xt != 31, -1
    )
    assert {-1, 0, 1, 2, 3} == set(step_of.flatten().tolist())  # all that can be
    one.network.to("meta")
    with Device() as device:
        nelbo(one, x0, t, u[0]).backward()
    assert device.notes.count("pass") == 1 and "answer" not in device.notes
    part = {"xt": xt, "t": t, "u_reveal": u[1], "u_token": u[2]}
    with Device() as device:
        sdtt_loss(one, one, part, Round(1, 0.2, 3, 4), Distillation()).backward()
    assert device.notes.count("pass") == 4 and "answer" not in device.notes


def test_the_order_of_a_capture(monkeypatch):
    """The order that PyTorch asks for.

    Warm up on a side stream that waits for earlier work and is waited for; then record there, and
    keep the result.
    """
    events, signature = [], inspect.signature(torch.cuda.graph.__init__)

    @contextmanager
    def on(name):
        events.append(f"{name}:")
        yield
        events.append(f"end of {name}")

    def stream(name):
        return SimpleNamespace(
            name=name, wait_stream=lambda other: events.append(f"{name} waits for {other.name}")
        )

    def graph(*args, **how):
        said = signature.bind(None, *args, **how).arguments
        assert (
            said["capture_error_mode"] == "thread_local"
            and said["cuda_graph"].replay == "the replay"
        )
        return on(f"graph on {said['stream'].name}")

    fake = SimpleNamespace(
        device=lambda device: on(f"device {device}"),
        Stream=lambda: stream("side"),
        current_stream=lambda: stream("main"),
        stream=lambda given: on(given.name),
        CUDAGraph=lambda: SimpleNamespace(replay="the replay"),
        graph=graph,
    )
    monkeypatch.setattr(torch, "cuda", fake)
    replay, value = cuda_graphs.capture_graph(
        lambda: events.append("run") or len(events), torch.device("cuda", 1)
    )
    assert (replay, value) == ("the replay", 9) and events == [
        "device cuda:1:",
        "side waits for main",
        "side:",
        "run",
        "run",
        "end of side",
        "main waits for side",
        "graph on side:",
        "run",
        "end of graph on side",
        "end of device cuda:1",
    ]


def test_generate_and_latency_replay(tapes, pipeline, tmp_path):
    """`generate` and `latency` replay, and texts are the same as without."""
    line = f"generate --checkpoint {pipeline.teacher} --steps 8 --num-samples 4 --output"
    done(f"{line} {tmp_path}/texts {MACHINE}")
    assert (
        tapes
        and (tmp_path / "texts/samples.npy").read_bytes()
        == (pipeline.samples / "samples.npy").read_bytes()
    )
    tapes.clear()
    done(
        f"latency --checkpoint {pipeline.student} --baseline {pipeline.baseline} "
        f"--output {tmp_path}/rows.json --lengths 6 --batch-sizes 1 --benchmark-steps 2 "
        f"--baselines halfstep --repeats 3 --timed-dtype bfloat16 {MACHINE}"
    )
    assert len(tapes) == 1


def test_a_cpu_runs_as_ever():
    one, x, t = denoiser(), torch.arange(12)[None], torch.zeros(1)
    with torch.no_grad():
        assert (
            torch.equal(one.inference_copy.features(x, t), one.features(x, t))
            and not one.inference_copy._pass.captured
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_cuda_graphs_say_what_eager_passes_say(compute):
    one = denoiser(timed=True)
    one.network.cuda()
    held = []
    with torch.no_grad(), torch.autocast("cuda", compute, enabled=compute is not None):
        for B in (3, 1, 8, 4, 5, 2, 7, 6, 1, 3, 8):
            x, t = torch.randint(0, 32, (B, 12)).cuda(), torch.rand(B).cuda()
            rows = (torch.rand(B, 12) < 0.3).nonzero(as_tuple=True)
            rows = tuple(index.cuda() for index in rows)
            held += [
                (one.inference_copy.features(x, t), one.features(x, t)),
                (one.inference_copy.features(x, t, rows), one.features(x, t, rows)),
            ]
        for found, expected in held:
            assert torch.allclose(
                found, expected, rtol=1e-4, atol=1e-4 if compute is None else 2e-2
            )
    assert {key[0] for key in one.inference_copy._pass.captured} == {1, 2, 4, 8}

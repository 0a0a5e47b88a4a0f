"""What the calls of a graph say about one another's networks and texts."""

import pytest

from halfstep.files import write_json
from halfstep.models.flops import causal_shape, denoiser_shape
from halfstep.workflow.calls import Call, Facts, flag_lists, flag_values, teacher_of
from halfstep.workflow.networks import UnknownWork, known_network
from halfstep.workflow.rates import Rates

TEACHER, BASELINE = "results/models/t/teacher", "results/models/t/baseline"
GRAPH = [
    "prepare-corpus --output results/data/c --kind files --length 128 --vocab-size 1000",
    f"pretrain --corpus results/data/c --output {TEACHER} --size mini",
    f"generate --checkpoint {TEACHER} --output results/samples/t/teacher --num-samples 16",
    f"continue-prompts --checkpoint {TEACHER} --output results/continuations/t/teacher/steps-8 "
    "--corpus results/data/c --num-prompts 9 --prompt-tokens 12",
]


def facts(*lines: str) -> Facts:
    found = Facts()
    for line in lines or GRAPH:
        found.note(["halfstep", *line.split()])
    return found


def call(line: str, known: Facts | None = None, **options) -> Call:
    return Call(["halfstep", *line.split()], known or facts(), Rates(), **options)


def test_flags_and_their_values():
    command = "halfstep latency --lengths 16 32 --threads 8 --published --output a".split()
    expected = {"lengths": ["16", "32"], "threads": ["8"], "published": [], "output": ["a"]}
    assert flag_lists(command) == expected
    assert flag_values(command) == {"lengths": "16", "threads": "8", "output": "a"}


@pytest.mark.parametrize("folder", ["models", "samples", "continuations", "metrics", "benchmarks"])
def test_a_teacher_is_found_in_every_folder(folder):
    assert (
        teacher_of(["halfstep", "x", "--output", f"/a/results/{folder}/t-seed-2/b"]) == "t-seed-2"
    )
    assert teacher_of(["halfstep", "x", "--output", "results/data/c"]) == ""


def test_a_call_knows_its_network_and_its_texts():
    one = call(f"generate --checkpoint {TEACHER} --steps 8 16")
    assert one.network == denoiser_shape(6, 384, 1000, 128)
    assert (one.length, one.vocabulary, one.number_of_samples) == (128, 1000, 16)
    assert one.prompts == (9, 5, 62)  # 12 tokens of a prompt and 50 new ones
    assert one.values("steps") == ["8", "16"] and one.micro_batch == 32
    baseline = call(f"score-lambada --checkpoint {BASELINE}")
    assert baseline.is_baseline and baseline.network == causal_shape(6, 384, 1000)


def test_defaults_are_those_of_the_configuration():
    known = facts("prepare-corpus --output results/data/c --kind openwebtext --tokenizer gpt2",
                  f"pretrain --corpus results/data/c --output {TEACHER}")  # fmt: skip
    one = call(f"generate --checkpoint {TEACHER}", known)
    assert one.network == denoiser_shape(12, 768, 50_257, 128)
    assert (one.length, one.held_out, one.number_of_samples) == (1024, 100_000, 1024)


def test_networks_that_are_no_training_of_ours():
    known = facts(*GRAPH, f"import-baseline --source gpt2 --output {BASELINE}")
    judges = call(f"score-corpus --judge {BASELINE}/hf gpt2-large --output x", known).judges()
    assert list(judges) == [known_network("gpt2"), known_network("gpt2-large")]
    assert call(f"generate --checkpoint {BASELINE}", known).network == known_network("gpt2")[0]
    place = f"--corpus results/data/c --output {TEACHER} --size small"
    for line in (
        f"pretrain {place} --adapt gpt2",
        f"pretrain {place} --from hf:own/bert",
        f"import {place} --source hf:own/bert",
    ):
        assert call(f"generate --checkpoint {TEACHER}", facts(line)).network.condition == 0
    for line in (f"pretrain {place} --adapt {BASELINE}", f"pretrain {place} --from own/mdlm"):
        assert call(f"generate --checkpoint {TEACHER}", facts(line)).network.condition > 0


def test_a_judge_computes_as_its_weights_or_as_the_call_says():
    line = f"score-samples --judge gpt2-large meta-llama/Meta-Llama-3-8B --output {TEACHER}"
    assert [precision for _, precision in call(line).judges()] == ["float32", "bfloat16"]
    low = [precision for _, precision in call(f"{line} --precision bfloat16").judges()]
    assert low == ["bfloat16", "bfloat16"]
    full = [precision for _, precision in call(f"{line} --precision float32").judges()]
    assert full == ["float32", "bfloat16"]


def test_an_unknown_network_is_no_guess():
    with pytest.raises(UnknownWork):
        _ = call("generate --checkpoint results/models/other/teacher").network


def test_finished_corpora_and_models_are_known(tmp_path):
    split = {"windows": 7, "documents": 9}
    about = {"length": 64, "vocab_size": 300, "splits": {"validation": split}}
    write_json(tmp_path / "data/c/manifest.json", about)
    network = {"size": "tiny", "architecture": "gpt2"}
    model = {"network": network, "corpus": "c", "length": 64, "vocab_size": 300}
    write_json(tmp_path / "models/t/teacher/meta.json", model)
    for broken in ("data/d/manifest.json", "models/u/teacher/meta.json"):
        write_json(tmp_path / broken, {})
    known = Facts()
    known.note_results(tmp_path)
    one = call(f"score-lambada --checkpoint {TEACHER}", known)
    assert one.network == denoiser_shape(3, 128, 300, 0)
    assert (one.length, one.held_out, one.held_out_documents) == (64, 7, 9)


def test_bytes_of_the_files_that_exist(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    files = [str(tmp_path / "a.txt"), "results/hub.json"]
    assert call(GRAPH[0], files=files).bytes_read == 3

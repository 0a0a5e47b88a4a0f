"""Wrong uses of exported models, and hostile checkpoints and metrics for `halfstep export`."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hostile import Hostile, answer
from tokenizers import Tokenizer, models

from halfstep.checkpoint import build_network, save_checkpoint
from halfstep.config import Network
from halfstep.data.tokenizer import EOS, train_bpe
from halfstep.exported.modeling_halfstep import HalfstepConfig, HalfstepForMaskedLM

MASK = 10  # the mask token of the models below
SHAPE = {"vocab_size": MASK + 1, "hidden_dim": 8, "n_blocks": 1, "n_heads": 2, "model_length": 6}


@dataclass(frozen=True)
class Misused:
    """One wrong use of an exported model, and the sentence that it must be answered with."""

    name: str
    use: Callable[[HalfstepForMaskedLM], object]
    refused: str
    kind: str = "exported model"

    def __str__(self) -> str:
        return self.name


def ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows or [[1, MASK, 3], [4, 5, MASK]])


def call(**arguments: object):
    """A use: the model is called with these arguments; input_ids is a good one if not given."""
    return lambda model: model(**({"input_ids": ids()} | arguments))


def timed(t: object):
    """A use: a network that reads the time is called with this time."""
    config = HalfstepConfig(**SHAPE, time_conditioning=True)
    return lambda model: HalfstepForMaskedLM(config)(ids(), t=t)


def draw(**arguments: object):
    return lambda model: model.sample(**({"steps": 2} | arguments))


def config(**changes: object):
    return lambda model: HalfstepConfig(**(SHAPE | changes))


def attention(name: str):
    make = HalfstepForMaskedLM._from_config
    return lambda model: make(HalfstepConfig(**SHAPE), attn_implementation=name)


ONES = torch.ones(2, 3)
MISUSED = [
    # input_ids
    Misused("no input_ids", lambda model: model(), "missing 1 required .* 'input_ids'"),
    Misused("input_ids None", call(input_ids=None), "input_ids: found NoneType"),
    Misused("ids in a list", call(input_ids=[[1, 2]]), "input_ids: found list"),
    Misused("ids of one text", call(input_ids=ids()[0]), r"found torch.int64 \[3\].*batch of one"),
    Misused("three dimensions", call(input_ids=ids()[None]), r"found torch.int64 \[1, 2, 3\]"),
    Misused("ids of no tokens", call(input_ids=ids()[:, :0]), r"found torch.int64 \[2, 0\]"),
    Misused("float ids", call(input_ids=ONES), r"found torch.float32 \[2, 3\]"),
    Misused("bool ids", call(input_ids=ONES.bool()), r"found torch.bool \[2, 3\]"),
    Misused("a negative id", call(input_ids=ids([1, -1])), "found token -1, expected 0 to 10"),
    Misused("an id too large", call(input_ids=ids([1, 11])), "found token 11, expected 0 to 10"),
    # attention_mask
    Misused("a longer mask", call(attention_mask=torch.ones(2, 4)), r"float32 \[2, 4\], expected"),
    Misused("one row of a mask", call(attention_mask=torch.ones(3)), r"float32 \[3\], expected"),
    Misused(
        "a mask of pairs",
        call(attention_mask=torch.zeros(2, 1, 3, 3)),
        r"attention_mask: found torch.float32 \[2, 1, 3, 3\], expected \[2, 3\]",
    ),
    Misused(
        "an additive mask",
        call(attention_mask=torch.tensor([[0, 0, -torch.inf]] * 2)),
        "attention_mask: found values other than 0 and 1",
    ),
    Misused(
        "a mask that counts texts",
        call(attention_mask=torch.tensor([[1, 2, 2]] * 2)),
        "attention_mask: found values other than 0 and 1",
    ),
    Misused("a mask of NaN", call(attention_mask=ONES * torch.nan), "other than 0 and 1"),
    Misused("a mask in a list", call(attention_mask=[[1, 1, 0]] * 2), "mask: found list"),
    # labels
    Misused("labels of another shape", call(labels=ids()[:, :2]), r"labels: found .*\[2, 2\]"),
    Misused("float labels", call(labels=ONES), "labels: found torch.float32"),
    Misused("a label too large", call(labels=ids() + 8), "labels: found token 18"),
    Misused("a label -1", call(labels=ids() * 0 - 1), "labels: found token -1, expected -100"),
    Misused("the mask as a label", call(labels=ids() * 0 + MASK), "of probability 0.*-100"),
    Misused("another visible token", call(labels=ids() * 0 + 7), "mask_replace_prob=1"),
    # t
    Misused("a number as time", timed(0.5), "t: found float, expected"),
    Misused("one time for two texts", timed(torch.tensor([0.5])), r"t: found .*\[1\], expected"),
    Misused("whole times", timed(torch.tensor([0, 1])), "t: found torch.int64"),
    Misused("a time in steps", timed(torch.tensor([8.0, 4.0])), r"t: found \[8.0, 4.0\]"),
    Misused("a time NaN", timed(torch.tensor([0.5, torch.nan])), r"t: found \[0.5, nan\]"),
    # keywords
    Misused("inputs_embeds", call(inputs_embeds=ONES), "unexpected keyword .*'inputs_embeds'"),
    Misused("token_type_ids", call(token_type_ids=ids()), "unexpected keyword"),
    Misused("output_attentions", call(output_attentions=True), "unexpected keyword"),
    Misused("a misspelled keyword", call(atention_mask=ONES), "unexpected .*'atention_mask'"),
    Misused("a sampler's option", draw(temperature=0.5), "unexpected keyword .*'temperature'"),
    # attention
    Misused("flash attention", attention("flash_attention_2"), "found 'flash_attention_2'"),
    Misused("an unknown attention", attention("fast"), "found 'fast', expected one of sdpa, eager"),
    Misused(
        "flex attention later",
        lambda model: model.set_attn_implementation("flex_attention"),
        "found 'flex_attention', expected one of sdpa, eager",
    ),
    # sample
    Misused("no steps", draw(steps=0), "steps: found 0"),
    Misused("half a step", draw(steps=2.5), "steps: found 2.5"),
    Misused("no samples", draw(num_samples=0), "found 0, 6, expected whole numbers from 1"),
    Misused("a negative length", draw(length=-1), "found 1, -1, expected"),
    Misused(
        "another number of samples",
        draw(num_samples=3, input_ids=ids()),
        r"found shape \[2, 3\], expected .*\[3, None\]",
    ),
    Misused("a text to fill in too large", draw(input_ids=ids() + 1), "found token 11"),
    # configuration
    Misused("heads that do not divide", config(n_heads=3), "hidden_dim: found 8, expected a mult"),
    Misused("no heads", config(n_heads=0), "n_heads: found 0, expected a whole number"),
    Misused("a width in words", config(hidden_dim="8"), "hidden_dim: found '8'"),
    Misused("another mask token", config(mask_token_id=3), "mask_token_id: found 3, expected 10"),
    Misused("an unknown schedule", config(schedule="sqrt"), "schedule: found 'sqrt', expected one"),
    # embeddings
    Misused(
        "more tokens", lambda model: model.resize_token_embeddings(12), "found 12, expected 11"
    ),
    Misused(
        "a table of another width",
        lambda model: model.set_input_embeddings(torch.nn.Embedding(11, 4)),
        r"embeddings: found shape \[11, 4\], expected \[11, 8\]",
    ),
]


def tokenizer_of(folder: Path, change: Callable[[dict], object] = lambda about: None) -> Path:
    about = json.loads(train_bpe(["the cat sat on the mat"], 280).to_str())
    change(about)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(about))
    return path


def checkpoint(
    folder: Path,
    change: Callable[[dict], object] = lambda about: None,
    kind: str = "diffusion",
    **meta: object,
) -> None:
    """Write a small checkpoint, models/teacher; `change` edits its tokenizer.json."""
    path = tokenizer_of(folder, change)
    tokens = Tokenizer.from_file(str(path))
    facts = {
        "kind": kind,
        "network": Network(size="tiny").model_dump(),
        "vocab_size": max(tokens.get_vocab().values()) + 1,
        "eos_id": tokens.token_to_id(EOS),
        "length": 8,
        "round": 0,
        **meta,
    }
    state = build_network(facts).state_dict()
    save_checkpoint(folder / "models/teacher", {"ema.safetensors": state}, facts, path)


def metrics(value: object):
    def make(folder: Path) -> None:
        checkpoint(folder)
        (folder / "rows.json").write_text(json.dumps(value))

    return make


def row(folder: Path, **changes: object) -> dict:
    meta = json.loads((folder / "models/teacher/meta.json").read_text())
    digest = meta["sha256"]["ema.safetensors"][:16]
    return {"model": "teacher", "checkpoint": digest, "metric": "entropy", **changes}


def a_row_that_draws(folder: Path) -> None:
    checkpoint(folder, corpus="a\n# b | c")
    rows = [row(folder, judge="x\n\x1b[2J|y", value=float("1e308"), data="a\r\n| b |")]
    (folder / "rows.json").write_text(json.dumps(rows))


def each_line_is_a_row(folder: Path) -> None:
    card = (folder / "out/README.md").read_text()
    assert "\x1b" not in card
    (line,) = [line for line in card.splitlines() if line.startswith("| entropy")]
    assert r"x  [2J\|y" in line
    assert r"| corpus | a # b \| c |" in card


def put_a_hole(about: dict) -> None:
    about["model"]["vocab"]["hole"] = 400


def take_the_name(about: dict) -> None:
    about["model"]["vocab"]["<|mask|>"] = len(about["model"]["vocab"])


def a_unigram(about: dict) -> None:
    vocabulary = [(EOS, 0.0), ("a", -1.0), ("b", -2.0)]
    about.update(json.loads(Tokenizer(models.Unigram(vocabulary)).to_str()))


def mask_is_last(folder: Path) -> None:
    """The exported tokenizer gives the mask token the last id of the model."""
    config = json.loads((folder / "out/config.json").read_text())
    name = json.loads((folder / "out/tokenizer_config.json").read_text())["mask_token"]["content"]
    tokens = Tokenizer.from_file(str(folder / "out/tokenizer.json"))
    assert tokens.token_to_id(name) == config["mask_token_id"] == config["vocab_size"] - 1


def output_is(folder: Path, make: Callable[[Path], object]) -> None:
    checkpoint(folder)
    make(folder / "out")


def export(*words: str) -> list[str]:
    return ["export", "--checkpoint", "models/teacher", "--output", "out", *words]


EXPORT = "halfstep export"
WITH_ROWS = export("--metrics", "rows.json")
NO_ROWS = "rows.json: (expected a list of metric rows|row 1: )"
EXPORTS = [
    Hostile(EXPORT, "metrics are an object", metrics({"metric": 1}), WITH_ROWS, NO_ROWS),
    Hostile(EXPORT, "metrics are numbers", metrics([1, 2]), WITH_ROWS, NO_ROWS),
    Hostile(EXPORT, "metrics are null", metrics(None), WITH_ROWS, NO_ROWS),
    Hostile(EXPORT, "a row without metric", metrics([{"value": 1}]), WITH_ROWS, NO_ROWS),
    Hostile(EXPORT, "signs that end a row", a_row_that_draws, WITH_ROWS, None, each_line_is_a_row),
    Hostile(
        EXPORT,
        "a hole in the ids",
        lambda folder: checkpoint(folder, put_a_hole),
        export(),
        None,
        mask_is_last,
    ),
    Hostile(
        EXPORT,
        "a token of the mask's name",
        lambda folder: checkpoint(folder, take_the_name),
        export(),
        None,
        mask_is_last,
    ),
    Hostile(
        EXPORT,
        "a unigram tokenizer",
        lambda folder: checkpoint(folder, a_unigram),
        export(),
        None,
        mask_is_last,
    ),
    Hostile(
        EXPORT,
        "EOS in a hole of the ids",
        lambda folder: checkpoint(folder, put_a_hole, eos_id=350),
        export(),
        "eos_id: found 350, .*no token with this id",
    ),
    Hostile(
        EXPORT,
        "an autoregressive model",
        lambda folder: checkpoint(folder, kind="autoregressive"),
        export(),
        "is autoregressive; transformers loads its hf/ folder",
    ),
    Hostile(EXPORT, "no best weights", checkpoint, export("--weights", "best"), "best.safetensors"),
    Hostile(
        EXPORT,
        "output is a file",
        lambda folder: output_is(folder, Path.touch),
        export(),
        "out.*(a part of the path is a file|there is a file where a folder is needed)",
    ),
    Hostile(
        EXPORT,
        "config.json is a folder",
        lambda folder: output_is(folder, lambda out: (out / "config.json").mkdir(parents=True)),
        export(),
        "config.json.*there is a folder where a file is needed",
    ),
    Hostile(
        EXPORT,
        "a name that no hub has",
        checkpoint,
        export("--push", "../up"),
        r"--push ../up: the upload failed \(HFValidationError",
    ),
]
CASES = [*MISUSED, *EXPORTS]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    new = HalfstepForMaskedLM(HalfstepConfig(**SHAPE)).eval()
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.normal_(std=0.1)
    return new


@pytest.mark.parametrize("case", MISUSED, ids=str)
def test_a_wrong_use_is_one_sentence_and_changes_nothing(case, model):
    x = ids()
    before = model(x).logits
    with pytest.raises((ValueError, TypeError), match=case.refused) as raised:
        case.use(model)
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 600
    assert torch.equal(model(x).logits, before)
    assert torch.equal(x, ids())


@pytest.mark.parametrize("case", EXPORTS, ids=str)
def test_an_export_is_answered(case, tmp_path):
    folder = tmp_path / "input"
    folder.mkdir()
    answer(case, folder)

"""Hostile folders: checkpoints, corpora, samples, metric rows and journals of strangers."""

import functools
import io
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import Hostile, answer
from safetensors.torch import load_file, save, save_file
from small import CORPUS, MACHINE, TRAINING, done

from halfstep.files import sha256

CPU = "--device cpu --threads 1"
GENERATE = f"generate --checkpoint model --output out --steps 2 --num-samples 1 {CPU}"
ROUND_1 = f"distill-round --teacher model --corpus corpus --output out/round-1 --round 1 {CPU}"
ROUND_2 = f"distill-round --teacher model --corpus corpus --output out/round-2 --round 2 {CPU}"
PRETRAIN = f"pretrain --corpus corpus --output out/t --size tiny {TRAINING} {MACHINE}"
SCORE = f"score-samples --samples samples --corpus corpus --judge gone --output out/a.json {CPU}"
CONTINUED = SCORE.replace("score-samples", "score-continuations")
TABULATE = "tabulate --table steps --metrics rows.json --output out/steps.csv"
CURVES = "plot --figure loss_curves --tables results --output out/curves.pdf"
PLOT = "plot --figure ppl_vs_steps --tables steps.csv --output out/figure.pdf"


@functools.cache
def whole() -> Path:
    """A corpus, a model of it and its samples, made once by the real commands."""
    folder = Path(tempfile.mkdtemp())
    done(f"prepare-corpus --output {folder}/corpus {CORPUS} --workers 1")
    training = f"--size tiny {TRAINING} {MACHINE}"
    done(f"pretrain --corpus {folder}/corpus --output {folder}/model {training}")
    writing = f"--steps 4 --num-samples 2 {MACHINE}"
    done(f"generate --checkpoint {folder}/model --output {folder}/samples {writing}")
    return folder


@pytest.fixture(scope="module", autouse=True)
def removed():
    yield
    if whole.cache_info().currsize:
        shutil.rmtree(whole())


def spoiled(*parts: str, spoil):
    """make(folder) of a case: copies of these parts; `spoil` changes the first one."""

    def make(folder: Path) -> None:
        for part in parts:
            shutil.copytree(whole() / part, folder / part)
        spoil(folder / parts[0])

    return make


def rewrite(folder: Path, change=lambda meta: None) -> None:
    """Change meta.json, and make its checksums right again, as its author can."""
    meta = json.loads((folder / "meta.json").read_text())
    files = [folder / name for name in meta["sha256"]]
    meta["sha256"] = {file.name: sha256(file) for file in files if file.is_file()}
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


def meta(command: str = GENERATE, /, **changes):
    """(make, command) of a checkpoint with other values in its meta.json."""
    return spoiled(
        "model", "corpus", spoil=lambda folder: rewrite(folder, lambda found: found.update(changes))
    ), command


def without(key: str, command: str):
    return spoiled(
        "model", "corpus", spoil=lambda folder: rewrite(folder, lambda found: found.pop(key))
    ), command


def content(name: str, data: bytes):
    """(make, command) of a checkpoint in which a file holds these bytes, with its checksum."""

    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(data)
        if name != "meta.json":
            rewrite(folder)

    return spoiled("model", spoil=spoil), GENERATE


def replaced(name: str, place):
    """(make, command) of a checkpoint in which something else is in the place of a file."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        place(folder / name)

    return spoiled("model", spoil=spoil), GENERATE


def weights(change, name: str = "ema.safetensors", command: str = GENERATE):
    """(make, command) of a checkpoint with other tensors, and their checksum."""

    def spoil(folder: Path) -> None:
        state = load_file(folder / name)
        save_file(change(state) or state, folder / name)
        rewrite(folder)

    return spoiled("model", "corpus", spoil=spoil), command


def huge(path: Path, size: int = 1 << 40) -> None:
    """A file that says it has a terabyte, and takes no space."""
    with open(path, "wb") as file:
        file.truncate(size)


def cast(dtype: torch.dtype):
    return lambda state: {name: value.to(dtype) for name, value in state.items()}


def one(name: str, value: torch.Tensor):
    return lambda state: state.update({name: value})


def header(text: str, data: int = 0) -> bytes:
    """A safetensors file with this header, and zeros after it."""
    return len(text).to_bytes(8, "little") + text.encode() + bytes(data)


OVERLAP = (
    '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    '"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}'
)
CLAIM = '{"a":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,8]}}'
DEEP = b"[" * 200_000 + b"]" * 200_000
NOT_WHOLE = "ema.safetensors: not a complete safetensors file"
TOO_LARGE = r"[0-9,]{15,} bytes, but such a file has at most"

CHECKPOINTS = {  # name: ((make, command), words of the answer)
    "vocab_size true": (meta(vocab_size=True), "vocab_size: found True: "),
    "vocab_size 10^18": (meta(vocab_size=10**18), "vocab_size: found 1000000000000000000: "),
    "vocab_size 2 billion": (meta(vocab_size=2**31 - 2), r"has shape \[301"),
    "vocab_size below 0": (meta(vocab_size=-3), "vocab_size: found -3"),
    "vocab_size with a point": (meta(vocab_size=300.5), "vocab_size: found 300.5"),
    "a frame beyond the vocabulary": (
        meta(framing={"begin": [300], "end": []}),
        "framing: found the token 300, but vocab_size is 300",
    ),
    "a frame that leaves no room": (
        meta(framing={"begin": [0] * 30, "end": []}),
        "framing: found 30 tokens around a text, but length is 24",
    ),
    "a turn of numbers": (meta(pairs={"before": 3}), "pairs.before"),
    "eos_id beyond the vocabulary": (meta(eos_id=300), "eos_id: found 300, but vocab_size is 300"),
    "eos_id below 0": (meta(eos_id=-1), "eos_id: found -1"),
    "eos_id as text": (meta(eos_id="0"), "eos_id: found '0'"),
    "length 0": (meta(length=0), "length: found 0"),
    "length below 0": (meta(length=-24), "length: found -24"),
    "length of a billion": (meta(length=10**9), "length: found 1000000000"),
    "length null": (meta(length=None), "length: found None"),
    "sha256 of a number": (meta(sha256={"x": 5}), "sha256.x: found 5"),
    "sha256 a list": (meta(sha256=["x"]), "sha256: found .'x'."),
    "sha256 cut": (meta(sha256={"ema.safetensors": "abc"}), "sha256.ema.safetensors: found 'abc'"),
    "sha256 of other names": (
        meta(sha256={f"../../{'x' * 50_000}": "0" * 64}),
        "has no tokenizer.json; it holds ",
    ),
    "a small folder that says 8B": (meta(network={"size": "8B"}), "missing tensors, the first is"),
    "network a list": (meta(network=["tiny"]), "network: found .'tiny'."),
    "network of an unknown key": (meta(network={"size": "tiny", "depth": 3}), "unknown key"),
    "network of an unknown schedule": (meta(network={"schedule": "zero"}), "network.schedule"),
    "kind a list": (meta(kind=["diffusion"]), "kind: found"),
    "kind of the other network": (meta(kind="autoregressive"), "tensors, the first is"),
    "format true": (meta(format=True), "format True, but this halfstep reads format 1"),
    "format nested": (meta(format=[[[[[[[[[1]]]]]]]]]), r"format \[\[\[.*reads format 1"),
    "round as text": (meta(ROUND_2, round="one"), "round: found 'one'"),
    "training as text": (meta(ROUND_1, training="long"), "training: found 'long'"),
    "min_t as text": (meta(ROUND_1, training={"min_t": "0"}), "training.min_t: found '0'"),
    "min_t above 1": (meta(ROUND_1, training={"min_t": 7.0}), "training.min_t: found 7.0"),
    "without training": (without("training", ROUND_1), "has no training.min_t"),
    "without ema_updates": (without("ema_updates", ROUND_1), "or no ema_updates"),
    "without a round": (without("round", ROUND_1), "is of round None"),
    "meta.json empty": (content("meta.json", b""), "meta.json: not valid JSON"),
    "meta.json a number": (content("meta.json", b"7"), "meta.json: format 7"),
    "meta.json null": (content("meta.json", b"null"), "meta.json: format None"),
    "meta.json with NaN": (meta(length=float("nan")), "nan is not a finite number"),
    "meta.json with a key twice": (
        content("meta.json", b'{"format": 1, "length": 8, "length": 9}'),
        "the key 'length' is given twice",
    ),
    "meta.json deep": (content("meta.json", DEEP), "meta.json: not valid JSON .too deeply nested"),
    "meta.json not UTF-8": (content("meta.json", b'{"format": "\xff"}'), "can't decode byte 0xff"),
    "meta.json UTF-16": (
        content("meta.json", '{"format": 1}'.encode("utf-16")),
        "meta.json: not valid JSON",
    ),
    "meta.json of a terabyte": (replaced("meta.json", huge), "expected a JSON file of at most"),
    "meta.json a folder": (replaced("meta.json", Path.mkdir), "meta.json: found a folder"),
    "meta.json a pipe": (replaced("meta.json", os.mkfifo), "meta.json: found a pipe"),
    "meta.json a loop of links": (
        replaced("meta.json", lambda path: path.symlink_to("meta.json")),
        "meta.json is missing",
    ),
    "meta.json a device": (
        replaced("meta.json", lambda path: path.symlink_to("/dev/zero")),
        "meta.json: found a pipe or a device",
    ),
    "tokenizer.json cut": (content("tokenizer.json", b'{"version": "1.0", '), "tokenizer.json"),
    "tokenizer.json deep": (content("tokenizer.json", DEEP), "tokenizer.json cannot be read"),
    "tokenizer.json a list": (content("tokenizer.json", b"[1]"), "tokenizer.json cannot be read"),
    "tokenizer.json not UTF-8": (content("tokenizer.json", b"\xff\xfe{}"), "tokenizer.json"),
    "tokenizer.json a pipe": (replaced("tokenizer.json", os.mkfifo), "found a pipe or a device"),
    "tokenizer.json a folder": (replaced("tokenizer.json", Path.mkdir), "found a folder"),
    "tokenizer.json of a terabyte": (replaced("tokenizer.json", huge), TOO_LARGE),
    "weights true or false": (weights(cast(torch.bool)), "holds BOOL, expected floating-point"),
    "weights whole numbers": (weights(cast(torch.int64)), "holds I64, expected floating-point"),
    "weights of 8 bits": (weights(cast(torch.int8)), "holds I8, expected floating-point"),
    "weights infinite": (
        weights(one("rotary_emb.inv_freq", torch.full((8,), torch.inf))),
        "rotary_emb.inv_freq holds NaN or infinity",
    ),
    "weights transposed": (
        weights(lambda state: {k: v.T.contiguous() for k, v in state.items() if v.ndim == 2}),
        "missing tensors",
    ),
    "weights of no dimension": (
        weights(one("rotary_emb.inv_freq", torch.tensor(1.0))),
        r"rotary_emb.inv_freq has shape \[\], but",
    ),
    "one tensor with a name of 100,000 letters": (
        weights(one("x" * 100_000, torch.ones(1))),
        "1 unknown tensors, the first is xxx",
    ),
    "weights pickled": (content("ema.safetensors", b"\x80\x02}q\x00." * 20), NOT_WHOLE),
    "weights empty": (content("ema.safetensors", b""), NOT_WHOLE),
    "a header of 2^63 bytes": (content("ema.safetensors", b"\xff" * 7 + b"\x7f{}"), NOT_WHOLE),
    "a header that is no JSON": (content("ema.safetensors", header("{" * 64)), NOT_WHOLE),
    "a shape of 10^18": (content("ema.safetensors", header(CLAIM, 8)), NOT_WHOLE),
    "tensors that overlap": (content("ema.safetensors", header(OVERLAP, 12)), NOT_WHOLE),
    "no tensors": (content("ema.safetensors", save({})), "0 tensors, but 3 blocks"),
    "weights a pipe": (replaced("ema.safetensors", os.mkfifo), "found a pipe or a device"),
    "weights a folder": (replaced("ema.safetensors", Path.mkdir), "found a folder"),
    "weights of a terabyte": (replaced("ema.safetensors", huge), TOO_LARGE),
    "an average with NaN for a round": (
        weights(one("rotary_emb.inv_freq", torch.full((8,), torch.nan)), command=ROUND_1),
        "rotary_emb.inv_freq holds NaN or infinity",
    ),
}


def as_second_teacher(change):
    """(make, command) of a first round's student with another optimizer state."""

    def spoil(folder: Path) -> None:
        name = "optimizer.safetensors"
        state = load_file(folder / name)
        change(state)
        save_file(state, folder / name)
        rewrite(folder, lambda found: found.update(round=1))

    return spoiled("model", "corpus", spoil=spoil), f"{ROUND_2} --rounds 2 --teacher-steps 16"


CHECKPOINTS |= {
    "moments of other shapes": (
        as_second_teacher(one("exp_avg:blocks.0.norm1.weight", torch.ones(3))),
        r"exp_avg:blocks.0.norm1.weight has shape \[3\]",
    ),
    "moments of a parameter missing": (
        as_second_teacher(lambda state: state.pop("step:blocks.0.norm1.weight")),
        "1 missing tensors, the first is step:blocks.0.norm1.weight",
    ),
}


def manifest(command: str = PRETRAIN, /, **changes):
    """(make, command) of a corpus with other values in its manifest."""

    def spoil(folder: Path) -> None:
        found = json.loads((folder / "manifest.json").read_text())
        found.update(changes)
        (folder / "manifest.json").write_text(json.dumps(found))

    return spoiled("corpus", spoil=spoil), command


def of_corpus(name: str, place):
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        place(folder / name)

    return spoiled("corpus", spoil=spoil), PRETRAIN


def false_tokens(folder: Path) -> None:
    """Tokens beyond the vocabulary, with the checksum in the manifest."""
    found = json.loads((folder / "manifest.json").read_text())
    tokens = np.fromfile(folder / "train.bin", found["dtype"])
    tokens[5:] = 60_000
    tokens.tofile(folder / "train.bin")
    found["splits"]["train"]["sha256"] = sha256(folder / "train.bin")
    (folder / "manifest.json").write_text(json.dumps(found))


def text_of(name: str, text: bytes):
    return of_corpus(name, lambda path: path.write_bytes(text))


SPLIT = {"windows": 5, "sha256": "0" * 64}
CORPORA = {
    "length 0": (manifest(length=0), "length: found 0"),
    "length of a billion": (manifest(length=10**9), "length: found 1000000000"),
    "objects as tokens": (manifest(dtype="O"), "dtype: found 'O'"),
    "a dtype that is a list": (manifest(dtype=["uint16"]), "dtype: found"),
    "10^15 windows": (
        manifest(splits={"train": SPLIT | {"windows": 10**15}, "validation": SPLIT}),
        "train.bin: found [0-9]+ bytes, expected 48000000000000000",
    ),
    "windows below 0": (manifest(splits={"train": SPLIT | {"windows": -1}}), "train.windows"),
    "splits a list": (manifest(splits=[SPLIT]), "splits: found"),
    "a split that is a number": (manifest(splits={"train": 5}), "splits.train: found 5"),
    "no split": (manifest(splits={}), "no split 'train'"),
    "sha256 a number": (
        manifest(splits={"train": {"windows": 1, "sha256": 5}}),
        "splits.train.sha256: found 5",
    ),
    "eos_id beyond the vocabulary": (manifest(eos_id=300), "eos_id: found 300"),
    "a frame beyond the vocabulary": (
        manifest(framing={"begin": [], "end": [300]}),
        "framing: found the token 300",
    ),
    "pairs without their starts": (
        manifest(pairs={"before": "", "after": "", "end": ""}),
        "run halfstep prepare-corpus again",
    ),
    "vocab_size as text": (manifest(vocab_size="300"), "vocab_size: found '300'"),
    "format nested": (manifest(format={"a": [1]}), "format is .*, expected 1"),
    "NaN": (manifest(length=float("nan")), "nan is not a finite number"),
    "manifest deep": (text_of("manifest.json", DEEP), "too deeply nested"),
    "manifest not UTF-8": (text_of("manifest.json", b"\xff"), "can't decode byte 0xff"),
    "manifest a pipe": (of_corpus("manifest.json", os.mkfifo), "found a pipe or a device"),
    "manifest a folder": (of_corpus("manifest.json", Path.mkdir), "found a folder"),
    "tokens a pipe": (of_corpus("train.bin", os.mkfifo), "train.bin: found 0 bytes"),
    "tokens of a terabyte": (of_corpus("train.bin", huge), "train.bin: found 1099511627776 bytes"),
    "tokens beyond the vocabulary": (
        (spoiled("corpus", spoil=false_tokens), PRETRAIN),
        "train.bin: holds token 60000, but vocab_size in manifest.json is 300",
    ),
}


def facts(command: str = SCORE, /, **changes):
    """(make, command) of samples with other values in samples.json."""

    def spoil(folder: Path) -> None:
        found = json.loads((folder / "samples.json").read_text())
        found.update(changes)
        (folder / "samples.json").write_text(json.dumps(found))

    return spoiled("samples", "corpus", spoil=spoil), command


def array(write, command: str = SCORE, /, **changes):
    """(make, command) of samples with another samples.npy, and its checksum."""

    def spoil(folder: Path) -> None:
        file = folder / "samples.npy"
        file.unlink()
        write(file)
        found = json.loads((folder / "samples.json").read_text())
        if file.is_file():
            found["sha256"] = sha256(file)
        (folder / "samples.json").write_text(json.dumps(found | changes))

    return spoiled("samples", "corpus", spoil=spoil), command


def array_of(value):
    return array(lambda file: np.save(file, value, allow_pickle=True))


def array_header(text: str):
    """An array with this header, and the bytes of 48 numbers."""
    head = text.encode().ljust(117) + b"\n"
    start = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little")
    return array(lambda file: file.write_bytes(start + head + bytes(192)))


FALSE_SHAPE = "{'descr': '<i4', 'fortran_order': False, 'shape': (1000000000000, 24), }"


def several_arrays() -> bytes:
    written = io.BytesIO()
    np.savez(written, a=np.zeros(2))
    return written.getvalue()


PROMPTS = {
    "num_prompts": 2,
    "per_prompt": 2,
    "prompt_tokens": 4,
    "continuation_tokens": 4,
    "document_tokens": 8,
}


def rows(*found, command: str = TABULATE):
    """(make, command) of a file with these metric rows."""
    return lambda folder: (folder / "rows.json").write_text(json.dumps(list(found))), command


ROW = {
    "metric": "entropy",
    "protocol": "unigram",
    "version": 1,
    "value": 1.0,
    "low": 0.9,
    "high": 1.1,
    "model": "t/teacher",
    "teacher": "t",
    "run": "teacher",
    "round": 0,
    "steps": 8,
}


def journal(run: object, lines: str = ""):
    """(make, command) of results with one journal."""

    def make(folder: Path) -> None:
        place = folder / "results/models/t/teacher"
        place.mkdir(parents=True)
        text = run if isinstance(run, str) else json.dumps(run)
        (place / "run.json").write_text(text)
        (place / "journal.jsonl").write_text(lines)

    return make, CURVES


RUN = {
    "name": "teacher",
    "node": "pretrain/t",
    "fingerprint": "f",
    "started": 1.7e9,
    "status": "finished",
    "params": {},
    "tags": {},
    "datasets": [],
    "artifacts": [],
    "checkpoint": None,
}


def record(outputs: object):
    """(make, command) of results with one record of provenance."""

    def make(folder: Path) -> None:
        (folder / "results").mkdir()
        found = {"format": 1, "outputs": outputs, "inputs": {}}
        (folder / "results/a.provenance.json").write_text(json.dumps(found))

    return make, "verify results"


def table(text: bytes):
    return lambda folder: (folder / "steps.csv").write_bytes(text), PLOT


def of_hub(text: str):
    command = "fetch --repositories model:a --output hub.json"
    return lambda folder: (folder / "hub.json").write_text(text), command


SAMPLES = {
    "sha256 a list": (facts(sha256=[]), "sha256: found"),
    "steps as text": (facts(steps="8"), "steps: found '8'"),
    "steps 0": (facts(steps=0), "steps: found 0"),
    "a model that is a number": (facts(model=5), "model: found 5"),
    "a model without a name": (facts(model="//"), "model: found '//'"),
    "a checkpoint that is null": (facts(checkpoint=None), "checkpoint: found None"),
    "NaN": (facts(network_evaluations=float("nan")), "nan is not a finite number"),
    "a vocabulary that is a list": (facts(vocabulary=[1]), "vocabulary: found"),
    "pickled objects": (array_of(np.array([[object()]])), "samples.npy: no array"),
    "floats": (array_of(np.zeros((2, 24))), "found float64, expected one array of int32"),
    "numbers of 64 bits": (array_of(np.zeros((2, 24), np.uint64)), "found uint64"),
    "big-endian numbers": (array_of(np.zeros((2, 24), ">i4")), "found >i4"),
    "records": (array_of(np.zeros(2, [("a", np.int32)])), "samples.npy: found"),
    "several arrays": (
        array(lambda file: file.write_bytes(several_arrays())),
        "found several arrays",
    ),
    "a shape of 10^12 texts": (array_header(FALSE_SHAPE), "samples.npy: no array"),
    "a header that does not end": (array_header(FALSE_SHAPE[:-2]), "samples.npy: no array"),
    "a header that is a call": (array_header("exit(0)"), "samples.npy: no array"),
    "an empty file": (array(Path.touch), "samples.npy: no array"),
    "text instead of an array": (array(lambda file: file.write_text("x" * 999)), "no array"),
    "samples a pipe": (array(os.mkfifo), "samples.npy: found a pipe"),
    "samples a folder": (array(Path.mkdir), "samples.npy: found a folder"),
    "texts of one dimension": (array_of(np.zeros(24, np.int32)), r"an array of shape \[24\]"),
    "no prompts": (facts(CONTINUED), "samples without prompts"),
    "prompts a list": (facts(CONTINUED, prompts=[4, 4]), "prompts: "),
    "prompts as text": (facts(CONTINUED, prompts=PROMPTS | {"per_prompt": "two"}), "per_prompt"),
    "an unknown key of prompts": (facts(CONTINUED, prompts=PROMPTS | {"x": 1}), "unknown key"),
    "a billion prompts": (
        facts(CONTINUED, prompts=PROMPTS | {"num_prompts": 10**9}),
        r"texts of shape \[2, 24\], but its prompts need \[2000000000, 8\]",
    ),
    "continuations of another shape": (
        facts(CONTINUED, prompts=PROMPTS),
        r"texts of shape \[2, 24\], but its prompts need \[4, 8\]",
    ),
    "a row without a model": (rows({"metric": "entropy", "value": 1}), "expected a list of metric"),
    "a row that is a number": (rows(ROW, 5), "expected a list of metric rows"),
    "a metric that is a list": (rows(ROW | {"metric": ["entropy"]}), "row 1: metric: found"),
    "a value as text": (rows(ROW, ROW | {"value": "low"}), "row 2: value: found 'low'"),
    "a value true": (rows(ROW | {"value": True}), "row 1: value: found True"),
    "a value of 10^999": (
        (lambda folder: (folder / "rows.json").write_text('[{"value": 1e999}]'), TABULATE),
        "inf is not a finite number",
    ),
    "steps in words": (rows(ROW | {"steps": "eight"}), "row 1: steps: found 'eight'"),
    "a round of 10^19": (rows(ROW | {"round": 10**19}), "row 1: round: found"),
    "a teacher that is a list": (rows(ROW | {"teacher": ["t"]}), "row 1: teacher: found"),
    "rows in a pipe": (
        (lambda folder: os.mkfifo(folder / "rows.json"), TABULATE),
        "rows.json: found a pipe",
    ),
    "rows deep": (
        (lambda folder: (folder / "rows.json").write_bytes(DEEP), TABULATE),
        "too deeply nested",
    ),
    "run.json a list": (journal([1]), "run.json: "),
    "run.json without a name": (
        journal({key: value for key, value in RUN.items() if key != "name"}),
        "run.json: name: found nothing",
    ),
    "run.json that began in words": (journal(RUN | {"started": "soon"}), "started: found 'soon'"),
    "run.json of no status": (journal(RUN | {"status": "lost"}), "status: found 'lost'"),
    "run.json with a checkpoint of numbers": (
        journal(RUN | {"checkpoint": {"folder": ".", "sha256": {"ema": 5}}}),
        "checkpoint.sha256.ema: found 5",
    ),
    "run.json cut": (journal('{"name": "t'), "run.json: not valid JSON"),
    "a journal with a broken line": (journal(RUN, '{"step": 1\n{}\n'), "journal.jsonl:1: not a"),
    "a record with a number as checksum": (record({"x": 5}), "1 problem .listed above."),
    "a record that is a list of files": (record(["x"]), "1 problem .listed above."),
    "a table without columns": (table(b"a,b\n1,2\n"), "steps.csv: not a table of halfstep"),
    "a table of bytes": (table(b"\xff\xfe\x00" * 99), "steps.csv: not a table of halfstep"),
    "a table with words as values": (
        table(
            b"metric,model,value,teacher,run,protocol\nentropy,t/teacher,low,t,teacher,unigram\n"
        ),
        "steps.csv: not a table of halfstep",
    ),
    "a table that is empty": (table(b""), "steps.csv: not a table of halfstep"),
    "a table in a pipe": (
        (lambda folder: os.mkfifo(folder / "steps.csv"), PLOT),
        "steps.csv: found a pipe",
    ),
    "hub.json a list": (of_hub("[1]"), "hub.json: is not a file that halfstep fetch writes"),
    "hub.json of numbers": (of_hub('{"model:a": 5}'), "hub.json: is not a file"),
}

KINDS = {"checkpoint folder": CHECKPOINTS, "corpus folder": CORPORA, "samples and rows": SAMPLES}
CASES = [
    Hostile(kind, name, make, command.split(), refused)
    for kind, cases in KINDS.items()
    for name, ((make, command), refused) in cases.items()
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_answered(case, tmp_path):
    folder = tmp_path / "input"
    folder.mkdir()
    answer(case, folder)

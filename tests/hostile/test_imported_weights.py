"""Hostile weights for `halfstep import`: pickles, safetensors, and folders as on the hub.

`teachers: from:` and names on the hub reach the same function.
"""

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import archives
import pytest
import torch
from archives import (
    CONFIG,
    called,
    dict_of,
    named,
    publish,
    publish_shards,
    storage,
    tensor,
    text,
    tuple_of,
    weights,
    whole,
    write_archive,
    write_safetensors,
    write_torchscript,
)
from hostile import Hostile, answer
from safetensors.torch import save_file

EMBEDDING = "vocab_embed.embedding"
TORCHSCRIPT = "is a TorchScript archive"


def pickled(name, make, refused):
    """A file x.ckpt: `make` is the body of its pickle, or writes the file."""
    if isinstance(make, bytes):
        body = make
        make = lambda path: write_archive(path, body)  # noqa: E731 - the other form of `make`
    arguments = ["import", "--source", "x.ckpt", "--output", "out"]
    return Hostile(
        "pickled weights", name, lambda folder: make(folder / "x.ckpt"), arguments, refused
    )


def state(value: bytes) -> bytes:
    """The body of a pickle {"state_dict": {embedding: value}}."""
    return dict_of({"state_dict": dict_of({EMBEDDING: value})})


def with_config(value: bytes) -> bytes:
    return (
        dict_of({"hyper_parameters": dict_of({"config": value})})
        + text("state_dict")
        + (dict_of({EMBEDDING: tensor((2, 2), (2, 1))}) + b"s")
    )


def saved(value):
    return lambda path: torch.save(value, path)


def protocol_4(path: Path) -> None:
    data = pickle.dumps({EMBEDDING: os.getcwd}, protocol=4)
    write_archive(path, b"", {"data.pkl": data})


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())


def legacy(path: Path) -> None:
    torch.save({EMBEDDING: torch.zeros(2, 2)}, path, _use_new_zipfile_serialization=False)


def compressed(path: Path) -> None:
    """A quarter of a gigabyte of zeros in a quarter of a megabyte."""
    write_archive(path, state(tensor()))
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x/data/1", "w", force_zip64=True) as member,
    ):
        for _ in range(256):
            member.write(bytes(2**20))


def overlapping(path: Path) -> None:
    """A thousand names for one large member."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}.")
        archive.writestr("x/data/0", bytes(2**22))
        member = archive.getinfo("x/data/0")
        for i in range(1, 1000):
            other = zipfile.ZipInfo(f"x/data/{i}")
            for fact in ("CRC", "compress_size", "file_size", "header_offset"):
                setattr(other, fact, getattr(member, fact))
            archive.filelist.append(other)
            archive.NameToInfo[other.filename] = other


def many_members(path: Path) -> None:
    write_archive(path, state(tensor()), {f"data/{i}": b"" for i in range(1, 25_000)})


def two_pickles(path: Path) -> None:
    write_archive(path, state(tensor()), {"DATA.pkl": b"\x80\x02}."})


def two_ends(path: Path) -> None:
    """A second archive in the comment of the first."""
    write_archive(path, state(tensor()))
    inner = path.read_bytes()
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = inner[:60_000]


def without_pickle(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/version", "3")


def cut(path: Path) -> None:
    torch.save(weights(), path)
    path.write_bytes(path.read_bytes()[:-1000])


def changed_number(path: Path) -> None:
    """The directory of the archive says that there are more bytes than the file has."""
    write_archive(path, state(tensor()))
    data = bytearray(path.read_bytes())
    data[-10:-6] = struct.pack("<I", 2**31)
    path.write_bytes(data)


def big_text(copies: int) -> bytes:
    """A list of calls that copy the same million characters `copies` times."""
    encode = named("_codecs.encode") + b"h\x00" + text("latin1") + b"\x86R"
    return b"](" + text("a" * 10**6) + b"q\x00" + encode * copies + b"e"


def laughs(levels: int) -> bytes:
    """Lists of twice the list before, so that a small pickle describes a huge tree."""
    body = b"](]q\x00"
    for level in range(levels):
        before, after = bytes([level]), bytes([level + 1])
        body += b"](h" + before + b"h" + before + b"eq" + after
    return body + b"e"


def nested(depth: int) -> bytes:
    return b"]" * depth + b"a" * (depth - 1)


def tuples(depth: int) -> bytes:
    return b")" + b"\x85" * depth


def many_names(count: int) -> bytes:
    return tuple_of(*(named(f"omegaconf.a{i}") for i in range(count)))


def many_calls(count: int) -> bytes:
    return b"](" + named("omegaconf.a") + b"q\x00)R" + b"h\x00)R" * count + b"e"


DEVICE_TENSOR = called("torch.distributed.tensor._api.DTensor")
EMPTY_HOOKS = called("collections.OrderedDict")
CODE = {
    "os.system": (called("os.system", text("touch ran")), "names 'os.system'"),
    "eval": (called("__builtin__.eval", text("open('ran', 'w')")), "names 'builtins.eval'"),
    "exec under a new name": (called("builtins.exec", text("1")), "names 'builtins.exec'"),
    "getattr": (called("builtins.getattr", named("os.path"), text("x")), "names 'builtins.getattr"),
    "a torch.load in the pickle": (called("torch.load", text("x.ckpt")), "names 'torch.load'"),
    "torch.jit.load": (called("torch.jit.load", text("x")), "names 'torch.jit.load'"),
    "torch.from_file": (called("torch.from_file", text("x")), "names 'torch.from_file'"),
    "a new Popen": (named("subprocess.Popen") + tuple_of(text("ls")) + b"\x81", "subprocess.Popen"),
    "an operation of protocol 0": (b"(S'touch ran'\nios\nsystem\n", "the operation STRING"),
    "a registered extension": (b"\x82\x01", "cannot be read|the operation EXT1"),
    "a name with escapes": (called("\x1b[31mos.system"), r"names '\\x1b\[31mos.system'"),
    "a call of a tensor": (tensor() + tuple_of() + b"R", "calls torch._utils"),
    "a call of a list": (b"]" + tuple_of() + b"R", "calls list"),
    "a state for a list": (b"]}b", "sets the state of list"),
    "a distributed tensor": (DEVICE_TENSOR, "names 'torch.distributed.tensor"),
}
SIZES = {
    "an array of a terabyte": (called("builtins.bytearray", whole(10**12)), "builtins.bytearray"),
    "a tensor by its constructor": (called("torch.FloatTensor", whole(10**12)), "FloatTensor"),
    "a tensor beyond its storage": (tensor((4, 4), (4, 1)), "with arguments that"),
    "an offset beyond its storage": (tensor(offset=1), "with arguments that"),
    "a negative offset": (tensor(offset=-1), "with arguments that"),
    "a negative stride": (tensor((2,), (-1,), 3), "with arguments that"),
    "a negative size": (tensor((-1,)), "with arguments that"),
    "one number as a terabyte": (tensor((10**6, 10**6), (0, 0)), "with arguments that"),
    "sizes whose product overflows": (tensor((2**62, 4), (0, 0)), "with arguments that"),
    "a size that is a text": (
        called("torch._utils._rebuild_tensor_v2", storage(), *[text("4")] * 5),
        "with arguments that",
    ),
    "more numbers than the record": (tensor(numbers=storage(elements=10**9)), "of another length"),
    "fewer numbers than the record": (tensor(numbers=storage(elements=2)), "of another length"),
    "numbers from elsewhere": (tensor(numbers=storage(key="../version")), "not in the file"),
    "numbers of no known type": (tensor(numbers=storage("QInt8Storage", elements=16)), "QInt8"),
    "a quantized tensor": (called("torch._utils._rebuild_qtensor", storage()), "_rebuild_qtensor"),
    "no storage at all": (tensor(numbers=b"N"), "with arguments that"),
    "copies of a large text": (big_text(5000), "copies its values"),
    "copies of a large dict": (
        called("collections.OrderedDict", dict_of({"a": b"N"})),
        "calls collections.OrderedDict with arguments",
    ),
    "a key of nested tuples": (b"}" + tuples(200_000) + b"Ns", "nested tuples as the key"),
    "a set of nested tuples": (
        called("builtins.set", b"]" + tuples(200_000) + b"a"),
        "calls builtins.set with arguments",
    ),
    "100,000 names of types": (many_names(100_000), "names more than 100 functions"),
    "150,000 calls": (many_calls(150_000), "more than 100,000 calls"),
    "another codec": (called("_codecs.encode", text("a"), text("zlib")), "_codecs.encode with"),
    "two million operations": (b"](" + b"N" * 2_000_000 + b"e", "more than 1,000,000 op"),
}
DAMAGE = {
    "an operation without operands": (b"R", "damaged pickle"),
    "a list without its mark": (b"]Ne", "damaged pickle"),
    "a missing memory": (b"h\x07", "damaged pickle"),
    "no end": (lambda path: write_archive(path, b"", {"data.pkl": b"\x80\x02}"}), "cannot be read"),
    "keys that cannot be keys": (b"}]Ns", "cannot be read"),
    "protocol 4": (protocol_4, "or another protocol"),
    "only a list": (nested(100_000), "holds a list, expected named tensors"),
    "only a tensor": (saved(torch.zeros(2)), "holds a Tensor, expected"),
    "only a number": (saved(5), "holds a int, expected"),
    "no tensor": (saved({"state_dict": {"a": 1}}), "found the keys 'state_dict'"),
    "arrays of numpy": (saved({EMBEDDING: torch.zeros(1).numpy()}), "has no tensors|names"),
    "an empty dict": (saved({}), "found the keys none"),
    "state_dict: 5": (saved({"state_dict": 5, "hyper_parameters": []}), "found the keys"),
}
WEIGHTS = {
    "weights as integers": ({k: v.int() for k, v in weights().items()}, "as int32, expected"),
    "weights as truth values": ({k: v.bool() for k, v in weights().items()}, "as bool, expected"),
    "complex weights": ({EMBEDDING: torch.zeros(2, 2) * 1j}, "ComplexFloatStorage"),
    "sparse weights": ({EMBEDDING: torch.eye(4).to_sparse()}, "_rebuild_sparse_tensor"),
    "weights without numbers": (
        {EMBEDDING: torch.zeros(4, 4, device="meta")},
        "_rebuild_meta_tensor_no_storage",
    ),
    "weights of a student and a teacher": (
        {"student": weights(), "teacher": weights()},
        "several sets of weights: 'student', 'teacher'",
    ),
    "one name under two prefixes": (
        weights() | {f"module.{EMBEDDING}": torch.zeros(1)},
        f"holds {EMBEDDING} twice",
    ),
    "a tensor whose name has escapes": (
        weights() | {"\x1b[2J": torch.zeros(1)},
        r"names a tensor '\\x1b",
    ),
    "an average that is a text": (
        {"state_dict": weights(), "ema": {"shadow_params": "abc"}},
        "average has no list of tensors",
    ),
    "an average of numbers": (
        {"state_dict": weights(), "ema": {"shadow_params": [1, 2]}},
        "average has no list of tensors",
    ),
    "a short average": (
        {"state_dict": weights(), "ema": {"shadow_params": [torch.zeros(1)]}},
        "average has 1 tensors for",
    ),
    "an average of integers": (
        {
            "state_dict": weights(),
            "ema": {"shadow_params": [v.int() for k, v in weights().items() if "inv_f" not in k]},
        },
        "of another shape or type",
    ),
    "FSDP's flat parameters": ({"_fsdp_wrapped_module._flat_param": torch.zeros(9)}, "no tensors"),
}
CASES = [
    *(pickled(name, state(body), refused) for name, (body, refused) in (CODE | SIZES).items()),
    *(pickled(name, make, refused) for name, (make, refused) in DAMAGE.items()),
    *(pickled(name, saved(value), refused) for name, (value, refused) in WEIGHTS.items()),
    pickled("a configuration like a billion laughs", with_config(laughs(60)), "100,000 values"),
    pickled("a configuration that holds itself", with_config(b"]q\x00h\x00a"), "too deeply|values"),
    pickled("a deep configuration", with_config(nested(50_000)), "too deeply"),
    pickled(
        "TorchScript", lambda path: write_torchscript(path, path.parent / "victim"), TORCHSCRIPT
    ),
    pickled(
        "constants of TorchScript in capitals",
        lambda path: write_archive(path, b"}", {"CONSTANTS.PKL": b""}),
        TORCHSCRIPT,
    ),
    pickled(
        "code of TorchScript",
        lambda path: write_archive(path, b"}", {"code/__torch__.py": b""}),
        TORCHSCRIPT,
    ),
    pickled("a tar archive", tar, "is a tar archive"),
    pickled("the format before 2020", legacy, "before 2020"),
    pickled("a plain pickle", lambda path: path.write_bytes(pickle.dumps({})), "a plain pickle"),
    pickled("an empty file", lambda path: path.touch(), "is empty"),
    pickled("the first bytes of an archive", lambda path: path.write_bytes(b"PK\3\4"), "cannot be"),
    pickled(
        "zeros after the first bytes", lambda p: p.write_bytes(b"PK\3\4" + bytes(99)), "cannot"
    ),
    pickled("an archive cut short", cut, "cannot be read"),
    pickled("many zeros, compressed", compressed, "has compressed members"),
    pickled("a thousand names for one member", overlapping, "has members that overlap"),
    pickled("25,000 members", many_members, "has more than 20,000 members"),
    pickled("two pickles", two_pickles, "or two of one name"),
    pickled("two ends", two_ends, "cannot be read"),
    pickled("no pickle", without_pickle, "has no pickle"),
    pickled("a list of members of two gigabytes", changed_number, "cannot be read"),
    pickled("an empty archive", lambda p: zipfile.ZipFile(p, "w").close(), "is neither an archive"),
    pickled(
        "numbers in no order of bytes",
        lambda path: write_archive(path, state(tensor()), {"byteorder": b"purple"}),
        "cannot be read",
    ),
    pickled("a web page", lambda path: path.write_text("<!DOCTYPE html>"), "is a web page"),
    pickled(
        "a pointer of Git LFS",
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "a pointer of Git LFS",
    ),
    pickled("a gzip archive", lambda path: path.write_bytes(gzip.compress(b"")), "a gzip archive"),
]


def numbers(name, make, refused, rows=None):
    """A published folder with a hostile model.safetensors: a state, or a writer of the file."""

    def write(folder: Path) -> None:
        if isinstance(make, dict):
            publish(folder / "hub", weights() | make)
        else:
            make(publish(folder / "hub") / "model.safetensors")

    arguments = ["import", "--source", "hub", "--output", "out"]
    return Hostile("safetensors weights", name, write, arguments, refused)


def header(value, data=b""):
    return lambda path: write_safetensors(path, value, data)


def length(number: int):
    return lambda path: path.write_bytes(struct.pack("<Q", number) + b"{}")


def entry(dtype="F32", shape=(2, 2), offsets=(0, 16)) -> dict:
    return {EMBEDDING: {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


def replaced(path: Path, state: dict) -> None:
    save_file(state, path)


def rows_of(count: int):
    """Weights of another number of tokens."""
    return lambda path: replaced(path, weights(rows=count))


def renumbered(path: Path) -> None:
    state = weights(blocks=2)
    replaced(path, {key.replace("blocks.1.", "blocks.7."): v for key, v in state.items()})


def many_blocks(path: Path) -> None:
    state = weights()
    first = {key: value for key, value in state.items() if key.startswith("blocks.0.")}
    for i in range(1, 1500):
        state |= {key.replace("blocks.0.", f"blocks.{i}."): v.clone() for key, v in first.items()}
    replaced(path, state)


NAN = torch.full((16,), float("nan"))
HUGE = torch.full((16,), 1e300, dtype=torch.float64)
TWICE = json.dumps(entry()).encode()[:-1] + b", " + json.dumps(entry()).encode()[1:]
FREQUENCIES = "rotary_emb.inv_freq"
CASES += [
    numbers("a header of 2**63 bytes", length(2**63), "neither an archive"),
    numbers("a header longer than the file", length(10**6), "neither an archive"),
    numbers("a header that is no JSON", header(b"{'a'"), "cannot be read"),
    numbers("a header that is not UTF-8", header(b'{"\xff": 1}'), "cannot be read"),
    numbers("a deep header", header(b'{"a":' * 100_000), "cannot be read"),
    numbers("a header that is a list", header([]), "cannot be read"),
    numbers("an empty header", header({}), "has no tensors"),
    numbers("two tensors in one place", header(entry() | {"b": entry()[EMBEDDING]}), "cannot be"),
    numbers("numbers beyond the file", header(entry(offsets=(0, 10**12))), "cannot be read"),
    numbers("a hole between tensors", header(entry(offsets=(16, 32)), bytes(32)), "cannot be read"),
    numbers("bytes after the tensors", header(entry(), bytes(99)), "cannot be read"),
    numbers("offsets the wrong way round", header(entry(offsets=(16, 0)), bytes(16)), "cannot be"),
    numbers("a negative size", header(entry(shape=(-2, 2)), bytes(16)), "cannot be read"),
    numbers("a size that does not fit", header(entry(shape=(2**40, 2)), bytes(16)), "cannot be"),
    numbers("an unknown type", header(entry("Q99"), bytes(16)), "cannot be read"),
    numbers("integers", header(entry("I32"), bytes(16)), "as int32, expected"),
    numbers("numbers of 8 bits", header(entry("F8_E4M3", (4, 4)), bytes(16)), "as float8_e4m3fn"),
    numbers("a tensor twice", header(TWICE, bytes(16)), "cannot be read|no sigma_map"),
    numbers("cut short", lambda p: p.write_bytes(p.read_bytes()[:-9]), "cannot be read"),
    numbers("an empty file", lambda p: p.write_bytes(b""), "is empty"),
    numbers("not a number", {"blocks.0.norm1.weight": NAN}, "holds NaN"),
    numbers("infinite as float32", {"blocks.0.norm1.weight": HUGE}, "holds NaN or infinity"),
    numbers("an embedding of no tokens", {EMBEDDING: torch.zeros(0, 16)}, r"shape \[0, 16\]"),
    numbers("an embedding of one dimension", {EMBEDDING: torch.zeros(16)}, "expected 2 dimensions"),
    numbers("an embedding of no dimension", {EMBEDDING: torch.tensor(1.0)}, "expected 2 dim"),
    numbers("an output that is a number", {"output_layer.linear.bias": torch.tensor(1.0)}, "shape"),
    numbers("heads that fit no width", {FREQUENCIES: torch.ones(3)}, "fit no denoiser"),
    numbers("heads wider than the network", {FREQUENCIES: torch.ones(99)}, "fit no denoiser"),
    numbers("a block number like 10**30", {f"blocks.{10**30}.x": torch.ones(1)}, "lacks tensors"),
    numbers("a block without a number", {"blocks.x": torch.ones(1)}, "lacks tensors"),
    numbers("blocks 0 and 7", renumbered, "lacks tensors of some of its 2 blocks"),
    numbers("1,500 blocks", many_blocks, "size: found '1500x16x2'"),
    numbers("25,000 tensors", {f"t{i}": torch.zeros(0) for i in range(25_000)}, "than 20,000 ten"),
    numbers("a name of 10,000 letters", {"a" * 10_000: torch.zeros(1)}, "names a tensor 'aaaa"),
    numbers("a name that clears the screen", {"\x1bc": torch.zeros(1)}, r"names a tensor '\\x1bc"),
    numbers("a conditioning of no fixed width", {"sigma_map.mlp.0.weight": NAN[:, None]}, "shape"),
    numbers("one token too few", rows_of(archives.TOKENS), "the tokenizer has 257"),
    numbers("one token too many", rows_of(archives.TOKENS + 2), "the tokenizer has 257"),
    numbers("another vocabulary", rows_of(8000), "the tokenizer has 257"),
]


def published(name, change, refused):
    """A published folder: the bytes or the value of config.json, or a change of the folder."""

    def write(folder: Path) -> None:
        hub = folder / "hub"
        if callable(change):
            change(publish(hub))
        elif isinstance(change, bytes):
            publish(hub, config=change)
        else:
            publish(hub, config=CONFIG | change)

    arguments = ["import", "--source", "hub", "--output", "out"]
    return Hostile("published folder", name, write, arguments, refused)


def sharded(name, index, refused):
    """The same with an index of the weights, or with a change of the folder."""

    def write(folder: Path) -> None:
        if callable(index):
            index(publish_shards(folder / "hub"))
        else:
            publish_shards(folder / "hub", index)

    arguments = ["import", "--source", "hub", "--output", "out"]
    return Hostile("published folder", f"an index: {name}", write, arguments, refused)


def fetched(name, data):
    """What `halfstep fetch` finds in its own file."""
    return Hostile(
        "published folder",
        f"hub.json: {name}",
        lambda folder: (folder / "hub.json").write_bytes(data),
        ["fetch", "--repositories", "model:a/b", "--output", "hub.json"],
        "hub.json: (is not a file that halfstep fetch writes|not valid JSON)",
    )


def instead(file: str, make):
    """Replace a file of the folder by whatever `make` puts there."""

    def change(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return change


def pickled_in(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    write_torchscript(folder / "pytorch_model.bin", folder / "victim")


def evil_in(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    write_archive(folder / "pytorch_model.bin", state(called("posix.system", text("touch ran"))))


def doubled(folder: Path) -> None:
    """Both files hold one tensor, which the index gives to one of them."""
    for file in ("1.safetensors", "2.safetensors"):
        save_file(weights(), folder / file)


def script_shard(folder: Path) -> None:
    index = {"weight_map": dict.fromkeys(weights(), "1.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_torchscript(folder / "1.bin", folder / "victim")


DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
LONG = b'{"a": "' + b"x" * 2**25 + b'"}'
CASES += [
    published("config.json is a list", b"[]", "config.json: holds a list"),
    published("config.json is a number", b"5", "config.json: holds a int"),
    published("config.json is empty", b"", "config.json: not valid JSON"),
    published("config.json is not UTF-8", b"\xff\xfe{\x00}\x00", "not valid JSON"),
    published("config.json is deep", DEEP, "not valid JSON"),
    published("config.json is huge", LONG, "expected a JSON file of at most 33,554,432"),
    published("config.json gives a key twice", b'{"a": 1, "a": 2}', "'a' is given twice"),
    published("config.json has a long number", b'{"a": ' + b"1" * 9999 + b"}", "not valid JSON"),
    published("a length that is a text", {"model_length": "16"}, "does not say how many tokens"),
    published("a length that is true", {"model_length": True}, "does not say how many tokens"),
    published("a length of zero", {"model_length": 0}, "does not say how many tokens"),
    published("a length below zero", {"model_length": -16}, "does not say how many tokens"),
    published("a length of 10**30", {"model_length": 10**30}, "a whole number above 2.64"),
    published("a model that is a list", {"model_length": None, "model": [1]}, "does not say how"),
    published("time_conditioning: 'no'", {"time_conditioning": "no"}, "time_conditioning: found"),
    published("an unknown schedule", {"schedule": "geometric"}, "schedule: found 'geometric'"),
    published("an unknown noise", {"noise": {"type": "geometric"}}, "noise.type 'geometric'"),
    published("a schedule with escapes", {"schedule": "\x1b[2J"}, r"found '\\x1b"),
    published(
        "weights that are a folder",
        instead("model.safetensors", Path.mkdir),
        "holds none of model.safetensors",
    ),
    published(
        "weights that are a pipe",
        instead("model.safetensors", os.mkfifo),
        "holds none of model.safetensors",
    ),
    published(
        "weights that link to themselves",
        instead("model.safetensors", lambda path: path.symlink_to(path)),
        "holds none of model.safetensors",
    ),
    published(
        "a tokenizer that is a pipe", instead("tokenizer.json", os.mkfifo), "without a tokenizer"
    ),
    published(
        "a tokenizer that is no JSON",
        instead("tokenizer.json", lambda path: path.write_text("{")),
        "tokenizer.json cannot be read",
    ),
    published(
        "a tokenizer without EOS",
        instead(
            "tokenizer.json",
            lambda path: path.write_text('{"model": {"type": "BPE", "vocab": {}, "merges": []}}'),
        ),
        "has no token <.endoftext.>",
    ),
    published("TorchScript as pytorch_model.bin", pickled_in, TORCHSCRIPT),
    published("a call as pytorch_model.bin", evil_in, "names 'posix.system'"),
    sharded("a list", [], "holds a list"),
    sharded("without weight_map", {}, "has no weight_map"),
    sharded("weight_map is a list", {"weight_map": [1]}, "has no weight_map"),
    sharded("deep", DEEP, "not valid JSON"),
    sharded("huge", LONG, "expected a JSON file of at most"),
    sharded("a tensor twice", b'{"weight_map": {"a": "1", "a": "2"}}', "'a' is given twice"),
    sharded("an absolute path", {"weight_map": {"a": "/etc/passwd"}}, "names '/etc/passwd'"),
    sharded("a path outside", {"weight_map": {"a": "../x.ckpt"}}, "names '../x.ckpt'"),
    sharded("the folder above", {"weight_map": {"a": ".."}}, "names '..'"),
    sharded("a file that is a number", {"weight_map": {"a": 5}}, "names '5'"),
    sharded("a file with a null", {"weight_map": {"a": "a\0b"}}, r"names 'a\\x00b'"),
    sharded("itself", {"weight_map": {"a": "model.safetensors.index.json"}}, "names 'model"),
    sharded("a file that is not there", {"weight_map": {"a": "3.safetensors"}}, "no such file"),
    sharded("a tensor that is not there", {"weight_map": {"a": "1.safetensors"}}, "disagree"),
    sharded("a tensor in two files", doubled, "disagree about the tensors"),
    sharded("TorchScript as a part", script_shard, TORCHSCRIPT),
    fetched("a list", b"[1]"),
    fetched("a text", b'"abc"'),
    fetched("a row that is a number", b'{"model:a/b": 5}'),
    fetched("files that are a list", b'{"model:a/b": {"version": "1", "files": []}}'),
    fetched("a checksum that is a number", b'{"model:a/b": {"version": "1", "files": {"x": 5}}}'),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_answered(case, tmp_path):
    folder = tmp_path / "input"
    folder.mkdir()
    answer(case, folder)

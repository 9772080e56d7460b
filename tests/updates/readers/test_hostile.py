"""Files that are damaged, or made to harm: each gets one error, runs nothing, and takes no memory to speak of."""

import io
import json
import os
import pickle
import resource
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorabench.config.decode import InputError
from lorabench.updates import formats
from lorabench.updates.tensorfile import TorchFile, open_tensors, read_json
from tests.wild import path_of

A, B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
MIB = 2**20


class Harm:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def adapter(folder, tensors=None, config=CONFIG, name="adapter_model.safetensors"):
    folder.mkdir(exist_ok=True)
    tensors = {A: torch.ones(2, 3), B: torch.ones(4, 2)} | (tensors or {})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / name) if name.endswith("safetensors") else torch.save(tensors, folder / name)
    return folder / name


def refusal(path, **options):
    """The one error, in one line, of opening and reading everything."""
    with pytest.raises(InputError) as caught:
        list(formats.load_layers(formats.open_adapter(path, **options)))
    assert len(caught.value.problems) == 1 and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600 and "weights_only" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def little_memory():
    """Fails what would take a gigabyte more than there is in use."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 1024 * MIB, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["alone", "beside", "in the key"])
def test_a_pickle_is_never_run(new, place, tmp_path):
    mark = tmp_path / "mark"
    harm = Harm(mark)
    table = {"alone": harm, "beside": {A: torch.ones(2, 3), "x": harm}, "in the key": {A: {harm: 1}}}[place]
    file = tmp_path / "adapter_model.bin"
    torch.save(table, file, _use_new_zipfile_serialization=new)
    assert "holds Python objects (posix.system) beside tensors, and these are never loaded" in refusal(file)
    assert not mark.exists()


def test_a_bare_pickle_is_never_run(tmp_path):
    mark = tmp_path / "mark"
    (tmp_path / "x.pt").write_bytes(pickle.dumps({"w": Harm(mark)}))
    assert refusal(tmp_path / "x.pt").startswith(f"{tmp_path}/x.pt: ")
    assert not mark.exists()


def test_an_old_archive_is_not_unpacked(tmp_path):
    """PyTorch 0.1 wrote tar files."""
    (tmp_path / "evil").write_bytes(pickle.dumps(Harm(tmp_path / "mark")))
    with tarfile.open(tmp_path / "x.pt", "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            archive.add(tmp_path / "evil", name)
    assert refusal(tmp_path / "x.pt").startswith(f"{tmp_path}/x.pt: ")
    assert not (tmp_path / "mark").exists()


def test_a_pickle_under_the_name_of_a_safetensors_file(tmp_path):
    torch.save({A: torch.ones(2, 3)}, tmp_path / "adapter_model.safetensors")
    assert "not a whole safetensors file" in refusal(tmp_path / "adapter_model.safetensors")


def rezipped(file, change):
    """The members of a PyTorch file, changed and zipped again by `change(archive, name, data)`."""
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            change(archive, name, data)


def test_a_zip_bomb(tmp_path, little_memory):
    """200 MiB of zeros in a file of 200 KiB."""
    file = adapter(tmp_path, name="adapter_model.bin")

    def inflate(archive, name, data):
        big = b"\0" * (200 * MIB) if name.endswith("data/0") else data
        archive.writestr(name, big, zipfile.ZIP_DEFLATED)

    rezipped(file, inflate)
    assert file.stat().st_size < MIB
    assert "is compressed, which torch.save never does" in refusal(tmp_path)


def test_a_zip_whose_members_overlap(tmp_path):
    """Its directory names one stored member many times."""
    file = adapter(tmp_path, name="adapter_model.bin")
    data = file.read_bytes()
    end = data.rindex(b"PK\x05\x06")
    size, start = struct.unpack("<II", data[end + 12 : end + 20])
    directory = data[start : start + size]
    count = 200
    tail = struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, size * count, start, 0)
    file.write_bytes(data[:start] + directory * count + b"PK\x05\x06" + tail)
    assert refusal(tmp_path).startswith(f"{file}: ")


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_a_tensor_that_repeats_one_number_without_end(new, tmp_path, little_memory):
    """Strides of 0: a shape of 10^12 numbers over a storage of one."""
    wide = torch.ones(1).expand(10**6, 10**6)
    torch.save({A: wide, B: torch.ones(4, 2)}, tmp_path / "adapter_model.bin", _use_new_zipfile_serialization=new)
    assert "claims more numbers (1000000, 1000000) than the file holds" in refusal(tmp_path / "adapter_model.bin")


@pytest.mark.parametrize(
    "tensor",
    [torch.empty(2, 3, device="meta"), torch.eye(3).to_sparse()],
    ids=["without data", "sparse"],
)
def test_a_tensor_that_is_none(tensor, tmp_path):
    torch.save({A: tensor, B: torch.ones(4, 2)}, tmp_path / "adapter_model.bin")
    assert refusal(tmp_path / "adapter_model.bin").startswith(f"{tmp_path}/adapter_model.bin: ")


def test_a_dictionary_inside_itself(tmp_path):
    table = {"x": 1}
    table["state_dict"] = table
    torch.save(table, tmp_path / "x.pt")
    with pytest.raises(InputError, match="nested too deep"):
        TorchFile(tmp_path / "x.pt").names  # noqa: B018


def test_nested_dictionaries_are_one(tmp_path):
    x = torch.ones(2, 3)
    tables = {
        "plain": {"a.w": x},
        "wrapped": {"state_dict": {"a.w": x}, "optimizer": {"state": {0: {"exp_avg": x}}}, "epoch": 3},
        "twice": {"model": {"state_dict": {"a": {"w": x}}}},
        "parameters": {"module": {"a.w": torch.nn.Parameter(x)}},
    }
    for name, table in tables.items():
        for new in (True, False):
            torch.save(table, tmp_path / f"{name}.pt", _use_new_zipfile_serialization=new)
            file = open_tensors(tmp_path / f"{name}.pt")
            assert file.names == ["a.w"] and torch.equal(file.read("a.w"), x), name
            assert (file.shape("a.w"), file.dtype("a.w")) == ((2, 3), "float32")
    torch.save({"adapter": {"a": x}, "adapter_config": {"r": 8, "lora_alpha": 16}}, tmp_path / "torchtune.pt")
    file = open_tensors(tmp_path / "torchtune.pt")
    assert file.names == ["a"] and file.metadata == {"adapter_config.r": "8", "adapter_config.lora_alpha": "16"}


@pytest.mark.parametrize("table", [[torch.ones(2)], torch.ones(2), 3], ids=["list", "tensor", "number"])
def test_a_torch_file_that_holds_no_dictionary(table, tmp_path):
    torch.save(table, tmp_path / "x.bin")
    assert "must be a dictionary of tensors" in refusal(tmp_path / "x.bin")


def lying(file, change, data=b"\0" * 64):
    """A safetensors file with any header."""
    header = {A: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
              B: {"dtype": "F32", "shape": [4, 2], "data_offsets": [24, 56]}}  # fmt: skip
    text = change(header)
    text = text if isinstance(text, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


LIES = {
    "offsets past the end": lambda h: h[B].update(data_offsets=[24, 2**40], shape=[2**38 - 6]),
    "overlapping": lambda h: h[B].update(data_offsets=[0, 32]),
    "reversed": lambda h: h[B].update(data_offsets=[56, 24]),
    "negative": lambda h: h[B].update(data_offsets=[-8, 24]),
    "shape that is not the data's": lambda h: h[B].update(shape=[400, 200]),
    "shape that overflows": lambda h: h[B].update(shape=[2**33, 2**33]),
    "negative shape": lambda h: h[B].update(shape=[-4, -2]),
    "unknown dtype": lambda h: h[B].update(dtype="F77"),
    "nothing said": lambda h: h[B].clear(),
    "a hole": lambda h: h[B].update(data_offsets=[32, 64]),
    "no JSON": lambda h: b"{" * 50,
    "deep JSON": lambda h: b'{"a":' * 50_000,
    "no text": lambda h: b"\xff" * 50,
    "a list": lambda h: b"[]",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies(lie, tmp_path, little_memory):
    adapter(tmp_path)
    file = lying(tmp_path / "adapter_model.safetensors", LIES[lie])
    assert refusal(tmp_path).startswith(f"{file}: not a whole safetensors file")


@pytest.mark.parametrize("size", [2**63, 2**40, 10**8, 60])
def test_a_header_that_lies_about_its_size(size, tmp_path, little_memory):
    adapter(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(struct.pack("<Q", size) + file.read_bytes()[8:])
    assert refusal(tmp_path).startswith(f"{file}: not a whole safetensors file")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.9, 0.99])
def test_a_file_cut_short(name, share, tmp_path):
    file = adapter(tmp_path, {A: torch.ones(2, 3000)}, name=name)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    assert refusal(tmp_path).startswith(f"{file}: not a whole ")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_any_byte_may_be_wrong(name, tmp_path):
    """Nothing but an InputError, whatever is hit; a few hundred places."""
    file = adapter(tmp_path, name=name)
    whole = file.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        place, byte = (int(torch.randint(high, (), generator=generator)) for high in (len(whole), 256))
        file.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
        try:
            list(formats.load_layers(formats.open_adapter(tmp_path)))
        except InputError as error:
            assert str(error).startswith(str(tmp_path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_that_are_none(value, dtype, tmp_path):
    bad = torch.ones(4, 2, dtype=dtype)
    bad[3, 1] = value
    file = adapter(tmp_path, {B: bad})
    assert refusal(tmp_path) == f"{file}: {B}: holds NaN or Inf"


def test_factors_that_overflow(tmp_path):
    adapter(tmp_path, {B: torch.full((4, 2), 1e30)}, CONFIG | {"lora_alpha": 1e25})
    assert refusal(tmp_path) == "q.weight: the update holds NaN or Inf, or overflows"


def test_eight_bit_floats_are_read_and_whole_numbers_refused(tmp_path):
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        adapter(tmp_path, {B: (torch.arange(8.0).reshape(4, 2) / 4).to(dtype)})
        (layer,) = formats.load_layers(formats.open_adapter(tmp_path))
        assert torch.allclose(layer.update.dense(), torch.arange(8.0).reshape(4, 2) / 4 @ torch.ones(2, 3) * 2)
    file = adapter(tmp_path, {B: torch.ones(4, 2, dtype=torch.int8)})
    assert refusal(tmp_path) == f"{file}: {B}: dtype int8: must be floating-point numbers (quantized?)"
    adapter(tmp_path, {B: torch.ones(4, 2, dtype=torch.complex64)})
    assert "dtype complex64" in refusal(tmp_path)


@pytest.mark.parametrize(
    "shapes",
    [((2, 3), (4, 3)), ((2, 3), (2,)), ((2,), (4, 2)), ((3, 3), (4, 3)), ((0, 3), (4, 0)), ((2, 0), (4, 2)),
     ((0, 3, 1, 1), (4, 2, 1, 1)), ((2, 3), ()), ((2, 3, 1, 1), (4,))],
)  # fmt: skip
def test_shapes_that_do_not_fit(shapes, tmp_path):
    adapter(tmp_path, {A: torch.ones(shapes[0]), B: torch.ones(shapes[1])})
    assert ("q.weight" in refusal(tmp_path) and "fit" in refusal(tmp_path)) or "no entries" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[1]", "must be a JSON object"),
        (b'"LORA"', "must be a JSON object"),
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "is nested too deep"),
        (b'{"peft_type": "LORA", "r": "2", "lora_alpha": 4}', "r = 2: must be a whole number"),
        (b'{"peft_type": ["LORA"], "r": 2, "lora_alpha": 4}', "peft_type = ['LORA']: its ΔW cannot be read"),
        (b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b', "lora_alpha": 4}', "not valid JSON"),
        (b'{"peft_type": "LORA", "r": 2, "lora_alpha": NaN}', "lora_alpha = nan: must be a number"),
    ],
)
def test_a_configuration_that_is_none(text, message, tmp_path):
    adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(text)
    assert message in refusal(tmp_path) and "adapter_config.json" in refusal(tmp_path)


def test_a_configuration_that_is_huge(tmp_path, little_memory):
    with open(tmp_path / "adapter_config.json", "wb") as file:
        file.truncate(2**34)  # takes no room on the disk
    with pytest.raises(InputError, match="17179869184 bytes: too large"):
        read_json(tmp_path / "adapter_config.json")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_a_pipe_is_not_waited_for(name, tmp_path):
    adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "kept")
    if name == "adapter_config.json":
        (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    assert "is not a regular file" in refusal(tmp_path)


def test_an_index_that_leads_outside(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"b.weight": torch.ones(2, 2)}, tmp_path / "secret.safetensors")
    save_file({"a.weight": torch.ones(2, 2)}, folder / "model-1.safetensors")
    index = {"weight_map": {"a.weight": "model-1.safetensors", "b.weight": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "../secret.safetensors: leads outside the folder" in refusal(folder, base=folder)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "", ".", "..", "ü" * 200, "\ud800"])
def test_an_index_that_names_no_file(name, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a.weight": torch.ones(2, 2)}, folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.weight": name}}))
    assert "model.safetensors.index.json: " in refusal(folder, base=folder)


@pytest.mark.parametrize("file", ["delta", "svd"])
@pytest.mark.parametrize("norms", [{"q.weight": "word"}, ["q.weight"], None, 3, {"q.weight": [1]}])
def test_norms_in_lorabenchs_own_files_that_are_none(file, norms, tmp_path):
    about = {"format": f"lorabench-{file}", "base_norms": norms, "ranks": {}}
    save_file({"q.weight": torch.ones(2, 2)}, tmp_path / f"{file}.safetensors", {"lorabench": json.dumps(about)})
    assert "base_norms" in refusal(tmp_path) and "number" in refusal(tmp_path)


def test_metadata_that_is_nested(tmp_path):
    tensors = {f"unet.to_q.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    for text in ('{"a":' * 50_000, '{"unet.r": ' + "9" * 5000 + "}"):
        save_file(tensors, tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": text})
        assert "lora_adapter_metadata: " in refusal(tmp_path / "lora.safetensors")


def test_a_small_file_cannot_ask_for_a_huge_product(tmp_path, little_memory):
    """LoKr: the Kronecker product of two matrices of 2 MB has 2 · 10^11 numbers."""
    W = torch.ones(700, 700)
    config = {"peft_type": "LOKR", "r": 2, "alpha": 4}
    name = "base_model.model.q.lokr_w"
    adapter(tmp_path, config=config)
    save_file({f"{name}1": W, f"{name}2": W.clone()}, tmp_path / "adapter_model.safetensors")
    assert "takes 894 GiB" in refusal(tmp_path)


def test_an_unknown_format_says_what_was_found(tmp_path):
    save_file({"mystery.alpha_beta": torch.ones(2, 2), "mystery.gamma": torch.ones(3)}, tmp_path / "x.safetensors")
    message = refusal(tmp_path)
    assert "of no known format. Keys found: mystery.alpha_beta, mystery.gamma" in message
    assert "lorabench, " in message and "peft, " in message and "two checkpoints (with --base)" in message
    assert refusal(tmp_path / "x.safetensors") == message.replace(str(tmp_path), f"{tmp_path}/x.safetensors", 1)


def test_nothing_there(tmp_path):
    assert "holds no file of tensors" in refusal(tmp_path)
    assert "no such file or folder" in refusal(tmp_path / "absent")
    (tmp_path / "note.txt").write_text("hello")
    assert "is no file of tensors" in refusal(tmp_path / "note.txt")
    assert formats.open_layers(tmp_path) == {}


def test_what_has_no_place_in_an_error_message(tmp_path):
    """A name of 10^6 letters, of several lines, or that moves the cursor."""
    for name in ("x" * 10**6, "a\nb", "\x1b[2J"):
        torch.save({name: torch.ones(2)}, tmp_path / "x.bin")
        save_file({name: torch.ones(2)}, tmp_path / "x.safetensors")
        assert "whose name is no name" in refusal(tmp_path / "x.bin") and refusal(tmp_path / "x.safetensors")


def test_the_buffer_of_the_test_itself(tmp_path):
    """`Harm` does what it says where a file is unpickled: else the tests above would prove nothing."""
    mark = tmp_path / "mark"
    torch.load(io.BytesIO(_bytes({"w": Harm(mark)})), weights_only=False)
    assert mark.exists()


def _bytes(table):
    buffer = io.BytesIO()
    torch.save(table, buffer)
    return buffer.getvalue()


def test_no_reader_unpickles():
    """The source has no other way into a pickle."""
    root = Path(formats.__file__).parent
    files = [root / "tensorfile.py", root / "weightfile.py", root / "formats.py", *(root / "readers").glob("*.py")]
    text = "".join(file.read_text("utf-8") for file in files)
    assert text.count("torch.load(") == 1 and "weights_only=True" in text
    assert "pickle.load" not in text and "joblib" not in text and "eval(" not in text.replace(".eval(", "")


LONG = "ab" * 400


@pytest.mark.parametrize(
    ("fixture", "change"),
    [
        ("adapterhub_bert", {"architecture": LONG}),
        ("adapterhub_bert", {"composition_mode": LONG}),
        ("adapterhub_bert", {"alpha": LONG}),
        ("mlx_lora", {"lora_parameters": {"scale": LONG}}),
        ("peft_lora", {"lora_alpha": LONG}),
        ("peft_lora", {"peft_type": LONG}),
    ],
)
def test_values_of_a_file_are_quoted_in_80_characters(fixture, change, tmp_path):
    folder = shutil.copytree(path_of(fixture), tmp_path / "adapter")
    file = folder / "adapter_config.json"
    table = json.loads(file.read_text())
    inner = table["config"] if isinstance(table.get("config"), dict) else table
    file.write_text(json.dumps(table | {"config": inner | change} if inner is not table else table | change))
    assert LONG[:70] in (told := refusal(folder)) and LONG[:82] not in told


def test_names_in_a_pickle_and_of_tensors_are_quoted_in_80_characters(tmp_path):
    save_file({LONG * 3: torch.ones(2, 3)}, tmp_path / "x.safetensors")
    assert LONG[:70] in (told := refusal(tmp_path / "x.safetensors")) and LONG[:82] not in told

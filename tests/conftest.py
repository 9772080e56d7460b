"""Shared by all tests: no network, tiny random models of three architectures, and the smallest specs."""

from __future__ import annotations

import fcntl
import gc
import importlib
import math
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import contextlib

with contextlib.redirect_stderr(sys.__stderr__):  # else it closes pytest's own stream once a library sets logging up
    import absl.logging  # noqa: F401

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from lorabench.config.decode import decode
from lorabench.spec.run_spec import RunSpec

TOY: dict = {"model": "builtin:tiny-llama", "task": {"name": "text", "data": "builtin:python-code"}}
"""The model and the data that are built in: what a sweep's `[base]` has to name."""
BASE = """
[base]
model = "builtin:tiny-llama"
task.name = "text"
task.data = "builtin:python-code"
"""
LONGEST = ("slurm/test_interruptions", "training/test_ranks", "slurm/test_deaths", "cluster/test_work",
           "training/test_execute", "methods/test_methods", "slurm/test_arrays", "figures/test_figures",
           "training/test_sequence", "launch/test_team", "slurm/test_without_accounting", "launch/test_kill",
           "test_architectures", "api/test_tour", "merging/test_compose", "training/test_flops",
           "commands/test_readme", "training/test_base_results", "objectives/test_grpo", "test_outputs",
           "commands/test_cli", "training/test_serving", "report/test_generated_sweeps", "analysis/test_analyze",
           "tasks/test_seq2seq", "packed/test_pack")  # fmt: skip
"""Files that take minutes: a worker that began one last would keep the others waiting. Those that mostly wait for a
real SLURM stand between those that compute."""
COMPUTING = ("training", "launch", "methods", "tasks", "cluster", "report")
"""Wings of whose other files most have runs or figures; what comes last should be short."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; with `--no-loadscope-reorder` workers take them in this order."""

    def place(item: pytest.Item) -> tuple[int, bool]:
        file = item.nodeid.partition("::")[0]
        longest = next((n for n, name in enumerate(LONGEST) if file.endswith(f"{name}.py")), len(LONGEST))
        return longest, not file.startswith(tuple(f"tests/{wing}/" for wing in COMPUTING))

    items.sort(key=place)


def pytest_configure(config: pytest.Config) -> None:
    """Nothing that is imported is garbage; and a worker of xdist will need all that a run does."""
    if hasattr(config, "workerinput"):
        import lorabench.launch.preload  # noqa: F401
    gc.disable()
    if hasattr(config, "workerinput"):
        _import_share(config)


def _import_share(config: pytest.Config) -> None:
    """A worker first imports files of its own: what pytest makes of their assertions is then there for all others,
    where each would make it of each."""
    number, count = int(config.workerinput["workerid"].removeprefix("gw")), config.workerinput["workercount"]
    folders = [Path(config.invocation_params.dir, argument) for argument in config.args]
    files = sorted(file for folder in folders if folder.is_dir() for file in folder.rglob("test_*.py"))
    for file in files[number::count]:
        importlib.import_module(".".join(file.relative_to(config.rootpath).with_suffix("").parts))


def pytest_collection_finish() -> None:
    """As in a run's own process: the meter's collections need not look through all that the tests have imported."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)  # as the commands do
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def impatient() -> Iterator[None]:
    """A claim that seems dead is looked at again at once, no file waits for the disk (a run has two dozen that would),
    the device's peak is measured by small products alone, which every run adds some of, and a race ends after its
    fewest rounds. Patched apart: many a test undoes what its own `monkeypatch` has done, and runs on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        patch.setattr("lorabench.store.claim.LOOK_AGAIN_SECONDS", 0.05)
        patch.setattr("lorabench.training.peak.SIZES", {"cpu": (256,)})
        patch.setattr("lorabench.training.inference.SECONDS", 0.0)
        yield


@pytest.fixture(autouse=True, scope="module")
def imported_for_good() -> None:
    """What the files before have imported is no garbage either: a collection would take longer with each of them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def counted_seldom(request: pytest.FixtureRequest) -> Iterator[None]:
    """FLOPs of a pass take a third of a short run's time. `test_flops` counts each; where runs are told of whole, they
    are counted once for each model and method; in all other tests they are six a parameter and position."""
    flops, name = sys.modules.get("lorabench.training.flops"), request.path.name
    with pytest.MonkeyPatch.context() as patch:
        if flops is not None and name in COUNTING:
            patch.setattr(flops, "of_pass", partial(_counted_once, flops.of_pass))
        elif flops is not None and name != "test_flops.py":
            patch.setattr(flops, "of_pass", _guessed)
        yield


COUNTING = ("test_ranks.py", "test_serving.py", "test_plan.py", "test_work.py")
_COUNTED: dict[tuple, int] = {}


def _guessed(copied, shape) -> int:
    return 6 * math.prod(shape) * sum(p.numel() for p in copied.parameters())


def _counted_once(count, copied, shape) -> int:
    layers = tuple((name, str(p.dtype), tuple(p.shape), p.requires_grad) for name, p in copied.named_parameters())
    key = (shape, str(copied), layers, str(copied.config), copied.training)
    if key not in _COUNTED:
        _COUNTED[key] = count(copied, shape)
    return _COUNTED[key]


def make_spec(**changes) -> RunSpec:
    """A run of a few steps on the built-in model; `changes` are the spec's own keys."""
    table = {
        "method": {"name": "lora", "rank": 2},
        "task": {"name": "text", "max_train": 16, "max_eval": 4},
        "seq_len": 32,
        "batch_size": 2,
        "steps": 6,
        "lr": 1e-2,
        "serving": False,
    }
    return decode(RunSpec, table | changes)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> None:
    """What is known of this machine stays in the tests, of processes that they start too: its peak is measured at
    length once, not by each worker."""
    os.environ["LORABENCH_CACHE"] = str(of_all_workers(tmp_path_factory) / "cache")


def of_all_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that xdist's workers share in this session."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@contextlib.contextmanager
def made_once(name: str) -> Iterator[tuple[Path, bool]]:
    """A folder of all workers, and whether one of them has filled it already; meanwhile the others wait."""
    folder = Path(os.environ["LORABENCH_CACHE"], name)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".made").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        yield folder, bool(file.read())
        file.write("yes")


@pytest.fixture(scope="session")
def tiny_bases(tmp_path_factory) -> dict[str, str]:
    """Folders of random models, 2 layers of width 64, with the built-in tokenizer: llama, gpt2, bert, roberta."""
    import torch
    import transformers as t

    torch.manual_seed(0)
    common = {"vocab_size": 1024, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
    llama = t.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, **common,
    )  # fmt: skip
    gpt2 = t.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=128, **common)
    bert = t.BertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, vocab_size=1024, pad_token_id=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    roberta = t.RobertaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=131, vocab_size=1024, pad_token_id=2, bos_token_id=0, eos_token_id=1,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    models = {
        "llama": t.LlamaForCausalLM(llama),
        "gpt2": t.GPT2LMHeadModel(gpt2),
        "bert": t.BertModel(bert),
        "roberta": t.RobertaModel(roberta),
    }
    return _saved(models, tmp_path_factory)


@pytest.fixture(scope="session")
def encoder_decoders(tmp_path_factory) -> dict[str, str]:
    """The same of models that write by a decoder of their own, two layers on either side: t5, bart."""
    import torch
    import transformers as t

    torch.manual_seed(0)
    common = {"vocab_size": 1024, "d_model": 64, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
    t5 = t.T5Config(
        d_ff=128, d_kv=16, num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=2, **common,
    )  # fmt: skip
    sides = {f"{side}_{key}": value for side in ("encoder", "decoder")
             for key, value in {"layers": 2, "ffn_dim": 128, "attention_heads": 4}.items()}  # fmt: skip
    bart = t.BartConfig(
        max_position_embeddings=128, dropout=0.0, decoder_start_token_id=1, init_std=0.2, **sides, **common
    )
    models = {"t5": t.T5ForConditionalGeneration(t5), "bart": t.BartForConditionalGeneration(bart)}
    models["t5"].shared.weight.data *= 0.1  # else each token that it writes is the one before it
    return _saved(models, tmp_path_factory)


def _saved(models, tmp_path_factory) -> dict[str, str]:
    """A folder of each, with the built-in tokenizer."""
    from transformers import AutoTokenizer

    from lorabench.models.base_model import BUILTIN

    tokenizer = AutoTokenizer.from_pretrained(BUILTIN / "tiny-llama")
    folders = {}
    for name, model in models.items():
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[name] = str(folder)
    return folders


@pytest.fixture(scope="session")
def labelled(tmp_path_factory) -> str:
    """A folder with a two-class data set that a model can learn: which of two words stands in the text."""
    folder = tmp_path_factory.mktemp("labelled")
    for split, rows in {"train": 64, "validation": 16, "test": 16}.items():
        lines = [f"the {'good' if i % 2 else 'bad'} film number {i}\t{i % 2}\n" for i in range(rows)]
        Path(folder, f"{split}.tsv").write_text("text\tlabel\n" + "".join(lines))
    return str(folder)

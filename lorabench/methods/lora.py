"""LoRA and its kin: ΔW = s B A with B (out, r), A (r, in); on a quantized base it is QLoRA.

Hu et al. 2021, arXiv 2106.09685. rsLoRA: Kalajdzievski 2023, arXiv 2312.03732; DoRA: Liu et al. 2024, arXiv 2402.09353;
LoRA+: Hayou, Ghosh and Yu 2024, arXiv 2402.12354; QLoRA: Dettmers et al. 2023, arXiv 2305.14314. Initializations:
PiSSA: Meng, Wang and Zhang 2024, arXiv 2404.02948; OLoRA: Büyükakyüz 2024, arXiv 2406.01775; LoftQ: Li et al. 2023,
arXiv 2310.08659; EVA, CorDA, LoRA-GA and MiLoRA: `_starts.py`. ReLoRA: `_restarts.py`. Attached, saved and loaded by
PEFT.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from lorabench.config.decode import InputError, Pattern, later, show
from lorabench.methods import _restarts, _starts
from lorabench.methods._parameters import parameter_updates, split_targets
from lorabench.methods._peft import ADAPTER, Tuner, head_updates, probe, tuned_heads, tuner_layers, write_norms
from lorabench.models import base_model as models
from lorabench.models import targets, weights
from lorabench.models.targets import Targets
from lorabench.spec.method import Factor, LoadBase
from lorabench.updates.update import INITIAL_FILE, Update, save_svds, save_updates

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn

    from lorabench.spec.run_spec import RunSpec

PerRank = Annotated[str, Pattern(r"[0-9]*\.?[0-9]+r", 'a number or a multiple of the rank such as "2r"')]
PEFT_INITS: dict[str, Any] = {"kaiming": True, "gaussian": "gaussian", "pissa": "pissa", "olora": "olora",
                              "orthogonal": "orthogonal", "loftq": True, "milora": True, "eva": True,
                              "corda": True, "lora_ga": True}  # fmt: skip
NUM_EXAMPLES, REWARMING = 32, 0.1


@dataclass(frozen=True, kw_only=True)
class Lora(Tuner):
    """r (M + N) parameters for each matrix. The scale s is alpha / rank, or alpha / √rank with `rslora`."""

    rank: Annotated[int, Ge(1)] = 8
    alpha: Annotated[float, Gt(0)] | PerRank = "2r"
    """A number, or a multiple of each layer's rank such as "2r": a fixed alpha and a fixed scale are different
    experiments."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    rslora: bool = False
    dora: bool = False
    """Learn the norm of each row of the weight apart from its direction: W = m (W0 + s B A) / ‖W0 + s B A‖."""
    init: Literal[
        "kaiming", "gaussian", "pissa", "olora", "orthogonal", "loftq", "milora", "eva", "corda", "lora_ga"
    ] = "kaiming"
    """`kaiming`, `gaussian`, `orthogonal` and `eva` begin at ΔW = 0, `eva` where the inputs of a layer vary most.
    `pissa`, `olora`, `milora`, `corda` (instruction-previewed) and `lora_ga` take s B0 A0 out of the base: ΔW is
    s (B A - B0 A0). `loftq` begins B A at what quantization lost, and ΔW counts from there."""
    init_examples: Annotated[int, Ge(1)] = later(NUM_EXAMPLES)
    """Of the training split, the first that the seed's order has: what `eva`, `corda` and `lora_ga` begin from."""
    lr_ratio: Annotated[float, Gt(0)] = 1.0
    """LoRA+: the learning rate of B over that of A and of all else that is trained."""
    rank_pattern: dict[str, Annotated[int, Ge(1)]] = field(default_factory=dict)
    """Ranks of their own for some layers: the end of a layer's name, or a regular expression -> rank, as in PEFT. Of
    several that fit a layer the first counts; the adapter's file has each such layer's own name."""
    alpha_pattern: dict[str, Annotated[float, Gt(0)]] = field(default_factory=dict)
    embeddings: bool = False
    """Factors for the input embedding too."""
    head: bool = False
    """Factors for a language model's output matrix too."""
    restart_every: Annotated[int, Ge(1)] | None = later(None)
    """ReLoRA: after every so many steps s B A is merged into the base, and A, B and the optimizer begin anew."""
    restart_warmup: Annotated[float, Ge(0), Le(1)] = later(REWARMING)
    """Share of the steps between restarts in which the learning rate then rises linearly to the schedule's again."""
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the trained factors."""

    @property
    def alpha_value(self) -> float:
        return self._alpha_of(self.rank)

    @property
    def alphas(self) -> dict[str, float]:
        """PEFT's `alpha_pattern`: a multiple of the rank holds for the ranks of `rank_pattern` too."""
        return {name: self._alpha_of(rank) for name, rank in self.rank_pattern.items()} | self.alpha_pattern

    def _alpha_of(self, rank: int) -> float:
        return float(self.alpha.removesuffix("r")) * rank if isinstance(self.alpha, str) else self.alpha

    @property
    def mixes_adapters(self) -> bool:
        return not self.dora

    @property
    def is_factors(self) -> bool:
        return not (self.dora or self.embeddings or self.head)

    def factors(self, model: Any) -> dict[str, Factor]:
        start = model.initial_factors if self.changes_base else {}
        return {
            name: Factor(
                A=module.lora_A[ADAPTER].weight,
                B=module.lora_B[ADAPTER].weight,
                scale=module.scaling[ADAPTER],
                dropout=self.dropout,
                start=start.get(name),
            )
            for name, module in tuner_layers(model)
        }

    def heads(self, model: Any) -> dict[str, nn.Module]:
        return dict(tuned_heads(model))

    @property
    def shares_passes(self) -> bool:
        return self.is_factors and not (self.num_start_examples or self.restart_every)

    @property
    def changes_base(self) -> bool:
        return self.init in _starts.TAKEN_OUT

    @property
    def merges_as_it_goes(self) -> bool:
        return self.restart_every is not None

    @property
    def num_start_examples(self) -> int:
        return self.init_examples if self.init in _starts.FROM_DATA else 0

    def num_stored(self, spec: RunSpec) -> int:
        return 2 if self.changes_base else 1 + (spec.total_steps - 1) // (self.restart_every or spec.total_steps)

    @property
    def trained_dtype(self) -> str:
        return self.adapter_dtype

    @property
    def starts_at_base(self) -> bool:
        return self.init != "loftq"

    def problems(self, spec: RunSpec) -> Iterator[str]:
        yield from super().problems(spec)
        if self.changes_base and spec.quantization != "none":
            yield (
                f'method.init = "{self.init}": takes its factors out of the base weights, which a quantized base '
                f'(quantization = "{spec.quantization}") cannot hold; "loftq" is made for it'
            )
        if self.init == "loftq" and spec.quantization == "none":
            yield 'method.init = "loftq": makes up for quantization; with quantization = "none" there is nothing to'
        if self.init == "orthogonal" and (self.rank % 2 or any(r % 2 for r in self.rank_pattern.values())):
            yield f'method.init = "orthogonal": needs even ranks, not method.rank = {self.rank}, {self.rank_pattern}'
        for key in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, key):
                try:
                    re.compile(pattern)
                except re.error as error:
                    yield f"method.{key}: {show(pattern)}: not a regular expression: {error}"
        if isinstance(self.alpha, str) and self.alpha_value == 0:
            yield f'method.alpha = "{self.alpha}": must be greater than 0'
        if (self.embeddings or self.head) and (self.dora or self.init not in ("kaiming", "gaussian")):
            what = "embeddings" if self.embeddings else "head"
            yield f"method.{what} = true: only without dora, and with init kaiming or gaussian"
        yield from self._start_problems(spec)
        yield from self._restart_problems(spec)
        if self.dora and self.rebased:
            yield f'method.dora = true: cannot be had with method.init = "{self.init}"'

    def _start_problems(self, spec: RunSpec) -> Iterator[str]:
        if self.init_examples != NUM_EXAMPLES and not self.num_start_examples:
            choices = ", ".join(_starts.FROM_DATA)
            yield f'method.init_examples = {self.init_examples}: method.init = "{self.init}" has none, only {choices}'
        if self.init == "lora_ga" and spec.objective.writes:
            yield (
                f'method.init = "lora_ga": begins from the gradient of the data\'s own answers, which objective '
                f"{spec.objective.name} does not train on"
            )

    def _restart_problems(self, spec: RunSpec) -> Iterator[str]:
        if self.restart_every is None:
            if self.restart_warmup != REWARMING:
                yield f"method.restart_warmup = {self.restart_warmup}: there is none without method.restart_every"
            return
        key = f"method.restart_every = {self.restart_every}"
        if spec.quantization != "none":
            yield (
                f'{key}: merges into the base weights, and quantized ones (quantization = "{spec.quantization}") would '
                "be rounded anew at each restart"
            )
        if self.init not in ("kaiming", "gaussian"):
            yield f'{key}: draws A anew, with init kaiming or gaussian, not method.init = "{self.init}"'
        if not self.is_factors:
            yield f"{key}: only without dora, embeddings and head"

    def about_update(self, spec: RunSpec) -> str:
        start = " with the initial factors on top, which make up for the quantization" if self.init == "loftq" else ""
        return super().about_update(spec) + start

    @property
    def about_storage(self) -> str:
        if self.restart_every:
            return "a LoRA of rank r for each restart and the last B A, which the untouched base takes"
        return "a LoRA of rank 2r, B A - B0 A0, which the untouched base takes" if self.changes_base else ""

    @property
    def rebased(self) -> bool:
        """Whether the product of the initial factors is not zero."""
        return self.changes_base or self.init == "loftq"

    def prepare(self, model: nn.Module) -> None:
        """Conv1D stays as it is where PEFT can have it so."""
        if self.init in ("olora", "milora", "corda", "lora_ga") or self.restart_every:
            weights.as_linear(model)
        if self.embeddings or self.head:
            weights.untie(model)

    def peft_config(self, model: nn.Module, spec: RunSpec) -> PeftConfig:
        from peft import LoraConfig

        found = targets.find(model, self.targets, self.layers)
        as_modules, as_parameters = split_targets(model, found)
        self._check_parameters(model, spec, as_parameters)
        self._check_convolutions(model, found.convolutions)
        names = [*as_modules, *found.convolutions]
        transposed = any(weights.is_conv1d(model.get_submodule(name)) for name in names)
        if self.embeddings:
            names.append(_embedding_of(model))
        if self.head:
            names.append(_name_of(model, model.get_output_embeddings(), "head"))
        self._check_patterns([*names, *as_parameters])
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha_value,  # type: ignore[arg-type]  # PEFT takes any number
            lora_dropout=self.dropout,
            target_modules=names,
            target_parameters=as_parameters or None,
            use_rslora=self.rslora,
            use_dora=self.dora,
            init_lora_weights=PEFT_INITS[self.init],
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=self.alphas,
            fan_in_fan_out=transposed,
        )

    def reach(self, found: Targets) -> Targets:
        return found

    def _check_convolutions(self, model: nn.Module, names: list[str]) -> None:
        """InputError for what is not done where the target is a convolution."""
        unfit = {"dora": self.dora, "init": self.init not in ("kaiming", "gaussian"),
                 "restart_every": self.restart_every is not None}  # fmt: skip
        key = next((key for key, is_so in unfit.items() if is_so), None)
        if names and key:
            raise InputError(
                f"method.{key} = {show(getattr(self, key))}: is not done on convolutions, as {names[0]} of "
                f"{type(model).__name__}; leave them out: method.targets"
            )

    def _check_parameters(self, model: nn.Module, spec: RunSpec, parameters: list[str]) -> None:
        """InputError for what PEFT cannot do where the target is a parameter, and not a layer."""
        unfit = {"dropout": self.dropout > 0, "dora": self.dora, "init": self.init not in ("kaiming", "gaussian"),
                 "restart_every": self.restart_every is not None}  # fmt: skip
        key = next((key for key, is_so in unfit.items() if is_so), None)
        packed = spec.quantization != "none" and any(
            weights.is_linear_layer(model.get_submodule(name.rpartition(".")[0])) for name in parameters
        )
        if not parameters or not (key or packed):
            return
        kinds = ", ".join(dict.fromkeys(".".join(name.removesuffix(".weight").split(".")[-2:]) for name in parameters))
        asked = f"method.{key} = {show(getattr(self, key))}" if key else f'quantization = "{spec.quantization}"'
        raise InputError(
            f"{asked}: PEFT cannot do so where LoRA is on a parameter itself, as on {kinds} of {type(model).__name__}; "
            'leave them out: method.targets = "attention", or a regular expression'
        )

    def _check_patterns(self, names: list[str]) -> None:
        """InputError for a pattern that fits no target: PEFT would pass over it in silence."""
        for key in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, key):
                if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                    kinds = sorted({name.rpartition(".")[2] for name in names})
                    raise InputError(f"method.{key}: {show(pattern)}: fits none of the targets: {', '.join(kinds)}")

    def without_effect(self, model: nn.Module) -> list[str]:
        """Patterns behind others that take all of their layers."""
        found, names = [], self._names(model)
        for key in ("rank_pattern", "alpha_pattern"):
            taken: set[str] = set()
            for pattern in getattr(self, key):
                fit = {name for name in names if re.match(rf"(.*\.)?({pattern})$", name)}
                found += [f"method.{key}: {show(pattern)}"] if fit and fit <= taken else []
                taken |= fit
        return found

    def ranks(self, model: nn.Module) -> dict[str, tuple[str, int]]:
        usual = ("method.rank", self.rank)
        patterns = [(p, (f"method.rank_pattern: {show(p)}", rank)) for p, rank in self.rank_pattern.items()]
        return {
            name: next((own for pattern, own in patterns if re.match(rf"(.*\.)?({pattern})$", name)), usual)
            for name in self._names(model)
        }

    def _names(self, model: nn.Module) -> list[str]:
        found = targets.find(model, self.targets, self.layers)
        return [*found.layers, *found.stacked, *found.convolutions]

    def attach(self, model: nn.Module, spec: RunSpec) -> nn.Module:
        tuned: Any = super().attach(model, spec)
        if self.init in ("milora", *_starts.FROM_DATA):
            _starts.check(self.init, tuned)
        if self.init == "loftq":
            _starts.quantization_error(tuned, spec)
        elif self.init == "milora":
            _starts.minor(tuned)
        if self.restart_every:
            _restarts.attach(tuned)
        self._note_start(tuned)
        return tuned

    def begin_from_data(self, model: nn.Module, losses: Sequence[Callable[[], Tensor]]) -> None:
        _starts.start(self.init, model, losses)
        self._note_start(model)

    def _note_start(self, tuned: Any) -> None:
        if self.rebased:  # a plain attribute: what a checkpoint or an optimizer holds is not changed by it
            tuned.initial_factors = {name: _factors(module) for name, module in tuner_layers(tuned)}

    def restart(self, model: nn.Module, spec: RunSpec, done: int) -> bool:
        from lorabench.spec.run_spec import method_seed

        if self.restart_every is None or done % self.restart_every or done == spec.total_steps:
            return False
        _restarts.begin_anew(model, method_seed(spec, restart=done // self.restart_every), PEFT_INITS[self.init])
        return True

    def lr_share(self, done: int) -> float:
        if self.restart_every is None or done < self.restart_every:
            return 1.0
        rising = math.ceil(self.restart_warmup * self.restart_every - 1e-9)  # as the run's own warm-up has it
        return min(1.0, (done % self.restart_every + 1) / rising) if rising else 1.0

    def trained_state(self, model: nn.Module) -> dict[str, Tensor]:
        return super().trained_state(model) | _restarts.state(model)

    def restore(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        if self.restart_every:
            _restarts.restore(model, state)
        super().restore(model, state)

    def layer_update(self, name: str, module: Any) -> Update:
        B, A = _factors(module)
        return Update(
            parameter=f"{name}.weight",
            B=probe(module) if self.dora else B * module.scaling[ADAPTER],
            A=None if self.dora else A,
            base_norm=weights.weight_norm(module.get_base_layer()),
            precision="float32" if self.dora else None,
            scale_source=None if self.dora else "config",
        )

    def layer_updates(self, model: Any, load_base: LoadBase) -> Iterator[Update]:
        initial: dict[str, tuple[Tensor, Tensor]] = getattr(model, "initial_factors", {})
        merged = getattr(model, "merged", [])
        for name, module in tuner_layers(model):
            if hasattr(module, "parameter_name"):
                yield from parameter_updates(name, module)
                continue
            update = self.layer_update(name, module)
            if name in initial:
                update = _since(update, initial[name], module)
            if merged:
                update = _restarts.whole(update, name, module, merged)
            yield update

    def save(self, model: Any, load_base: LoadBase, folder: Path, keep: str) -> None:
        if keep != "updates":
            save_svds(self.updates(model, load_base), folder, int(keep.removeprefix("svd:")))
            return
        models.save_peft(model, folder)
        updates = list(self.layer_updates(model, load_base))
        write_norms(updates, folder)
        times = 2 if self.changes_base else 1 + len(getattr(model, "merged", []))
        if times > 1:
            _save_for_untouched_base(self, updates, folder, times)
        elif self.init == "loftq":
            _save_initial(model.initial_factors, folder)
        dense = [*(updates if self.dora else []), *head_updates(model)]
        if dense:
            save_updates(dense, folder)

    def param_groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        if self.lr_ratio == 1:
            return super().param_groups(model, lr)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        is_B = {name: ".lora_B." in name or ".lora_embedding_B." in name for name in trained}
        return [
            {"params": [p for name, p in trained.items() if not is_B[name]], "lr": lr},
            {"params": [p for name, p in trained.items() if is_B[name]], "lr": lr * self.lr_ratio},
        ]


def _embedding_of(model: nn.Module) -> str:
    """InputError for an encoder-decoder, whose two sides each read the one matrix through a module of their own."""
    from torch import nn

    wanted = model.get_input_embeddings()
    others = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)
              and module is not wanted and module.weight is wanted.weight]  # fmt: skip
    if others:
        what = f"of {type(model).__name__} {' and '.join(others)} read one matrix"
        raise InputError(f"method.embeddings = true: {what}, and PEFT's factors can be put on a module alone")
    return _name_of(model, wanted, "embeddings")


def _name_of(model: nn.Module, wanted: nn.Module | None, what: str) -> str:
    for name, module in model.named_modules():
        if module is wanted:
            return name
    raise InputError(f"method.{what} = true: {type(model).__name__} has none")


def _factors(module: Any) -> tuple[Tensor, Tensor]:
    """Copies of B (M, r) and A (r, N), without the scale; of a convolution with its kernel flattened."""
    if ADAPTER in module.lora_embedding_A:
        return (
            module.lora_embedding_B[ADAPTER].detach().clone(),
            module.lora_embedding_A[ADAPTER].detach().clone(),
        )
    B, A = module.lora_B[ADAPTER].weight.detach(), module.lora_A[ADAPTER].weight.detach()
    return B.flatten(1).clone(), A.flatten(1).clone()


def _since(update: Update, initial: tuple[Tensor, Tensor], module: Any) -> Update:
    """s (B A - B0 A0) as the factors [s B, -s B0] and [A; A0], of rank up to 2 r; W0 is the base with s B0 A0."""
    import torch

    assert update.A is not None
    B0, A0 = (factor.to(update.B) for factor in initial)
    start = weights.dense_linear(module.get_base_layer()).weight + module.scaling[ADAPTER] * B0 @ A0
    return replace(
        update,
        B=torch.cat([update.B, -module.scaling[ADAPTER] * B0], 1),
        A=torch.cat([update.A, A0]),
        base_norm=float(start.norm()),
    )


def _save_for_untouched_base(method: Lora, updates: list[Update], folder: Path, times: int) -> None:
    """Rewrite a saved adapter, whose base was changed, as one of so many times the rank for the untouched base."""
    from safetensors.torch import load_file, save_file

    file, config_file = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    config = json.loads(config_file.read_text())
    tensors = {name: tensor for name, tensor in load_file(file).items() if ".lora_" not in name}
    for update in updates:
        assert update.A is not None
        tensors[f"base_model.model.{update.layer}.lora_A.weight"] = update.A.contiguous()
        tensors[f"base_model.model.{update.layer}.lora_B.weight"] = update.B.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    ranks = {name: times * rank for name, rank in config["rank_pattern"].items()}
    # The scale is in B already: alpha makes what PEFT multiplies by equal to 1.
    unit = (lambda rank: math.sqrt(rank)) if method.rslora else float
    changes = {"r": times * method.rank, "lora_alpha": unit(times * method.rank), "rank_pattern": ranks}
    changes |= {"alpha_pattern": {name: unit(rank) for name, rank in ranks.items()}, "init_lora_weights": True}
    config_file.write_text(json.dumps(config | changes, indent=2, sort_keys=True) + "\n")


def _save_initial(initial: dict[str, tuple[Tensor, Tensor]], folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = {
        f"{name}.{part}": tensor for name, pair in initial.items() for part, tensor in zip("BA", pair, strict=True)
    }
    save_file(tensors, folder / INITIAL_FILE)


EXAMPLE = Lora(rank=2)

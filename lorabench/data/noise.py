"""How noise is put on images for a denoiser to learn, by its pipeline's scheduler.

Diffusion (Ho et al. 2020, arXiv 2006.11239): x_t = √ᾱ_t x + √(1 - ᾱ_t) ε, for whole t from 0 to T - 1. Learned is ε
(`epsilon`), x (`sample`) or v = √ᾱ_t ε - √(1 - ᾱ_t) x (`v_prediction`; Salimans and Ho 2022, arXiv 2202.00512).

Flow matching (Lipman et al. 2022, arXiv 2210.02747; Esser et al. 2024, arXiv 2403.03206): x_σ = (1 - σ) x + σ ε, and
learned is ε - x. The denoiser is told T σ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lorabench.config.decode import InputError
from lorabench.config.quote import show

Times = Literal["uniform", "logit-normal"]
PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True, kw_only=True, eq=False)
class Noising:
    """Of a scheduler."""

    prediction: str
    """`epsilon`, `v_prediction`, `sample` or `flow`."""
    kept: NDArray[np.float64]
    """By t, T of them: ᾱ_t; of flow matching σ."""
    times: NDArray[np.float64]
    """What the denoiser is told of each t."""

    @classmethod
    def of(cls, scheduler: Any) -> Noising:
        """InputError for a scheduler that neither is."""
        name, config = type(scheduler).__name__, scheduler.config
        if "FlowMatch" in name:
            return cls(
                prediction="flow",
                kept=np.asarray(scheduler.sigmas, np.float64)[: config.num_train_timesteps],
                times=np.asarray(scheduler.timesteps, np.float64),
            )
        alphas, prediction = getattr(scheduler, "alphas_cumprod", None), config.get("prediction_type", "epsilon")
        if alphas is None or prediction not in PREDICTIONS:
            says = f"is known with alphas_cumprod and one of {', '.join(PREDICTIONS)}, or as flow matching"
            raise InputError(f"model: its scheduler {name} with prediction_type = {show(prediction)}: one {says}")
        kept = np.asarray(alphas, np.float64)
        return cls(prediction=prediction, kept=kept, times=np.arange(len(kept), dtype=np.float64))

    def place(self, u: float) -> int:
        """The t at a share u of all, in [0, 1)."""
        return min(int(u * len(self.kept)), len(self.kept) - 1)

    def drawn(self, draw: np.random.Generator, how: Times) -> int:
        """A t at random: all alike, or by σ(N(0, 1)), which has more of the middle."""
        u = draw.random() if how == "uniform" else 1 / (1 + np.exp(-draw.normal()))
        return self.place(u)

    def noisy(self, x: NDArray[Any], noise: NDArray[Any], t: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """What the denoiser is given of x, and what it is to say."""
        if self.prediction == "flow":
            sigma = self.kept[t]
            return ((1 - sigma) * x + sigma * noise).astype(np.float32), (noise - x).astype(np.float32)
        signal, spread = np.sqrt(self.kept[t]), np.sqrt(1 - self.kept[t])
        given = (signal * x + spread * noise).astype(np.float32)
        wanted = {"epsilon": noise, "sample": x, "v_prediction": signal * noise - spread * x}[self.prediction]
        return given, np.asarray(wanted, np.float32)

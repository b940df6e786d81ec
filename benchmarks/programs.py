"""Which settings compose programs that differ and have a rank above 1, and what these are worth.

Two tasks of seconds: MNIST digits from pixels, and policies that learn which of 18 actions belongs
to which of 18 observations (`policy_heads.py`). Beside the layer stand static controls.

    python benchmarks/programs.py --data-dir ~/data --seeds 0 1 2
    python benchmarks/programs.py --data-dir ~/data --tasks digits --only linear chosen

A finished run is not repeated. `python benchmarks/results.py pack LOGDIR` keeps the rows.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import re
import statistics
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import policy_heads
import torch
from stable_baselines3.common.envs import IdentityEnv
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor, nn
from torch.nn import functional as F

from ncrl import NeurocoderLinear
from ncrl.agents import A3C
from ncrl.baselines.lowrank import LowRankLinear
from ncrl.baselines.moe import cv_squared
from ncrl.diagnostics import participation_ratio, spread
from ncrl.layers import LAYERS, make_layer
from ncrl.neurocoder.orthogonality import distances_from_orthonormal
from ncrl.sb3 import MlpPolicy
from ncrl.sb3.regularise import with_gradient_of
from ncrl.shell.hardware import hardware, versions
from ncrl.tasks.classification import Classification
from ncrl.tasks.data import Images, load_mnist
from ncrl.tasks.experiment import evaluating, mutual_information
from ncrl.tasks.recipes import Recipe, count_parameters
from ncrl.tasks.results import Result, command_line, write_result
from ncrl.tasks.training import Run, train

TIMESTEPS, NUM_ACTIONS, NUM_ENVS = 16_000, policy_heads.NUM_ACTIONS, policy_heads.NUM_ENVS
TASKS = {"digits": 3e-3, "digits, 1e-3": 1e-3, "actions": 3e-3, "actions, 1e-2": 1e-2}
"""Learning rates of Adam."""

PROGRAMS = 500
"""Inputs whose programs are built in full."""

BASE: dict[str, Any] = {
    "num_slots": 30, "num_heads": 5, "num_least_used": 0, "key_dim": 8, "controller_size": 16,
    "residual": False,
}  # fmt: skip
CHOSEN = BASE | {"num_heads": 10, "sharpness": 10.0, "controller": "linear"}


@dataclass(frozen=True)
class Setting:
    """A kind of layer, and levers that layers have not got themselves."""

    layer: str = "neurocoder"
    """Of `ncrl.layers.LAYERS`; or `lowrank`; or `mlp`, with as many numbers as `CHOSEN`."""
    options: dict[str, Any] = field(default_factory=dict)
    final_sharpness: float | None = None
    """What the sharpness rises to, by the same factor each update."""
    balance: float = 0.0
    """Weight of `balance_loss`."""
    orthogonal_keys: float = 0.0
    """Weight of how far keys are from orthonormal."""
    standardise: bool = False
    """Whether programs are composed from each input's numbers at mean 0 and variance 1."""


def coded(base: dict[str, Any], levers: dict[str, Any] | None = None, **options: Any) -> Setting:
    """A Neurocoder layer's setting."""
    return Setting(options=base | options, **(levers or {}))


def around(base: dict[str, Any], name: str, rising: tuple[float, float]) -> dict[str, Setting]:
    """A setting and what each lever makes of it."""
    return {
        name: coded(base),
        f"{name}, rising": coded(base, {"final_sharpness": rising[1]}, sharpness=rising[0]),
        f"{name}, balance": coded(base, {"balance": 0.1}),
        f"{name}, orthogonal keys": coded(base, {"orthogonal_keys": 0.01}, key_dim=32),
        f"{name}, standardised": coded(base, {"standardise": True}),
        f"{name}, residual": coded(base, residual=True),
    }


SETTINGS: dict[str, Setting] = {
    "linear": Setting("linear", {"bias": True}),
    "rank 4": Setting("lowrank", {"rank": 4}),
    "mlp": Setting("mlp"),
    "film": Setting("film"),
    "hypernet": Setting("hypernet"),
    **{f"lstm {b:g}": coded(BASE, sharpness=b) for b in (1.0, 20.0)},
    **around(BASE | {"sharpness": 10.0}, "lstm 10", (1.0, 20.0)),
    "random projection": coded(BASE, sharpness=10.0, controller="projection", key_dim=16),
    "linear controller, 5 heads": coded(CHOSEN, num_heads=5),
    **around(CHOSEN, "chosen", (5.0, 20.0)),
}


class Head(nn.Module):
    """An output layer with the levers of its setting."""

    def __init__(self, setting: Setting, in_features: int, out_features: int) -> None:
        super().__init__()
        self.setting, sizes = setting, (in_features, out_features)
        options = setting.options
        if setting.layer == "mlp":
            with torch.device("meta"):
                numbers = count_parameters(NeurocoderLinear(*sizes, **CHOSEN))
            width = round((numbers - out_features) / (sum(sizes) + 1))
            parts = nn.Linear(in_features, width), nn.ReLU(), nn.Linear(width, out_features)
            self.layer: nn.Module = nn.Sequential(*parts)
        elif setting.layer == "lowrank":
            self.layer = LowRankLinear(*sizes, **options)
        else:
            read = {"context_features": in_features} if setting.standardise else {}
            self.layer = make_layer(setting.layer, *sizes, **options, **read)

    def description(self, x: Tensor) -> Tensor:
        """What programs are composed from, for inputs [B, in]."""
        return F.layer_norm(x, x.shape[-1:]) if self.setting.standardise else x

    def forward(self, x: Tensor) -> Tensor:
        read = [self.description(x)] if self.setting.standardise else []
        y: Tensor = self.layer(x, *read)
        return with_gradient_of(self.loss(x), y) if self.training else y

    def loss(self, x: Tensor) -> Tensor | None:
        """What the levers add to the loss, a scalar."""
        setting, layer = self.setting, self.layer
        terms = []
        if setting.balance and isinstance(layer, NeurocoderLinear):
            attention = torch.stack(layer.attend(self.description(x)))
            terms.append(setting.balance * balance_loss(attention))
        if setting.orthogonal_keys and isinstance(layer, NeurocoderLinear):
            keys = F.normalize(layer.memory.keys(), dim=2)
            terms.append(setting.orthogonal_keys * distances_from_orthonormal(list(keys)).sum())
        return torch.stack(terms).sum() if terms else None

    def sharpen(self, done: float) -> None:
        """Set the sharpness for what share of the training is done."""
        end = self.setting.final_sharpness
        if end is not None and isinstance(self.layer, NeurocoderLinear):
            start, composition = self.setting.options["sharpness"], self.layer.composition
            sharpness = start * (end / start) ** done
            composition.config = replace(composition.config, sharpness=sharpness)


def balance_loss(attention: Tensor) -> Tensor:
    """How unequally slots are attended to, for attention [3, B, R, P]: squared coefficient of
    variation over slots of the mean over inputs, the mean over memories and components."""
    used = attention.mean(1).flatten(0, 1)  # [3 R, P]
    return torch.stack([cv_squared(amounts) for amounts in used]).mean()


def measure(head: Head, x: Tensor, labels: Tensor) -> dict[str, float]:
    """What a head's programs are for inputs [N, in] of classes [N], none for kinds without:
    mean effective rank; `varies`, the share of their squared norm that is not their mean's; bits
    that a component's top slot tells about the class, mean and best; and per cent right, were all
    programs replaced by their mean or each by its best approximation of rank 1."""
    layer, read = head.layer, head.description(x)
    if not isinstance(layer, NeurocoderLinear):
        return {}
    few, classes = spread(x, PROGRAMS), spread(labels, PROGRAMS)
    programs = layer.program(spread(read, PROGRAMS))  # [n, in, out]
    mean, energy = programs.mean(0), programs.square().sum((1, 2)).mean()
    u, s, vh = torch.linalg.svd(programs, full_matrices=False)
    first = u[:, :, :1] * s[:, None, :1] @ vh[:, :1]
    tops = layer.attend(read).u.argmax(2)  # [N, R]
    counts = torch.zeros(tops.shape[1], int(labels.max()) + 1, layer.config.num_slots)
    for component, top in zip(counts, tops.T, strict=True):
        component.index_put_((labels, top), torch.tensor(1.0), accumulate=True)
    bits = mutual_information(counts)

    def right(outputs: Tensor) -> float:
        assert layer.bias is not None
        return 100 * float(((outputs + layer.bias).argmax(1) == classes).float().mean())

    return {
        "rank": float(participation_ratio(layer.active_program(spread(read, PROGRAMS))).mean()),
        "varies": float(1 - mean.square().sum() / energy),
        "bits": float(bits.mean()),
        "best_bits": float(bits.max()),
        "one_program": right(few @ mean),
        "rank_1": right(torch.bmm(few.unsqueeze(1), first).squeeze(1)),
    }


class Digits(Classification):
    """MNIST classified by a head."""

    def __init__(self, setting: Setting, recipe: Recipe, images: Images, seed: int) -> None:
        super().__init__(recipe, images, seed, readings={"setting": asdict(setting)})
        self.head = Head(setting, 784, 10)
        self.model = nn.Sequential(nn.Flatten(), self.head)

    def after_update(self, update: int) -> None:
        self.head.sharpen((update + 1) / self.num_updates)

    def evaluate(self) -> dict[str, float]:
        x, labels = self.images.test_images.flatten(1), self.images.test_labels
        return {**super().evaluate(), **measure(self.head, x, labels)}


def recipe_of(setting: Setting, rate: float) -> Recipe:
    """How a head learns digits."""
    kind = setting.layer if setting.layer in LAYERS else "linear"
    options = setting.options if kind == setting.layer else {}
    network = {"in_features": 784, "hidden": [], "num_outputs": 10}
    return Recipe(
        "mnist", "mlp", network, kind, options, learning_rate=rate, schedule="steps", epochs=3
    )


class Actions(policy_heads.Rewards):
    """Notes rewards and sets the heads' sharpness."""

    def _on_rollout_start(self) -> None:
        for head in (self.model.policy.action_net, self.model.policy.value_net):
            head.sharpen(min(1.0, self.num_timesteps / TIMESTEPS))


def learn_actions(run: Run, setting: Setting) -> Result:
    """Train a policy with such heads, and write the row."""

    class Policy(MlpPolicy):
        def _make_head(self, linear: nn.Module) -> nn.Module:
            assert isinstance(linear, nn.Linear)
            return Head(setting, int(linear.in_features), int(linear.out_features))

    options = {"net_arch": [64], "head": "neurocoder", "optimizer_class": torch.optim.Adam}
    env = DummyVecEnv([lambda: IdentityEnv(NUM_ACTIONS, ep_length=10)] * NUM_ENVS)
    model = A3C(
        Policy, env, n_steps=5, learning_rate=run.recipe.learning_rate, gamma=0.4, orth_coef=0.0, seed=run.seed,
        device="cpu", policy_kwargs=options,
    )  # fmt: skip
    rewards, began = Actions(), time.monotonic()
    model.learn(TIMESTEPS, callback=rewards)
    seconds = round(time.monotonic() - began, 2)
    policy, observations = model.policy, torch.arange(NUM_ACTIONS)
    with evaluating(policy):
        latent = policy.mlp_extractor.forward_actor(policy.extract_features(observations))
        measured = measure(policy.action_net, latent, observations)
    parts = torch.tensor(rewards.means).view(policy_heads.PARTS, -1)
    share: list[float] = (100 * parts.mean(1)).tolist()
    rate = run.recipe.learning_rate
    result = Result(
        task=run.task, name=run.name, seed=run.seed, layer=setting.layer,
        parameters=count_parameters(policy.action_net),
        metrics={"accuracy": statistics.fmean(share), "last": share[-1], **measured},
        data="18 observations", updates=model._n_updates, seconds=seconds,
        recipe={"timesteps": TIMESTEPS, "learning_rate": rate}, readings={"setting": asdict(setting)},
        curve=[{"update": i + 1, "accuracy": value} for i, value in enumerate(share)],
        command=command_line(), hardware=hardware(run.device), versions=versions(),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )  # fmt: skip
    write_result(run.folder, result)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--logdir", default="runs", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    flags = parser.parse_args()
    torch.set_num_threads(1)
    images = load_mnist(flags.data_dir).standardised()
    for seed, task, name in itertools.product(flags.seeds, flags.tasks, flags.only):
        setting, said = SETTINGS[name], f"{task}: {name}"
        folder = flags.logdir / "programs" / re.sub(r"\W+", "-", said) / f"seed-{seed}"
        os.makedirs(folder, exist_ok=True)
        recipe = recipe_of(setting, TASKS[task])
        run = Run("programs", said, recipe, seed, torch.device("cpu"), folder)
        torch.manual_seed(seed)
        if row := run.result:
            pass
        elif task.startswith("digits"):
            row = train(run, Digits(setting, recipe, images, seed))
        else:
            row = learn_actions(run, setting)
        print(row.line(), flush=True)


if __name__ == "__main__":
    main()

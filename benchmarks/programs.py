"""Which settings compose programs that differ and have a rank above 1, and what these are worth.

Two tasks of seconds: MNIST digits from pixels, and policies that learn which of 18 actions, the
number of Atari's, belongs to which of 18 observations. Beside the layer stand static and other
controls.

    python benchmarks/programs.py --data-dir ~/data --seeds 0 1 2
    python benchmarks/programs.py --data-dir ~/data --tasks digits --only linear chosen

A finished run is not repeated. `python benchmarks/results.py pack LOGDIR` keeps the rows.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from stable_baselines3.common.callbacks import BaseCallback
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
from ncrl.shell.lock import locked
from ncrl.tasks.classification import Classification
from ncrl.tasks.command import in_one_line
from ncrl.tasks.data import Images, load_mnist
from ncrl.tasks.experiment import evaluating, mutual_information
from ncrl.tasks.polynomial.experiment import count_pairs
from ncrl.tasks.recipes import Recipe, count_parameters
from ncrl.tasks.results import Result, provenance, write_result
from ncrl.tasks.training import Run, train

TASKS = {
    **{"digits": 3e-3, "digits, 1e-3": 1e-3},
    **{"actions": 3e-3, "actions, 1e-2": 1e-2, "actions, 3e-2": 3e-2},
}
"""Learning rates of Adam."""

NUM_ACTIONS, NUM_ENVS, TIMESTEPS = 18, 16, 16_000
PARTS = 8  # of a training on actions, which rows show one by one
PROGRAMS = 500  # inputs whose programs are built in full

BASE: dict[str, Any] = {
    "num_slots": 30, "num_heads": 5, "num_least_used": 0, "key_dim": 8, "controller_size": 16,
    "residual": False,
}  # fmt: skip
CHOSEN = BASE | {"num_heads": 10, "sharpness": 10.0, "controller": "linear"}


class Setting(NamedTuple):
    """A kind of layer (`mlp`: with as many numbers as `CHOSEN`), and levers beside its options."""

    layer: str
    options: dict[str, Any]
    final_sharpness: float | None = None  # what it rises to, by the same factor each update
    balance: float = 0.0  # weight of `balance_loss`
    orthogonal_keys: float = 0.0  # weight of how far keys are from orthonormal
    standardise: bool = False  # compose from each input's numbers at mean 0 and variance 1


def levers(name: str, base: dict[str, Any], low: float, high: float) -> dict[str, Setting]:
    """A setting and what each lever makes of it; a rising sharpness goes from `low` to `high`."""
    setting = Setting("neurocoder", base)
    return {
        name: setting,
        f"{name}, rising": Setting("neurocoder", base | {"sharpness": low}, final_sharpness=high),
        f"{name}, balance": setting._replace(balance=0.1),
        f"{name}, orthogonal keys": Setting(
            "neurocoder", base | {"key_dim": 32}, orthogonal_keys=0.01
        ),
        f"{name}, standardised": setting._replace(standardise=True),
        f"{name}, residual": Setting("neurocoder", base | {"residual": True}),
    }


PROJECTION = {"controller": "projection", "key_dim": 16, "sharpness": 10.0}
SETTINGS = {
    "linear": Setting("linear", {"bias": True}),
    "rank 4": Setting("lowrank", {"rank": 4}),
    **{name: Setting(name, {}) for name in ("mlp", "film", "hypernet")},
    **{f"lstm {b:g}": Setting("neurocoder", BASE | {"sharpness": b}) for b in (1.0, 20.0)},
    **levers("lstm 10", BASE | {"sharpness": 10.0}, 1, 20),
    "random projection": Setting("neurocoder", BASE | PROJECTION),
    "linear controller, 5 heads": Setting("neurocoder", CHOSEN | {"num_heads": 5}),
    **levers("chosen", CHOSEN, 5, 20),
}


class Head(nn.Module):
    """An output layer with the levers of its setting."""

    def __init__(self, setting: Setting, in_features: int, out_features: int) -> None:
        super().__init__()
        self.setting, sizes = setting, (in_features, out_features)
        if setting.layer == "mlp":
            with torch.device("meta"):
                numbers = count_parameters(NeurocoderLinear(*sizes, **CHOSEN))
            width = round((numbers - out_features) / (sum(sizes) + 1))
            parts = nn.Linear(in_features, width), nn.ReLU(), nn.Linear(width, out_features)
            self.layer: nn.Module = nn.Sequential(*parts)
        elif setting.layer == "lowrank":
            self.layer = LowRankLinear(*sizes, **setting.options)
        else:
            read: dict[str, Any] = {"context_features": in_features} if setting.standardise else {}
            self.layer = make_layer(setting.layer, *sizes, **{**setting.options, **read})

    def description(self, x: Tensor) -> Tensor:
        """What programs are composed from, for inputs [B, in]."""
        return F.layer_norm(x, x.shape[-1:]) if self.setting.standardise else x

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x, *([self.description(x)] if self.setting.standardise else []))
        return with_gradient_of(self.loss(x), y) if self.training else y

    def loss(self, x: Tensor) -> Tensor | None:
        """What the levers add to the loss, a scalar."""
        if not isinstance(self.layer, NeurocoderLinear):
            return None
        terms = []
        if self.setting.balance:
            attention = torch.stack(self.layer.attend(self.description(x)))
            terms.append(self.setting.balance * balance_loss(attention))
        if self.setting.orthogonal_keys:
            keys = distances_from_orthonormal(list(F.normalize(self.layer.memory.keys(), dim=2)))
            terms.append(self.setting.orthogonal_keys * keys.sum())
        return torch.stack(terms).sum() if terms else None

    def sharpen(self, done: float) -> None:
        """Set the sharpness for what share of the training is done."""
        if self.setting.final_sharpness and isinstance(self.layer, NeurocoderLinear):
            start, composition = self.setting.options["sharpness"], self.layer.composition
            sharpness = start * (self.setting.final_sharpness / start) ** done
            composition.config = replace(composition.config, sharpness=sharpness)


def balance_loss(attention: Tensor) -> Tensor:
    """How unequally slots are attended to, for attention [3, B, R, P]: squared coefficient of
    variation over slots of the mean over inputs, the mean over memories and components."""
    return torch.stack([cv_squared(used) for used in attention.mean(1).flatten(0, 1)]).mean()


def measure(head: Head, x: Tensor, labels: Tensor) -> dict[str, float]:
    """What a head's programs are for inputs [N, in] of classes [N], nothing for other layers:
    mean effective rank; `varies`, the share of their squared norm that is not their mean's; bits
    that a component's top slot tells about the class, mean and best; and per cent right, were all
    programs replaced by their mean, or each by its best approximation of rank 1."""
    layer, read = head.layer, head.description(x)
    if not isinstance(layer, NeurocoderLinear):
        return {}
    few, classes, read_few = (spread(values, PROGRAMS) for values in (x, labels, read))
    programs = layer.program(read_few)  # [n, in, out]
    mean, energy = programs.mean(0), programs.square().sum((1, 2)).mean()
    u, s, vh = torch.linalg.svd(programs, full_matrices=False)
    first = u[:, :, :1] * s[:, None, :1] @ vh[:, :1]
    tops = layer.attend(read).u.argmax(2).T  # [R, N]
    bits = mutual_information(count_pairs(labels.expand(tops.shape), tops))
    bias = layer.bias if layer.bias is not None else 0.0
    answers = few @ mean + bias, torch.bmm(few.unsqueeze(1), first).squeeze(1) + bias
    right = [100 * float((answer.argmax(1) == classes).float().mean()) for answer in answers]
    return {
        "rank": float(participation_ratio(layer.active_program(read_few)).mean()),
        "varies": float(1 - mean.square().sum() / energy),
        **{"bits": float(bits.mean()), "best_bits": float(bits.max())},
        **{"one_program": right[0], "rank_1": right[1]},
    }


class Digits(Classification):
    """MNIST classified by a head."""

    def __init__(self, setting: Setting, recipe: Recipe, images: Images, seed: int) -> None:
        super().__init__(recipe, images, seed, readings={"setting": setting._asdict()})
        self.head = Head(setting, 784, 10)
        self.model = nn.Sequential(nn.Flatten(), self.head)

    def loss(self, update: int) -> Tensor:
        self.head.sharpen(update / self.num_updates)  # a resumed run has only its start
        return super().loss(update)

    def after_update(self, update: int) -> None:
        self.head.sharpen((update + 1) / self.num_updates)

    def evaluate(self) -> dict[str, float]:
        x, labels = self.images.test_images.flatten(1), self.images.test_labels
        return {**super().evaluate(), **measure(self.head, x, labels)}


def recipe_of(setting: Setting, rate: float) -> Recipe:
    """How a head learns digits."""
    known = setting.layer in LAYERS
    layer, options = (setting.layer, setting.options) if known else ("linear", {})
    network = {"in_features": 784, "hidden": [], "num_outputs": 10}
    return Recipe("mnist", "mlp", network, layer, options, "adam", rate, "steps", epochs=3)


class Actions(BaseCallback):
    """Notes the mean reward of every timestep, and sets the heads' sharpness."""

    def __init__(self) -> None:
        super().__init__()
        self.means: list[float] = []

    def _on_step(self) -> bool:
        self.means.append(float(self.locals["rewards"].mean()))
        return True

    def _on_rollout_start(self) -> None:
        for head in (self.model.policy.action_net, self.model.policy.value_net):
            assert isinstance(head, Head)
            head.sharpen(min(1.0, self.num_timesteps / TIMESTEPS))


def learn_actions(run: Run, setting: Setting) -> Result:
    """Train a policy with such heads, and write the row."""

    class Policy(MlpPolicy):
        def _make_head(self, linear: nn.Module) -> nn.Module:
            assert isinstance(linear, nn.Linear)
            return Head(setting, int(linear.in_features), int(linear.out_features))

    rate, actions, began = run.recipe.learning_rate, Actions(), time.monotonic()
    env = DummyVecEnv([lambda: IdentityEnv(NUM_ACTIONS, ep_length=10)] * NUM_ENVS)
    body = {"net_arch": [64], "optimizer_class": torch.optim.Adam, "head": "neurocoder"}
    model = A3C(
        Policy,
        env,
        n_steps=5,
        learning_rate=rate,
        gamma=0.4,
        orth_coef=0.0,
        seed=run.seed,
        device="cpu",
        policy_kwargs=body,
    )
    model.learn(TIMESTEPS, callback=actions)
    policy, observations, head = model.policy, torch.arange(NUM_ACTIONS), model.policy.action_net
    assert isinstance(head, Head)
    with evaluating(policy):
        features = policy.extract_features(observations)
        assert isinstance(features, Tensor)  # actor and critic share them
        measured = measure(head, policy.mlp_extractor.forward_actor(features), observations)
    parts = 100 * torch.tensor(actions.means).view(PARTS, -1).mean(1)
    curve = [{"update": i + 1, "accuracy": part} for i, part in enumerate(parts.tolist())]
    result = Result(
        run.task, run.name, run.seed, setting.layer, count_parameters(head),
        {"accuracy": float(parts.mean()), "last": float(parts[-1]), **measured}, "18 observations",
        model._n_updates, round(time.monotonic() - began, 2),
        {"timesteps": TIMESTEPS, "learning_rate": rate}, {"setting": setting._asdict()},
        curve=curve, **provenance(run.device),
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
        recipe = recipe_of(setting, TASKS[task])
        run = Run("programs", said, recipe, seed, torch.device("cpu"), folder)
        with locked(folder, wait=True):
            torch.manual_seed(seed)
            row = run.result
            if row is None and task.startswith("digits"):
                row = train(run, Digits(setting, recipe, images, seed))
            elif row is None:
                row = learn_actions(run, setting)
        print(row.line(), flush=True)


if __name__ == "__main__":
    sys.exit(in_one_line("programs.py", main))

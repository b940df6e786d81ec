"""The training loop of the supervised experiments: resumable, and the same bit for bit if resumed.

A task is an `Experiment`. What it trains on must follow from the number of the update alone, so
that nothing about the data has to be stored: `random_stream` makes random streams that do.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from ncrl import orthogonal_loss
from ncrl.baselines import balance_loss, record_gates
from ncrl.optimizer_state import check_optimizer_state
from ncrl.shell.events import CurveWriter
from ncrl.shell.hardware import random_state, set_random_state
from ncrl.shell.screen import Progress
from ncrl.shell.signals import Stopped, StopSignals, stop_signals
from ncrl.shell.tensors import read_tensors, size_of, write_tensors
from ncrl.tasks.experiment import Experiment, evaluating
from ncrl.tasks.recipes import OPTIMIZERS, Recipe, count_parameters
from ncrl.tasks.results import (
    RESULT_FILE,
    Result,
    fingerprint,
    provenance,
    read_result,
    write_result,
)

CHECKPOINT_FILE, WEIGHTS_FILE, RECIPE_FILE = "checkpoint.pt", "model.pt", "recipe.json"

CHECKPOINT_SIZE = 12
"""Times the size of the model that a checkpoint may take: the optimiser keeps up to two numbers for
each weight, a method against forgetting up to five."""

CHECKPOINT_SECONDS = 60.0  # least time between checkpoints
CHECK_EVERY = 20  # updates between looks at the loss: each look waits for the device


class NonFiniteError(RuntimeError):
    """The loss, or a weight, is no longer a finite number."""


class Run(NamedTuple):
    """One recipe with one seed, and where it is kept."""

    task: str
    name: str
    recipe: Recipe
    seed: int
    device: torch.device
    folder: Path
    labels: Mapping[str, str] = MappingProxyType({})

    @property
    def result(self) -> Result | None:
        """The row, if the run is finished, with the labels that it has now."""
        path = self.folder / RESULT_FILE
        if not os.path.lexists(path):
            return None
        row = read_result(path)
        if (row.task, row.name, row.seed) != (self.task, self.name, self.seed):
            raise ValueError(f"{path} is the row of another run; delete it to start anew")
        return replace(row, labels=dict(self.labels))

    @property
    def title(self) -> str:
        """The run's name in progress and messages."""
        return f"{self.name}, seed {self.seed}"


def identity(recipe: Recipe, experiment: Experiment) -> dict[str, Any]:
    """What makes two runs the same but for the seed, as plain values."""
    settings = {k: v for k, v in asdict(recipe).items() if k not in ("paper_parameters", "note")}
    return {"recipe": settings, "data": experiment.data, "readings": dict(experiment.readings)}


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimiser of all parameters that are trained."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    if recipe.optimizer in ("sgd", "rmsprop"):
        options["momentum"] = recipe.momentum
    if recipe.optimizer == "rmsprop":
        options["alpha"] = recipe.rmsprop_alpha
    elif not options.get("momentum") and all(p.device.type == "cpu" for p in parameters):
        # One pass over the weights; on CUDA torch has such a default. With momentum it would take
        # no output layer whose first gradient comes with a later task.
        options["fused"] = True
    return OPTIMIZERS[recipe.optimizer](parameters, **options)


def learning_rate(recipe: Recipe, update: int, num_updates: int) -> float:
    """The learning rate of one update out of `num_updates`, counted from 0."""
    rate = recipe.learning_rate
    if recipe.schedule == "steps":
        rate *= 0.1 ** ((2 * update >= num_updates) + (4 * update >= 3 * num_updates))
    return rate


def train(run: Run, experiment: Experiment) -> Result:
    """Train to the end, from the last checkpoint if there is one, and write the row.

    Raises `NonFiniteError`; `Stopped` at SIGINT or SIGTERM, with a checkpoint written; ValueError
    for a checkpoint that cannot be used.
    """
    training = Training(run, experiment)
    training.resume()
    with (
        stop_signals() as stop,
        Progress(run.title, experiment.num_updates, training.update) as progress,
        # Points after the last checkpoint of a killed run are written again.
        contextlib.closing(CurveWriter(run.folder, training.update + 1)) as writer,
    ):
        training.loop(stop, progress, writer)
    return training.finish()


class Training:
    """State of a run between updates."""

    def __init__(self, run: Run, experiment: Experiment) -> None:
        self.run, self.experiment, self.recipe = run, experiment, run.recipe
        self.model = experiment.model
        self.optimizer = experiment.optimizer = make_optimizer(run.recipe, self.model)
        self.update = 0  # updates done
        self.seconds = 0.0  # spent before `_began`
        self.curve: list[dict[str, float]] = []
        self.losses: list[Tensor] = []  # of the updates since the last look
        self._loss_sum, self._loss_count = 0.0, 0  # since the last evaluation
        self._began = self._saved = time.monotonic()

    def loop(self, stop: StopSignals, progress: Progress, writer: CurveWriter) -> None:
        """Update until the end or a signal; evaluate and save in between."""
        self.model.train()
        while self.update < self.experiment.num_updates:
            self.step()
            at_end = self.update == self.experiment.num_updates
            if self.update % CHECK_EVERY == 0:
                self._check_losses()
                progress.show(self.update, self._mean_loss())
            if self.update % self.experiment.evaluate_every == 0 or at_end:
                measured = self._evaluate()
                for name, value in measured.items():
                    writer.add(f"{self.run.task}/{name}", value, self.update)
                progress.measured(measured)
            if stop.exit_code:
                self.save()
                raise Stopped(stop.exit_code)
            if not at_end and time.monotonic() - self._saved >= CHECKPOINT_SECONDS:
                self.save()

    def step(self) -> None:
        """One update."""
        rate = learning_rate(self.recipe, self.update, self.experiment.num_updates)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        with record_gates(self.model) as gates:
            total = loss = self.experiment.loss(self.update)
        if gates:
            total = total + self.recipe.balance_coef * balance_loss(gates)
        if self.recipe.orth_coef:
            total = total + self.recipe.orth_coef * orthogonal_loss(self.model)
        total.backward()  # type: ignore[no-untyped-call]
        if self.recipe.max_grad_norm is not None:
            clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm)
        self.optimizer.step()
        self.losses.append(loss.detach())
        self.experiment.after_update(self.update)
        self.update += 1

    def _check_losses(self) -> None:
        values = torch.stack(self.losses).tolist() if self.losses else []
        self.losses.clear()
        for update, value in enumerate(values, self.update - len(values)):
            if not math.isfinite(value):
                raise self._not_finite(f"the loss of update {update} is {value}")
            self._loss_sum += value  # one by one: the sum must not depend on when it is looked at
        self._loss_count += len(values)

    def _check_weights(self) -> None:
        """Look at what the last update made of them, of which no loss tells."""
        for name, weight in self.model.named_parameters():
            if not weight.isfinite().all():
                raise self._not_finite(f"{name} is not finite after {self.update} updates")

    def _not_finite(self, what: str) -> NonFiniteError:
        return NonFiniteError(
            f"{self.run.title}: {what}; lower learning_rate ({self.recipe.learning_rate:g}) or set "
            f"max_grad_norm ({self.recipe.max_grad_norm})"
        )

    def _mean_loss(self) -> float:
        return self._loss_sum / max(self._loss_count, 1)

    def _evaluate(self) -> dict[str, float]:
        self._check_losses()
        self._check_weights()
        with evaluating(self.model):
            measured = {"loss": self._mean_loss(), **self.experiment.evaluate()}
        self.curve.append({"update": self.update, **measured})
        self._loss_sum, self._loss_count = 0.0, 0
        return measured

    def finish(self) -> Result:
        """Write weights and row, and clear the checkpoint away."""
        experiment, run = self.experiment, self.run
        metrics = {k: v for k, v in self.curve[-1].items() if k != "update"}
        for name, choose in experiment.best.items():
            values = [row[name] for row in self.curve]
            metrics[f"best_{name}"] = max(values) if choose == "max" else min(values)
        with evaluating(self.model):
            details = experiment.report()
        result = Result(
            task=run.task,
            name=run.name,
            seed=run.seed,
            layer=run.recipe.layer,
            parameters=count_parameters(self.model),
            metrics=metrics,
            updates=self.update,
            seconds=round(self._elapsed(), 2),
            **identity(run.recipe, experiment),
            details=details,
            labels=dict(run.labels),
            curve=self.curve,
            **provenance(run.device),
        )
        write_tensors(run.folder / WEIGHTS_FILE, self.model.state_dict())
        write_result(run.folder, result)
        (run.folder / CHECKPOINT_FILE).unlink(missing_ok=True)
        return result

    def _elapsed(self) -> float:
        return self.seconds + time.monotonic() - self._began

    def save(self) -> None:
        """Write everything that the next update depends on; never anything that is not finite."""
        self._check_losses()
        self._check_weights()
        state = {
            "identity": self._mark(),
            "update": self.update,
            "seconds": self._elapsed(),
            "curve": self.curve,
            "loss": [self._loss_sum, self._loss_count],
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": random_state(self.run.device),
            "experiment": self.experiment.state(),
        }
        write_tensors(self.run.folder / CHECKPOINT_FILE, state)
        self._saved = time.monotonic()

    def resume(self) -> None:
        """Go on from the checkpoint in the run's folder, if there is one."""
        path = self.run.folder / CHECKPOINT_FILE
        if not os.path.lexists(path):
            return
        anew = "delete it to start anew"
        try:
            state = read_tensors(path, CHECKPOINT_SIZE * size_of(self.model))
        except ValueError as error:
            raise ValueError(f"{error}; {anew}") from error
        if not isinstance(state, dict) or state.get("identity") != self._mark():
            raise ValueError(f"{path} is no checkpoint of this run; {anew}")
        try:
            self._restore(state)
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} cannot be used: {reason}; {anew}") from error

    def _restore(self, state: Mapping[str, Any]) -> None:
        update = state["update"]
        if type(update) is not int or not 0 <= update <= self.experiment.num_updates:
            raise ValueError(f"update must lie in 0 .. {self.experiment.num_updates}, got {update}")
        self.experiment.restore(state["experiment"])  # first: it may give parameters their sizes
        check_optimizer_state(self.optimizer, state["optimizer"], most_steps=update)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            if "fused" in group:  # the checkpoint may be older than our choice
                group["fused"] = self.optimizer.defaults["fused"]
        self.update, self.seconds, self.curve = update, state["seconds"], state["curve"]
        self._loss_sum, self._loss_count = state["loss"]
        set_random_state(state["random"], self.run.device)

    def _mark(self) -> str:
        mark = fingerprint(identity(self.recipe, self.experiment))
        return f"{mark} {self.experiment.num_updates} seed {self.run.seed}"


def load_weights(run: Run, model: nn.Module) -> None:
    """Put the weights of a finished run into a model; names the file if they do not fit."""
    path = run.folder / WEIGHTS_FILE
    weights = read_tensors(path, size_of(model), foreign=True)
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} does not fit the network: {reason}") from error

"""Methods against forgetting, for any model: what they add to the loss, what a task's end changes.

All but `Grow` are as Hsu et al. use them ("Re-evaluating Continual Learning Scenarios", 2018):
quadratic penalties coef * sum Omega (theta - theta*)^2, without 1/2, on the weights of the tasks
before. They differ in what a weight's importance Omega is, and in what theta* it is held to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from ncrl.checks import suggest
from ncrl.neurocoder import NeurocoderLinear
from ncrl.neurocoder.composition import ProjectionNetwork
from ncrl.seat import eval_mode
from ncrl.shell.tensors import check_like
from ncrl.tasks.continual.gradients import Parameters, SampleGradients, SampleLoss

DAMPING = 0.1  # keeps the importance of weights that hardly move finite in synaptic intelligence


class Method:
    """Plain training, which does nothing about forgetting; base of the others.

    A new method is a subclass and a line of `METHODS`; its penalty's usual weight, if it has one,
    stands in `ncrl.tasks.continual.split.COEFS`.
    """

    def __init__(self, model: nn.Module, coef: float = 0.0) -> None:
        self.model = model
        self.coef = coef
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def begin_task(self, inputs: Tensor, optimizer: Optimizer | None) -> None:
        """Called before a task is learnt, the first one too, with all its training inputs [N, ...]
        and the model's optimiser, None before there is one."""

    def loss(self, task_loss: Tensor, inputs: Tensor | None = None) -> Tensor:
        """What is minimised, from the loss of the task at hand on a batch of inputs."""
        return task_loss

    def after_update(self) -> None:
        """Called after every step of the optimiser, while its gradients are still there."""

    def end_task(self, inputs: Tensor, sample_loss: SampleLoss) -> None:
        """Called when a task has been learnt, with all its training inputs [N, ...] and its loss,
        summed over samples; see `own_label_loss`."""

    def state(self) -> dict[str, Any]:
        """All that is remembered, in tensors, to go on from."""
        return {}

    def restore(self, state: Mapping[str, Any], optimizer: Optimizer | None = None) -> None:
        """Take over what `state` returned, wherever its tensors are."""

    def placed(self, tensors: Mapping[str, Tensor]) -> Parameters:
        """Tensors by the names of all parameters, or none, each where its parameter is."""
        if tensors and set(tensors) != set(self.parameters):
            raise ValueError("the method's state is of other parameters")
        return {
            name: check_like(tensor, self.parameters[name], name).to(self.parameters[name].device)
            for name, tensor in tensors.items()
        }


class Quadratic(Method):
    """A penalty that holds every weight to an anchor, with a strength of its own; before the first
    task's end there is none."""

    # Names of its dictionaries of tensors by parameter, which are its state.
    KEPT: tuple[str, ...] = ("importance", "anchor")

    def __init__(self, model: nn.Module, coef: float) -> None:
        super().__init__(model, coef)
        self.importance = {n: torch.zeros_like(p) for n, p in self.parameters.items()}
        self.anchor: Parameters = {}

    def loss(self, task_loss: Tensor, inputs: Tensor | None = None) -> Tensor:
        return task_loss + self.penalty() if self.anchor else task_loss

    def penalty(self) -> Tensor:
        """coef * sum Omega (theta - theta*)^2, a scalar."""
        weighted: Any = _WeightedSquare.apply
        penalty: Tensor = self.coef * sum(
            weighted(p, self.importance[n], self.anchor[n]) for n, p in self.parameters.items()
        )
        return penalty

    def move_anchor(self) -> None:
        """Hold weights to what they are now."""
        self.anchor = {n: p.detach().clone() for n, p in self.parameters.items()}

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.KEPT}

    def restore(self, state: Mapping[str, Any], optimizer: Optimizer | None = None) -> None:
        for name in self.KEPT:
            setattr(self, name, self.placed(state[name]))


class L2(Quadratic):
    """Every weight is as important as any other; the anchor is the end of the last task."""

    def end_task(self, inputs: Tensor, sample_loss: SampleLoss) -> None:
        """Only the weights matter."""
        for importance in self.importance.values():
            importance.fill_(1)
        self.move_anchor()


class SynapticIntelligence(Quadratic):
    """Zenke et al. 2017: a weight's importance is its share in what the loss fell on the way.

    omega sums -gradient * step, for the gradient of the loss without penalty, and at a task's end
    Omega grows by max(omega, 0) / (distance moved in the task^2 + damping). The clamp is ours: a
    negative Omega would make the penalty unbounded below. Gradients must not be clipped: what the
    penalty added to them is taken out again.
    """

    KEPT = (*Quadratic.KEPT, "path", "start", "last")

    def __init__(self, model: nn.Module, coef: float) -> None:
        super().__init__(model, coef)
        self.path = {n: torch.zeros_like(p) for n, p in self.parameters.items()}  # omega
        self.start = {n: p.detach().clone() for n, p in self.parameters.items()}
        self.last = {n: p.detach().clone() for n, p in self.parameters.items()}

    @torch.no_grad()
    def after_update(self) -> None:
        """Add the step just made to the path."""
        for name, parameter in self.parameters.items():
            gradient, last = parameter.grad, self.last[name]
            if gradient is None:
                continue
            if self.anchor:
                # What autograd summed up contains the penalty's gradient at the weights before.
                pull = (last - self.anchor[name]) * self.importance[name]
                gradient = gradient.sub(pull, alpha=2 * self.coef)
            self.path[name].addcmul_(gradient, last - parameter)
            last.copy_(parameter)

    @torch.no_grad()
    def end_task(self, inputs: Tensor, sample_loss: SampleLoss) -> None:
        """Importance follows from the path alone."""
        for name, parameter in self.parameters.items():
            moved = parameter - self.start[name]
            self.importance[name] += self.path[name].clamp_min(0) / (moved.square() + DAMPING)
            self.path[name].zero_()
        self.move_anchor()
        self.start = {n: p.clone() for n, p in self.anchor.items()}


class OnlineEwc(Quadratic):
    """Elastic weight consolidation with one anchor: Fisher information summed over tasks.

    `extra_loss` is one without samples, such as an orthogonality loss; its gradient is then added
    to that of every sample before it is squared, as in the Neurocoder authors' code. For their runs
    only: the information of a loss that knows no data says nothing about a task.
    """

    def __init__(self, model: nn.Module, coef: float) -> None:
        super().__init__(model, coef)
        self.extra_loss: Callable[[], Tensor] | None = None

    def end_task(self, inputs: Tensor, sample_loss: SampleLoss) -> None:
        for name, fisher in self.fisher(inputs, sample_loss).items():
            self.importance[name] += fisher
        self.move_anchor()

    def fisher(self, inputs: Tensor, sample_loss: SampleLoss) -> Parameters:
        """Mean square of the gradients by all samples alone, in eval mode: the diagonal of the
        Fisher information, at the label that the model itself finds likeliest."""
        with eval_mode(self.model):
            sums = SampleGradients(self.model, sample_loss, inputs[0]).sums(inputs)
        count = len(inputs)
        if self.extra_loss is None:
            return {name: squares / count for name, squares in sums.squares.items()}
        # mean (g + e)^2 = mean g^2 + 2 e mean g + e^2
        with torch.enable_grad():
            extras = torch.autograd.grad(
                self.extra_loss(), list(self.parameters.values()), materialize_grads=True
            )
        fisher: Parameters = {}
        for name, extra in zip(self.parameters, extras, strict=True):
            cross = sums.gradients[name].mul_(2 / count).add_(extra).mul_(extra)
            fisher[name] = cross.add_(sums.squares[name], alpha=1 / count).clamp_min_(0)
        return fisher


class Ewc(OnlineEwc):
    """Kirkpatrick et al. 2017: Fisher information and anchor of every task remain.

    The sum of the tasks' penalties is one quadratic plus a constant, which is left out: Omega is
    the sum of theirs, theta* their mean weighted by Omega.
    """

    def end_task(self, inputs: Tensor, sample_loss: SampleLoss) -> None:
        for name, fisher in self.fisher(inputs, sample_loss).items():
            now = self.parameters[name].detach()
            self.importance[name] += fisher
            anchor = self.anchor.get(name, now)
            # The mean moves towards this task's weights by this task's share in the information.
            share = torch.where(fisher > 0, fisher / self.importance[name], 0)
            self.anchor[name] = torch.lerp(anchor, now, share)


class Grow(Method):
    """New slots for every task; old ones are frozen, and found by keys among their task's inputs.

    Keys start at directions of queries of the task's inputs and are pulled towards those of every
    batch, as in L2P (Wang et al. 2022); old keys and values stay, as in CODA-Prompt (Smith et al.
    2023); new directions start orthogonal to old ones, and an orthogonality loss can keep them so,
    as in O-LoRA (Wang et al. 2023). Queries are projections of the model's input less the mean of
    the first task's inputs, and never trained. No input is kept.

    Args:
        model: whose trained parameters are all slots of Neurocoder layers with
            `controller="projection"`, which read the model's input as it is or as their context.
        coef: weight of the pull, summed over layers.
    """

    heads: Sequence[nn.Module] = ()
    """Layers that serve one task each, in the order of tasks: their first slots are all they get.
    Slots of other tasks, never trained there, would answer whatever is taken for those tasks."""

    def __init__(self, model: nn.Module, coef: float) -> None:
        super().__init__(model, coef)
        self.layers = [m for m in model.modules() if isinstance(m, NeurocoderLinear)]
        for name in self.parameters:
            if name.rpartition("memory.")[2] not in ("u", "v", "s", "key"):
                raise ValueError(
                    f"method grow needs slots in place of {name}: Neurocoder layers alone, "
                    "controller='projection', without residual and bias"
                )
        self.num_slots = [layer.config.num_slots for layer in self.layers]
        self.num_tasks = 0

    @torch.no_grad()
    def begin_task(self, inputs: Tensor, optimizer: Optimizer | None) -> None:
        if self.num_tasks:
            self._grow(optimizer)
        else:
            for layer in self.layers:
                layer.composition.get_buffer("center").copy_(inputs.mean(0))
        self.num_tasks += 1
        for layer, _ in self._at_work():
            network = layer.composition
            assert isinstance(network, ProjectionNetwork)
            key = layer.memory.get_parameter("key")  # [slots, H * K]
            for head, keys in enumerate(key.view(len(key), layer.config.num_heads, -1).unbind(1)):
                some = torch.randint(len(inputs), (len(key),)).to(inputs.device)
                keys.copy_(F.normalize(network.queries(inputs[some])[:, head], dim=1))

    def _at_work(self) -> list[tuple[NeurocoderLinear, int]]:
        """The layers that serve the task at hand, and how many slots a task gets in each."""
        idle = [head for task, head in enumerate(self.heads, start=1) if task != self.num_tasks]
        every = zip(self.layers, self.num_slots, strict=True)
        return [(layer, num_slots) for layer, num_slots in every if layer not in idle]

    def _grow(self, optimizer: Optimizer | None) -> None:
        for layer, num_slots in self._at_work():
            layer.freeze_slots(optimizer)
            if layer not in self.heads:
                layer.grow(num_slots, optimizer)

    def loss(self, task_loss: Tensor, inputs: Tensor | None = None) -> Tensor:
        assert inputs is not None
        for layer, num_slots in self._at_work():
            assert isinstance(layer.composition, ProjectionNetwork)
            queries = F.normalize(layer.composition.queries(inputs), dim=2).transpose(0, 1)
            keys = F.normalize(layer.memory.keys()[:, -num_slots:], dim=2)  # [H, slots, K]
            nearest = torch.bmm(queries, keys.transpose(1, 2)).amax(dim=2)  # [H, B]
            task_loss = task_loss + self.coef * (1 - nearest.mean())
        return task_loss

    def shares(self, inputs: Tensor) -> list[list[float]]:
        """For each layer that all tasks share, the shares of the attention by inputs that the
        tasks' slots get."""
        return [
            layer.attend(inputs).u.mean((0, 1)).view(-1, num_slots).sum(1).tolist()
            for layer, num_slots in zip(self.layers, self.num_slots, strict=True)
            if layer not in self.heads
        ]

    def state(self) -> dict[str, Any]:
        return {"num_tasks": self.num_tasks}

    def restore(self, state: Mapping[str, Any], optimizer: Optimizer | None = None) -> None:
        while self.num_tasks < state["num_tasks"]:
            self._grow(optimizer)
            self.num_tasks += 1


# But for `grow` by the names of Hsu et al.; the first two differ in the caller's optimiser alone.
METHODS: Mapping[str, type[Method]] = {
    "adam": Method,
    "adagrad": Method,
    "l2": L2,
    "si": SynapticIntelligence,
    "ewc": Ewc,
    "online-ewc": OnlineEwc,
    "grow": Grow,
}


def make_method(name: str, model: nn.Module, coef: float) -> Method:
    """The method called `name`, with a weight of its penalty of at least 0."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; {suggest(name, METHODS)}")
    if not coef >= 0:
        raise ValueError(f"coef must be at least 0, got {coef}")
    return METHODS[name](model, coef)


def own_label_loss(call: Callable[..., Tensor], samples: Tensor, **options: Any) -> Tensor:
    """Cross-entropies at the labels that the model itself finds likeliest, summed over inputs."""
    logits = call(samples, **options)
    return F.cross_entropy(logits, logits.argmax(1), reduction="sum")


class _WeightedSquare(torch.autograd.Function):
    """sum Omega (theta - theta*)^2 over a tensor, in few passes over it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, importance: Tensor, anchor: Tensor) -> Tensor:
        moved = value - anchor
        ctx.pull = moved * importance  # Omega (theta - theta*)
        return torch.dot(moved.flatten(), ctx.pull.flatten())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return 2 * grad_output * ctx.pull, None, None

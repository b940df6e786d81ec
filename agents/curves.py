"""The curves that only this toolkit has, beside those of Stable-Baselines3."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from stable_baselines3.common.logger import Logger
from torch import Tensor

from ncrl import NeurocoderLinear
from ncrl.diagnostics import describe
from ncrl.sb3 import EnginePolicy, Latent
from ncrl.sb3.engine import map_tensors

DIAGNOSTIC_SAMPLES = 256  # latents of the latest update on which the heads are described


def ended_games(infos: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Score and length of the games that ended in a timestep: `r` and `l`, as SB3's Monitor says.

    Some environments report None for games that go on.
    """
    return filter(None, (info.get("episode") for info in infos))


def record_means(logger: Logger, scalars: Mapping[str, float]) -> None:
    """Log means over the updates since the last dump, as `train/...`."""
    for name, value in scalars.items():
        if math.isfinite(value):  # else the mean would tell nothing of the other updates
            logger.record_mean(f"train/{name}", value)


def record_lag(logger: Logger, lags: list[int]) -> float:
    """Log how many published versions old the weights behind rollouts were; returns the mean."""
    mean = sum(lags) / len(lags)
    logger.record_mean("train/policy_lag", mean)
    largest = "train/policy_lag_max"  # since the last dump
    logger.record(largest, max(*lags, logger.name_to_value[largest]))
    return mean


def record_scores(
    logger: Logger, episodes: Iterable[dict[str, Any]], best_score: float, first_frames: int
) -> None:
    """Log scores of the latest whole games, and after how many frames a game first had one; -1
    where none had."""
    rewarded = [episode["r"] > 0 for episode in episodes]
    if rewarded:
        logger.record("rollout/rewarded_share", sum(rewarded) / len(rewarded))
        logger.record("rollout/best_score", best_score)
    if first_frames >= 0:
        logger.record("rollout/first_reward_frames", first_frames)


def coded_heads(policy: EnginePolicy, latent: Latent) -> dict[str, tuple[NeurocoderLinear, Tensor]]:
    """The Neurocoder heads among `actor` and `critic`, each with what it reads of a latent."""
    extractor = policy.mlp_extractor
    heads = {
        "actor": (policy.action_net, extractor.forward_actor(latent.actor)),
        "critic": (policy.value_net, extractor.forward_critic(latent.critic)),
    }
    return {name: (m, x) for name, (m, x) in heads.items() if isinstance(m, NeurocoderLinear)}


@torch.no_grad()
def record_heads(logger: Logger, policy: EnginePolicy, latent: Latent | None) -> None:
    """Log what Neurocoder heads attend to in the latest update, in which they read `latent`."""
    if latent is None:
        return
    latent = map_tensors(lambda x: x.flatten(0, 1)[:DIAGNOSTIC_SAMPLES], latent)
    heads = coded_heads(policy, latent)
    reports = {name: describe(layer, x) for name, (layer, x) in heads.items()}
    for key in ("attention_entropy", "max_attention", "effective_rank", "orthogonality"):
        values = {name: getattr(report, key) for name, report in reports.items()}
        if key == "effective_rank":  # that of one output can only be 1
            values = {name: v for name, v in values.items() if heads[name][0].out_features > 1}
        for name, value in values.items():
            logger.record(f"neurocoder/{key}/{name}", value)
        if values:
            logger.record(f"neurocoder/{key}", sum(values.values()) / len(values))
    for name, (layer, x) in heads.items():
        if layer.config.residual and layer.config.residual_gate:  # else it can only be 0 or 1
            scale = layer.residual_scale(x).mean()
            logger.record(f"neurocoder/residual_scale/{name}", float(scale))
        usage, elsewhere = reports[name].slot_usage.cpu(), ("stdout", "log", "json", "csv")
        logger.record(f"neurocoder/slot_usage/{name}", usage, exclude=elsewhere)

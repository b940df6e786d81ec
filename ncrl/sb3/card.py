"""A model card, as the Hugging Face Hub shows it, beside an exported policy.

What is written is what was measured: no score without the games it was taken over. Nothing is sent
anywhere; `huggingface-cli upload NAME FOLDER` does that.
"""

from __future__ import annotations

import csv
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ncrl.sb3.export import read_description, read_weights

CARD, CURVE = "README.md", "curve.png"
STEPS, SCORE = "time/total_timesteps", "rollout/ep_rew_mean"
"""Columns of SB3's progress.csv."""


def write_model_card(
    folder: str | Path,
    env_id: str,
    *,
    scores: Sequence[float] = (),
    deterministic: bool | None = None,
    protocol: str | None = None,
    command: str | None = None,
    progress: str | Path | None = None,
    name: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
) -> Path:
    """Write `README.md`, and `curve.png` if there is a curve, into a folder of `export_policy`.

    Files of these names are replaced.

    Args:
        folder: what `export_policy` wrote to.
        env_id: what the policy plays, such as `ALE/Pong-v5`.
        scores: returns of whole games; their mean and standard deviation become the card's result.
        deterministic: whether the likeliest actions were played in these games, or sampled ones.
        protocol: how the environment was set up: stickiness, action set, wrappers, normalisation.
        command: that trained the policy.
        progress: a `progress.csv` of SB3's logger; a run directory of `run_atari.py` has one.
        name: of the model; that of algorithm and environment if None.
        license: identifier, such as `mit`.
        tags: further ones.

    Returns:
        The path of the card.

    Raises:
        ValueError: in one line, if there is no exported policy, a score is not finite, or the curve
            cannot be read.
        OSError: if a file cannot be written.
    """
    folder = Path(folder)
    description = read_description(folder)
    num_weights = sum(tensor.numel() for tensor in read_weights(folder, description).values())
    values = [float(score) for score in scores]
    if not all(map(math.isfinite, values)):
        raise ValueError(f"scores must be finite numbers, got {list(scores)}")
    curve = None if progress is None else _read_curve(Path(progress))
    name = name or f"{description.get('algorithm') or 'Policy'} for {env_id}"

    front = {"library_name": "stable-baselines3", "pipeline_tag": "reinforcement-learning"}
    if license is not None:
        front["license"] = license
    body = [
        _header(front, name, env_id, values, ["ncrl", "neurocoder", *tags], description),
        f"# {_plain(name)}",
        _what_it_is(description, env_id, num_weights),
        _result(values, deterministic, protocol),
    ]
    if curve:
        _draw(curve, folder / CURVE, env_id)
        body.append(
            f"![Mean return of the latest games against timesteps]({CURVE})\n\n"
            "Training: mean return of the latest games, as played while learning."
        )
    if command is not None:
        body.append(f"## Trained with\n\n{_fenced(command, 'sh')}")
    body.append(f"## Use\n\n{_fenced(_usage(description), 'python')}")
    (folder / CARD).write_text("\n\n".join(body) + "\n", encoding="utf-8")
    return folder / CARD


def _header(
    front: dict[str, Any],
    name: str,
    env_id: str,
    scores: list[float],
    tags: list[str],
    description: dict[str, Any],
) -> str:
    """The YAML that the Hub reads."""
    algorithm = description.get("algorithm")
    front["tags"] = list(
        dict.fromkeys(
            [env_id, "deep-reinforcement-learning", "reinforcement-learning"]
            + ([algorithm] if algorithm else [])
            + tags
        )
    )
    if scores:
        mean, spread = statistics.fmean(scores), statistics.pstdev(scores)
        front["model-index"] = [
            {
                "name": name,
                "results": [
                    {
                        "task": {
                            "type": "reinforcement-learning",
                            "name": "reinforcement-learning",
                        },
                        "dataset": {"name": env_id, "type": env_id},
                        "metrics": [
                            {
                                "type": "mean_reward",
                                "name": "mean_reward",
                                "value": f"{mean:.2f} +/- {spread:.2f}",
                                "verified": False,
                            }
                        ],
                    }
                ],
            }
        ]
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---"


def _what_it_is(description: dict[str, Any], env_id: str, num_weights: int) -> str:
    policy = str(description["policy_class"].get("name", "")).rpartition(".")[2]
    arguments = description["arguments"]
    text = f"A `{policy}`"
    if description.get("algorithm"):
        text += f" trained by {description['algorithm']}"
    if description.get("timesteps"):
        text += f" for {description['timesteps']:,} timesteps"
    text += f" on `{env_id}`; {num_weights:,} weights."
    if arguments.get("head") == "neurocoder":
        text += (
            " The output layers of actor and critic are "
            "[Neurocoder](https://proceedings.mlr.press/v162/le22b.html) layers, whose weights are "
            "composed for every input."
        )
    elif "head" in arguments:
        text += f" The output layers of actor and critic: `{arguments['head']}`."
    return text


def _result(scores: list[float], deterministic: bool | None, protocol: str | None) -> str:
    lines = ["## Result", ""]
    if scores:
        actions = {None: "", True: ", likeliest actions", False: ", sampled actions"}[deterministic]
        lines.append(
            f"Return {statistics.fmean(scores):.2f} +/- {statistics.pstdev(scores):.2f}: mean and "
            f"standard deviation of {len(scores)} whole games{actions}; least {min(scores):g}, "
            f"most {max(scores):g}."
        )
    else:
        lines.append("No score has been measured.")
    if protocol:
        lines += ["", f"Environment: {_plain(protocol)}"]
    return "\n".join(lines)


def _usage(description: dict[str, Any]) -> str:
    lines = [
        "from ncrl.sb3 import load_policy",
        "",
        'policy = load_policy("FOLDER")  # this one, downloaded; runs no code of its files',
    ]
    if "lstm_hidden_size" in description["arguments"]:
        lines += [
            "state, episode_start = None, None",
            "action, state = policy.predict(obs, state, episode_start)  # hand both back each time",
        ]
    else:
        lines.append("action, _ = policy.predict(obs)")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """One line without Markdown's or HTML's own meaning."""
    return re.sub(r"([\\`*\[\]<>#|])", r"\\\1", " ".join(text.split()))


def _fenced(text: str, language: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def _read_curve(path: Path) -> list[tuple[float, float]]:
    """(timesteps, mean return) of each row that has both."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            columns = reader.fieldnames or []
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no table ({error})") from error
    for column in (STEPS, SCORE):
        if column not in columns:
            raise ValueError(f"{path} has no column {column!r}; it has {', '.join(columns[:30])}")
    points = []
    for line, row in enumerate(rows, start=2):
        if not row[STEPS] or not row[SCORE]:  # before the first game has ended
            continue
        try:
            points.append((float(row[STEPS]), float(row[SCORE])))
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from error
    return [point for point in points if all(map(math.isfinite, point))]


def _draw(curve: list[tuple[float, float]], path: Path, env_id: str) -> None:
    # Imported here, because every worker process imports `ncrl.sb3`.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    marker = "o" if len(curve) < 3 else None
    axes.plot(*zip(*curve, strict=True), linewidth=1.5, marker=marker)
    axes.set(title=env_id, xlabel="timesteps", ylabel="mean return")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)

"""The policies as RLlib's modules, and its learners with our losses. No process of Ray is started
but for the last tests, which have two learners in two processes of torch alone."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing

pytest.importorskip("ray.rllib", exc_type=ImportError)

from ray.rllib.algorithms.appo import APPOConfig
from ray.rllib.algorithms.impala import IMPALAConfig
from ray.rllib.algorithms.impala.torch.impala_torch_learner import IMPALATorchLearner
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch

from ncrl import rllib
from ncrl.agents import A3C
from ncrl.envs.rllib import atari_vector_env
from ncrl.networks import MeanImage
from ncrl.neurocoder import orthogonal_loss
from ncrl.sb3 import CnnLstmPolicy, export_policy, load_policy
from ncrl.sb3.engine import map_tensors
from ncrl.sb3.export import unique_tensors

FRAGMENT = 10
SMALL: dict[str, Any] = {"lstm_hidden_size": 8}


def module_of(policy: str = "NeurocoderMlpLstmPolicy", env: Any = "CartPole-v1", **options: Any):
    env = gym.make(env) if isinstance(env, str) else env
    options = {"policy_kwargs": SMALL if "Lstm" in policy else {}} | options
    spec = rllib.module_spec(policy, rollout_fragment_length=5, **options)
    spec.observation_space, spec.action_space = env.observation_space, env.action_space
    return spec.build()


def batch_of(module: Any, rows: int = 3, steps: int = 5) -> dict[str, Any]:
    shape = module.observation_space.shape
    if not module.is_stateful():
        return {Columns.OBS: torch.randn(rows, *shape)}
    h = torch.randn(rows, *module.get_initial_state()["h"].shape)
    return {
        Columns.OBS: torch.randn(rows, steps, *shape),
        Columns.STATE_IN: {"h": h, "c": torch.tanh(h)},
    }


def test_a_module_computes_what_the_engine_computes() -> None:
    module = module_of()
    batch = batch_of(module)
    out = module.forward_train(batch)
    h, c = (batch[Columns.STATE_IN][name].transpose(0, 1).contiguous() for name in "hc")
    obs = batch[Columns.OBS].transpose(0, 1)
    latent, (h, _) = module.policy.unroll(obs, (h, c), torch.zeros(5, 3, dtype=torch.bool))
    logits = module.policy.action_net(latent.actor).transpose(0, 1)
    torch.testing.assert_close(out[Columns.ACTION_DIST_INPUTS], logits)
    torch.testing.assert_close(out[Columns.STATE_OUT]["h"], h.transpose(0, 1))
    values = module.policy.values(latent).squeeze(-1).T
    torch.testing.assert_close(module.compute_values(batch, out[Columns.EMBEDDINGS]), values)
    torch.testing.assert_close(module.compute_values(batch), values)


def test_step_by_step_is_the_same_as_at_once() -> None:
    module = module_of()
    batch = batch_of(module)
    at_once = module.forward_train(batch)[Columns.ACTION_DIST_INPUTS]
    state = batch[Columns.STATE_IN]
    for t in range(5):
        obs = batch[Columns.OBS][:, t : t + 1]
        out = module.forward_exploration({Columns.OBS: obs, Columns.STATE_IN: state})
        state = out[Columns.STATE_OUT]
        torch.testing.assert_close(out[Columns.ACTION_DIST_INPUTS][:, 0], at_once[:, t])


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("policy", ["MlpPolicy", "MlpLstmPolicy", "NeurocoderMlpLstmPolicy"])
def test_distributions_are_sb3s(policy: str, env: str) -> None:
    module = module_of(policy, env)
    assert module.is_stateful() == ("Lstm" in policy)
    batch = batch_of(module)
    out = module.forward_train(batch)
    inputs = out[Columns.ACTION_DIST_INPUTS]
    dist = module.get_train_action_dist_cls().from_logits(inputs)
    latent, _ = module._unroll(module.policy, batch)
    latent = map_tensors(lambda x: x.reshape(-1, x.shape[-1]), latent)
    sb3 = module.policy.distribution(latent)
    actions = sb3.get_actions()
    log_prob = dist.logp(actions.reshape(*inputs.shape[:-1], *module.action_space.shape))
    torch.testing.assert_close(log_prob.flatten(), sb3.log_prob(actions))
    torch.testing.assert_close(dist.entropy().flatten(), sb3.entropy())


def test_what_rllib_cannot_play_is_refused() -> None:
    class Many(gym.Env):
        observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
        action_space = gym.spaces.MultiDiscrete([2, 3])

    with pytest.raises(
        ValueError, match=r"MultiDiscrete\(\[2 3\]\) .*Discrete, or a Box without use_sde"
    ):
        module_of("MlpPolicy", Many())
    with pytest.raises(ValueError, match="Box without use_sde"):
        module_of("MlpPolicy", "Pendulum-v1", policy_kwargs={"use_sde": True})
    with pytest.raises(ValueError, match="nearest: NeurocoderMlpLstmPolicy"):
        module_of("NeurocoderMlpLstm")


def test_weights_there_and_back(tmp_path: Path) -> None:
    model = A3C(
        "NeurocoderMlpLstmPolicy", "CartPole-v1", n_workers=0, n_envs=2, policy_kwargs=SMALL
    )
    export_policy(model, tmp_path)
    module = module_of(load=tmp_path)
    assert set(module.get_state()) == {f"policy.{n}" for n in unique_tensors(model.policy)}
    other = module_of()
    other.set_state(module.get_state())
    export_policy(other.policy, tmp_path / "back")
    back = load_policy(tmp_path / "back", "cpu")
    for name, tensor in model.policy.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    without = {n: v for n, v in module.get_state().items() if "action_net.bias" not in n}
    with pytest.raises(ValueError, match="action_net"):
        module.set_state(without)


CONFIGS: dict[str, tuple[Any, Any]] = {
    "IMPALA": (IMPALAConfig, rllib.IMPALALearner),
    "APPO": (APPOConfig, rllib.APPOLearner),
    "PPO": (PPOConfig, rllib.PPOLearner),
}


def learner_and_batch(algorithm: str, steps: int = 60, **own: float) -> tuple[Any, Any, Any]:
    """A learner, an env runner, and what the learner makes of what the runner played."""
    kind, learner_class = CONFIGS[algorithm]
    spec = rllib.module_spec(
        "NeurocoderMlpLstmPolicy",
        rollout_fragment_length=FRAGMENT,
        target=algorithm == "APPO",
        policy_kwargs=SMALL,
    )
    config = (
        kind()
        .environment("CartPole-v1")
        .env_runners(num_env_runners=0, num_envs_per_env_runner=2, rollout_fragment_length=FRAGMENT)
        .learners(num_learners=0, learner_class=learner_class, learner_config_dict=own)
        .rl_module(rl_module_spec=spec)
        .debugging(seed=0)
    )
    runner = SingleAgentEnvRunner(config=config, worker_index=0)
    learner = config.build_learner(env=runner.env.unwrapped)
    module = learner.module["default_policy"].unwrapped()
    runner.module.set_state(module.get_state(inference_only=True))
    episodes = [
        episode
        for _ in range(steps // FRAGMENT)
        for episode in runner.sample(num_timesteps=2 * FRAGMENT)
    ]
    made = learner._learner_connector(
        rl_module=learner.module, batch={}, episodes=episodes, shared_data={}
    )
    samples = MultiAgentBatch({name: SampleBatch(value) for name, value in made.items()}, 1)
    return learner, runner, learner._convert_batch_type(samples).policy_batches


@pytest.mark.parametrize("stretched", [True, False])
def test_actions_that_rllib_would_stretch_are_refused(stretched: bool) -> None:
    """A3C and `load_policy` clip them, so the same weights would push half as hard."""
    env = gym.make("Pendulum-v1")  # torques from -2 to 2
    config = (
        PPOConfig()
        .environment("Pendulum-v1")
        .learners(num_learners=0, learner_class=rllib.PPOLearner)
        .rl_module(rl_module_spec=rllib.module_spec("MlpPolicy", rollout_fragment_length=FRAGMENT))
    )
    if not stretched:
        config.environment(normalize_actions=False, clip_actions=True)
        config.build_learner(env=env)
        return
    with pytest.raises(ValueError, match=r"normalize_actions=False, clip_actions=True"):
        config.build_learner(env=env)


@pytest.mark.parametrize("name", ["orth_coef", "balance_coef"])
def test_coefficients_are_the_learners(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} belongs into learner_config_dict"):
        rllib.module_spec("MlpPolicy", rollout_fragment_length=5, policy_kwargs={name: 0.1})


def test_rows_begin_with_the_state_they_were_played_with() -> None:
    """Episodes that go on over fragments: under the weights that played, ratios are exactly 1."""
    learner, _, batch = learner_and_batch("IMPALA")
    rows = batch["default_policy"]
    mask = rows[Columns.LOSS_MASK].bool()
    assert mask.sum() >= 120 and mask.shape[1] == FRAGMENT + 1
    module = learner.module["default_policy"].unwrapped()
    with torch.no_grad():
        out = module.forward_train(rows)
    dist = module.get_train_action_dist_cls().from_logits(out[Columns.ACTION_DIST_INPUTS])
    log_prob = dist.logp(rows[Columns.ACTIONS])
    torch.testing.assert_close(log_prob[mask], rows[Columns.ACTION_LOGP][mask])
    starts = (rows[Columns.STATE_IN]["h"] == 0).flatten(1).all(1)
    assert 0 < starts.sum() < len(starts), "some rows begin episodes, some go on"


@pytest.mark.parametrize("algorithm", CONFIGS)
def test_our_losses_are_in_the_gradient(algorithm: str) -> None:
    """The loss is RLlib's and `orth_coef` times orthogonality; no parameter is without gradient."""
    losses = []
    learner, _, batch = learner_and_batch(algorithm, orth_coef=0.5, reward_clip=0.25)
    module = learner.module["default_policy"].unwrapped()
    for coefficient in (0.0, 0.5):
        learner.config.learner_config_dict["orth_coef"] = coefficient
        fwd = learner.module.forward_train(batch)
        losses.append(learner.compute_losses(fwd_out=fwd, batch=batch))
    difference = losses[1]["default_policy"] - losses[0]["default_policy"]
    torch.testing.assert_close(difference, 0.5 * orthogonal_loss(module.policy), rtol=1e-3, atol=0)
    gradients = learner.compute_gradients(losses[1])
    names = {parameter: name for name, parameter in module.named_parameters()}
    missing = [names[parameter] for parameter, gradient in gradients.items() if gradient is None]
    assert gradients and not missing, missing
    if algorithm != "PPO":
        assert batch["default_policy"][Columns.REWARDS].max() == 0.25


@pytest.mark.parametrize("algorithm", ["IMPALA", "APPO"])
def test_an_exception_in_the_learners_thread_arrives(
    algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its thread nothing is raised: RLlib would wait for ever for the next update."""
    learner, _, batch = learner_and_batch(algorithm)

    def broken(*_: Any, **__: Any) -> None:
        raise ArithmeticError("no such loss")

    monkeypatch.setattr(learner, "compute_losses", broken)
    monkeypatch.setattr(IMPALATorchLearner, "update", lambda *_, **__: {})  # wants a cluster
    assert learner.update() == {}
    assert learner._update(batch) == ({}, {}, {})
    with pytest.raises(rllib.LearnerStoppedError, match="no such loss"):
        learner.update()


def image_policy() -> CnnLstmPolicy:
    torch.manual_seed(0)
    images = gym.spaces.Box(0, 255, (1, 84, 84), np.uint8)
    actions = gym.spaces.Discrete(3)
    return CnnLstmPolicy(images, actions, lambda _: 0.0, lstm_hidden_size=8)


def images_of(rank: int) -> dict[str, torch.Tensor]:
    """Rank 1 has more rows, and each has padding."""
    generator = torch.Generator().manual_seed(rank)
    obs = torch.randint(0, 256, (2 + rank, 4, 1, 84, 84), generator=generator, dtype=torch.uint8)
    mask = torch.ones(2 + rank, 4, dtype=torch.bool)
    mask[0, 2:] = False
    return {Columns.OBS: obs, Columns.LOSS_MASK: mask}


def mean_of(policy: CnnLstmPolicy) -> MeanImage:
    return next(part for part in policy.modules() if isinstance(part, MeanImage))


def watch_together(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    policy = image_policy()
    rllib.watch(policy, images_of(rank))
    rllib.watch(policy, images_of(rank))
    mean = mean_of(policy)
    torch.save([mean.mean, mean.num_images], f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_the_mean_image_of_two_learners_is_that_of_all_images(tmp_path: Path) -> None:
    """Padding is not in it; and one learner alone agrees with `EnginePolicy.watch`."""
    # Not by spawn, which would import RLlib twice more.
    multiprocessing.start_processes(watch_together, (str(tmp_path),), 2, start_method="fork")
    (one, count), (two, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(one, two) and int(count) == 2 * (8 + 12 - 2 * 2)
    kept = [batch[Columns.OBS][batch[Columns.LOSS_MASK]] for batch in map(images_of, range(2))]
    everything = torch.cat(kept).float() / 255
    torch.testing.assert_close(one, everything.mean(0))
    alone, engine = image_policy(), image_policy()
    rllib.watch(alone, images_of(1))
    engine.watch(kept[1])
    torch.testing.assert_close(mean_of(alone).mean, mean_of(engine).mean)


def test_a_learner_that_stands_still_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = rllib.LearnerGuard()
    learning = {"learners": {"__all_modules__": {"num_module_steps_trained_lifetime": 100.0}}}

    def look(result: dict[str, Any], now: float) -> None:
        monkeypatch.setattr(rllib.time, "monotonic", lambda: now)
        guard.on_train_result(result=result, algorithm=None, metrics_logger=None)

    look({}, 0.0)
    look({}, 299.0)
    look(learning, 301.0)
    look({}, 600.0)  # results between updates lack the learner
    with pytest.raises(rllib.LearnerStoppedError, match="for 301 s, since 100 timesteps"):
        look(learning, 602.0)


def test_atari_in_batches() -> None:
    with pytest.raises(ValueError, match="'classic' does at every lost life; use 'machado'"):
        atari_vector_env({"name": "Pong", "protocol": "classic"})
    games = atari_vector_env({"name": "Pong", "num_envs": 3})
    obs, _ = games.reset(seed=np.int64(2**40 + 1))
    assert obs.shape == (3, 1, 84, 84) and obs.dtype == np.uint8
    obs, rewards, terminated, _, infos = games.step(np.zeros(3, np.int64))
    assert rewards.dtype == np.float32 and infos == {} and not terminated.any()
    with pytest.raises(ValueError, match="expected actions from 0 to 17, got"):
        games.step(np.array([0, 18, 0]))

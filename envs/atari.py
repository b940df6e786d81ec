"""Atari games as Stable-Baselines3 vector environments over `ale_py.AtariVectorEnv`.

`atari("MontezumaRevenge")` names a game and a protocol; calling the result with a batch size and a
seed builds the games in the calling process, one emulator thread for all of them.

What ale-py 0.12.1 does, beyond its documentation, and why the code below is as it is:

- An action out of range never returns from `step`: the actions are checked before they are sent.
- The ROMs of `TWO_PLAYER_ONLY` end the process when loaded: `game_name` does not know them.
- `noop_max=n` draws 0 to n - 1 no-ops, so 0 and 1 both mean none and 31 means up to 30. A FIRE at
  the start counts as the first of them. No-ops are single frames and do not count as timesteps.
- Seeds are 31 bits; -1 keeps the state of the generator; 0 is a seed like any other.
- `episodic_life=True` resets the game on a lost life, hence lives are compared here. On a row whose
  game is over, `lives` already belongs to the next game.
"""

import difflib
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv, VecMonitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from ncrl.envs.checks import positive_integer

if TYPE_CHECKING:  # loaded where it is used: heavy, and under the GPL
    from ale_py import Action, ALEInterface

TWO_PLAYER_ONLY = frozenset({"combat", "joust", "maze_craze", "warlords"})
MAX_SEED = 2**31  # exclusive: the emulator keeps its seed in a signed 32-bit integer


@dataclass(frozen=True)
class Protocol:
    """What makes scores of one game comparable, apart from frame skip and length of a game."""

    sticky: float  # probability, per frame, of the last action instead of the given one
    all_actions: bool  # all 18 of the console, or only those that the game reacts to
    max_noops: int  # a game starts with 0 to this many frames without action, drawn uniformly
    fire_reset: bool  # press FIRE at the start where the game has it; it counts as a no-op
    life_ends_return: bool  # a lost life is `done` to the learner; game and score go on


PROTOCOLS = {
    # Machado et al. 2018, arXiv 1709.06009
    "machado": Protocol(
        sticky=0.25, all_actions=True, max_noops=0, fire_reset=False, life_ends_return=False
    ),
    # Mnih et al. 2015 and 2016, as in SB3's AtariWrapper
    "classic": Protocol(
        sticky=0.0, all_actions=False, max_noops=30, fire_reset=True, life_ends_return=True
    ),
}


@lru_cache(maxsize=1)
def _games() -> dict[str, str]:
    """ROM names of all games that one player can play, by their letters and digits alone."""
    from ale_py.roms import get_all_rom_ids

    return {rom.replace("_", ""): rom for rom in get_all_rom_ids() if rom not in TWO_PLAYER_ONLY}


def game_name(env: str) -> str:
    """The snake_case ROM name of a game given in any usual form.

    Accepts `MontezumaRevenge`, `montezuma_revenge`, `ALE/MontezumaRevenge-v5` and the older
    `MontezumaRevenge-v4` and `MontezumaRevengeNoFrameskip-v4`. Only the game is read from an id:
    stickiness and frame skip come from the protocol and the options of `atari`.

    Raises ValueError for an unknown game, naming the nearest ones.
    """
    game = re.sub(r"^ALE/|(NoFrameskip|Deterministic)?(-v\d)?$", "", env)
    letters = game.replace("_", "").lower()
    if letters not in _games():
        near = difflib.get_close_matches(letters, _games())
        near = near or difflib.get_close_matches(letters, _games(), n=1, cutoff=0)
        names = ", ".join(_games()[key].title().replace("_", "") for key in near)
        raise ValueError(f"unknown Atari game {env!r}, nearest: {names}")
    return _games()[letters]


@lru_cache
def action_meanings(game: str, all_actions: bool) -> tuple[str, ...]:
    """Names of the actions of a ROM, such as `UPFIRE`, in the order of their numbers."""
    return tuple(action.name for action in action_set(load_game(game), all_actions))


def load_game(game: str, *, sticky: float = 0.0, seed: int = 0) -> "ALEInterface":
    """A single emulator with the ROM loaded and its generator seeded."""
    import ale_py
    from ale_py.roms import get_rom_path

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    emulator = ale_py.ALEInterface()
    emulator.setFloat("repeat_action_probability", sticky)
    emulator.setInt("random_seed", seed % MAX_SEED)
    emulator.loadROM(str(get_rom_path(game)))
    return emulator


def action_set(emulator: "ALEInterface", all_actions: bool) -> list["Action"]:
    """The emulator's actions, in the order of their numbers."""
    return emulator.getLegalActionSet() if all_actions else emulator.getMinimalActionSet()


@dataclass(frozen=True)
class AtariFactory:
    """One game under one protocol; `factory(n_envs, seed)` builds the vector environment.

    Picklable and hashable; holds no emulator. ValueError for what makes no sense.
    """

    game: str  # the ROM's name; any form that `game_name` reads is accepted
    protocol: str = "machado"  # or `classic`, see `PROTOCOLS`
    frame_skip: int = 4  # emulator frames per timestep; the last two are merged by their maximum
    stack: int = 1  # timesteps shown in one observation; zeros before the first
    image_size: int = 84  # height and width of the observation in pixels
    max_frames: int = 108_000  # emulator frames (30 minutes) after which a game is truncated

    reward_clip: ClassVar[float] = 1.0  # of rewards, by learners; the environment never does it

    def __post_init__(self) -> None:
        object.__setattr__(self, "game", game_name(self.game))
        if self.protocol not in PROTOCOLS:
            near = difflib.get_close_matches(str(self.protocol), PROTOCOLS, n=1, cutoff=0)[0]
            raise ValueError(f"unknown protocol {self.protocol!r}, nearest: {near!r}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int:
                object.__setattr__(self, field.name, positive_integer(field.name, value))

    def __call__(self, n_envs: int, seed: int) -> "AtariVecEnv":
        """`n_envs` games in this process, at least 1; game i plays from seed `seed + i`."""
        return AtariVecEnv(self, n_envs, seed)

    @property
    def rules(self) -> Protocol:
        """The protocol's settings."""
        return PROTOCOLS[self.protocol]

    @property
    def observation_space(self) -> spaces.Box:
        """uint8 [stack, image_size, image_size], grey values 0 to 255."""
        return spaces.Box(0, 255, (self.stack, self.image_size, self.image_size), np.uint8)

    @property
    def action_space(self) -> spaces.Discrete:
        """The actions numbered from 0; `action_meanings` names them."""
        return spaces.Discrete(len(self.action_meanings))

    @property
    def action_meanings(self) -> tuple[str, ...]:
        """Names of the actions, in the order of their numbers."""
        return action_meanings(self.game, self.rules.all_actions)

    def describe(self) -> dict[str, Any]:
        """The fields and the protocol in plain words, for a run's configuration and for results."""
        rules = self.rules
        return asdict(self) | {
            "sticky_actions": rules.sticky,
            "action_set": "all 18" if rules.all_actions else "minimal",
            "life_loss": "ends the return, not the game" if rules.life_ends_return else "ignored",
            "no_ops": f"0 to {rules.max_noops}" if rules.max_noops else "none",
            "fire_reset": rules.fire_reset,
            "rewards": "raw",
        }


def atari(name: str, **options: Any) -> AtariFactory:
    """A picklable factory of vector environments of one Atari game.

    Args:
        name: of the game, in any usual form (see `game_name`).
        options: the other fields of `AtariFactory`: `protocol` (`machado`, or `classic`),
            `frame_skip` (4), `stack` (1), `image_size` (84), `max_frames` (108,000: 30 minutes).

    Raises:
        ValueError: with the nearest valid choice, for an unknown game or protocol.
    """
    return AtariFactory(name, **options)


def game_options(factory: AtariFactory) -> dict[str, Any]:
    """The protocol of a factory as arguments of `ale_py.AtariVectorEnv`."""
    rules = factory.rules
    return {
        "num_threads": 1,
        "max_num_frames_per_episode": factory.max_frames,
        "repeat_action_probability": rules.sticky,
        "full_action_space": rules.all_actions,
        "img_height": factory.image_size,
        "img_width": factory.image_size,
        "stack_num": factory.stack,
        "frameskip": factory.frame_skip,
        "noop_max": rules.max_noops + 1,
        "use_fire_reset": rules.fire_reset,
        "reward_clipping": False,
    }


def life_lost(before: Any, lives: Any) -> Any:
    """Whether a count of lives, or each of an array, fell, but not to 0: see `AtariVecEnv`."""
    return (lives > 0) & (lives < before)


class AtariVecEnv(VecEnv):
    """Games of one `AtariFactory` as an SB3 vector environment.

    Observations are uint8 [n_envs, stack, image_size, image_size], rewards float32 [n_envs] and
    never clipped. A finished game restarts within the same step; its row of `infos` then has

    - `terminal_observation`: the last observation of the finished game,
    - `TimeLimit.truncated`: it was cut at `max_frames` rather than lost or won,
    - `episode`: `r` raw score, `l` timesteps, `t` seconds since the environment was built.

    Where the protocol ends returns at lost lives, such a row is `done` and its info is
    `{"life_lost": True}` alone; the game goes on, and so does its score. As in SB3's
    EpisodicLifeEnv, a count of lives that reaches 0 is left to the end of the game.
    """

    def __init__(self, factory: AtariFactory, n_envs: int, seed: int):
        from ale_py import AtariVectorEnv

        if n_envs < 1:  # a segmentation fault in ale-py
            raise ValueError(f"n_envs must be at least 1, got {n_envs}")
        self.factory = factory
        self.reward_clip = factory.reward_clip
        self.frame_skip = factory.frame_skip
        self._games = AtariVectorEnv(
            factory.game,
            n_envs,
            autoreset_mode=AutoresetMode.SAME_STEP,
            **game_options(factory),
        )
        self._n_actions = len(self._games.ale.get_action_set())
        self._stepping = False
        self._started = time.monotonic()
        self._scores = np.zeros(n_envs)
        self._lengths = np.zeros(n_envs, np.int64)
        self._lives = np.zeros(n_envs, np.int32)
        self.render_mode = None  # VecEnv.__init__ asks for it
        super().__init__(n_envs, factory.observation_space, spaces.Discrete(self._n_actions))
        self.seed(int(seed))

    def reset(self) -> np.ndarray:
        """Observations of new games, which begin from the seeds of `seed` or of the constructor if
        they were not used yet, else from where the generators are."""
        if self._stepping:
            self.step_wait()
        # -1 keeps the state of a game's generator
        seeds = [-1 if seed is None else seed % MAX_SEED for seed in self._seeds]
        observations, info = self._games.reset(seed=np.array(seeds))
        self._reset_seeds()
        self._reset_options()
        self._scores[:] = self._lengths[:] = 0
        self._lives = info["lives"]
        starts = info["episode_frame_number"].tolist()
        self.reset_infos = [{"episode_frame_number": frames} for frames in starts]
        return np.asarray(observations)

    def step_async(self, actions: np.ndarray) -> None:
        """Sends the actions, integers [n_envs]; ValueError for any that the games do not have.

        The emulator thread plays on while the caller computes. RuntimeError before `step_wait`.
        """
        if self._stepping:
            raise RuntimeError("a step is under way: call step_wait first")
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,) or not np.issubdtype(actions.dtype, np.integer):
            raise ValueError(
                f"expected {self.num_envs} integer actions, got {actions.dtype} {actions.shape}"
            )
        if actions.min() < 0 or actions.max() >= self._n_actions:
            raise ValueError(f"expected actions from 0 to {self._n_actions - 1}, got {actions}")
        self._games.send(actions.astype(np.int64, copy=False))
        self._stepping = True

    def step_wait(self) -> VecEnvStepReturn:
        """Observations, rewards, dones and infos of the step that `step_async` began."""
        if not self._stepping:  # ale-py would wait for ever
            raise RuntimeError("no step is under way: call step_async first")
        # Set before `recv`: Ctrl-C is raised when that returns, and its result is taken by then.
        self._stepping = False
        observations, rewards, terminated, truncated, info = self._games.recv()
        self._scores += rewards
        self._lengths += 1
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        dones = terminated | truncated
        for i in np.flatnonzero(dones).tolist():
            seconds = round(time.monotonic() - self._started, 6)
            infos[i] = {
                "terminal_observation": info["final_obs"][i],
                "TimeLimit.truncated": bool(truncated[i] and not terminated[i]),
                "episode": {"r": float(self._scores[i]), "l": int(self._lengths[i]), "t": seconds},
            }
            self._scores[i] = self._lengths[i] = 0
        if self.factory.rules.life_ends_return:
            lives = info["lives"]
            lost = ~dones & life_lost(self._lives, lives)
            self._lives = lives
            dones |= lost
            for i in np.flatnonzero(lost).tolist():
                infos[i]["life_lost"] = True
        return observations, rewards.astype(np.float32), dones, infos

    def close(self) -> None:
        """Ends the emulator thread, which lives as long as the ale-py object does."""
        self.__dict__.pop("_games", None)

    def env_is_wrapped(self, wrapper_class: type, indices: VecEnvIndices = None) -> list[bool]:
        """True for SB3's monitors: the infos carry what they would add, scores of whole games."""
        return [wrapper_class in (Monitor, VecMonitor) for _ in self._get_indices(indices)]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The attribute of this object, once for each game: the games have none of their own."""
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Sets the attribute of this object, for all games; ValueError if `indices` are given."""
        if indices is not None:
            raise ValueError("the games share their attributes: set them for all, without indices")
        setattr(self, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **kwargs: Any
    ) -> list[Any]:
        """Raises AttributeError: the games live in the emulator and have no methods to call."""
        raise AttributeError(f"Atari games have no method {method_name!r}: they are not gym.Env")

    def get_images(self) -> Sequence[np.ndarray | None]:
        """None for each game: ale-py's vector interface cannot draw; `AtariPlayer` can."""
        return [None] * self.num_envs

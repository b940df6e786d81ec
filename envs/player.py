"""One Atari game whose screen can be seen, played exactly like a game of `AtariVecEnv`.

`ale_py.AtariVectorEnv` cannot draw, so this repeats its preprocessing (`preprocessed_env.cpp` of
ale-py 0.12.1) over a single emulator. Rewards are raw; games do not restart by themselves.
"""

import cv2
import numpy as np

from ncrl.envs.atari import MAX_SEED, AtariFactory, action_set, load_game

ROOM_ADDRESS = {"montezuma_revenge": 3}
"""Games of rooms, and the byte of the emulator's memory that numbers them (OpenAI's
`random-network-distillation`)."""


class AtariPlayer:
    """Game 0 of `factory(n_envs, seed)`: same observations, same rewards, same random numbers.

    The screens of its games come from `frame`. Observations are uint8
    [1, stack, image_size, image_size], as for a vector environment of one game.
    """

    def __init__(self, factory: AtariFactory, seed: int):
        rules = factory.rules
        self.factory = factory
        self._emulator = load_game(factory.game, sticky=rules.sticky, seed=seed)
        self._actions = action_set(self._emulator, rules.all_actions)
        self._presses_fire = rules.fire_reset and "FIRE" in factory.action_meanings
        self._noop_rng = np.random.RandomState(seed % MAX_SEED)
        height, width = self._emulator.getScreenDims()
        # grey screens of the last frame of a timestep and of the one before it
        self._screens = np.zeros((2, height, width), np.uint8)
        self._stack = np.zeros((factory.stack, factory.image_size, factory.image_size), np.uint8)
        self._frames = 0
        self._over = True
        self.score = 0
        """Sum of the raw rewards of the game so far."""
        self.timesteps = 0
        """Number of timesteps of the game so far."""

    def reset(self) -> np.ndarray:
        """Starts a game as the protocol wants it and returns its first observation."""
        import ale_py

        emulator = self._emulator
        emulator.reset_game()
        noops = self._draw_noops()
        if self._presses_fire:
            emulator.act(ale_py.Action.FIRE)
            noops -= 1
        for _ in range(noops):
            emulator.act(ale_py.Action.NOOP)
            if emulator.game_over():
                emulator.reset_game()
        self._frames = self.score = self.timesteps = 0
        self._over = False
        self._stack[:] = 0
        self._screens[1] = 0
        emulator.getScreenGrayscale(self._screens[0])
        return self._observe()

    def step(self, action: int) -> tuple[np.ndarray, int, bool, int]:
        """Plays one timestep: the observation, the raw reward, whether the game is over, the lives.

        A game is over when it is lost or won, or after `max_frames` frames. ValueError for an
        action that the game does not have, RuntimeError where no game is running.
        """
        if not 0 <= action < len(self._actions):
            raise ValueError(f"expected an action from 0 to {len(self._actions) - 1}, got {action}")
        if self._over:
            raise RuntimeError("no game is running: call reset")
        reward = 0
        for frames_left in reversed(range(self.factory.frame_skip)):
            reward += self._emulator.act(self._actions[action])
            self._frames += 1
            self._over = self._emulator.game_over() or self._frames >= self.factory.max_frames
            if self._over:  # before the screen is read: the last observation of a game is stale
                break
            if frames_left < 2:
                self._emulator.getScreenGrayscale(self._screens[frames_left])
        self.score += reward
        self.timesteps += 1
        return self._observe(), reward, self._over, self._emulator.lives()

    def room(self) -> int:
        """Number of the room that the game is in, from the emulator's memory; no observation
        shows it. ValueError for a game that is not in `ROOM_ADDRESS`."""
        if self.factory.game not in ROOM_ADDRESS:
            raise ValueError(f"{self.factory.game} has no rooms that are known here")
        return int(self._emulator.getRAM()[ROOM_ADDRESS[self.factory.game]])

    def frame(self) -> np.ndarray:
        """The screen as it is now, RGB uint8 [height, width, 3]; mostly [210, 160, 3]."""
        return self._emulator.getScreenRGB()

    def _draw_noops(self) -> int:
        """The draw that AtariVectorEnv makes with this seed.

        Its generator is numpy's (mt19937); its `std::uniform_int_distribution`, on Linux, maps 32
        random bits to a range by their product.
        """
        bits = int(self._noop_rng.randint(0, 2**32, dtype=np.uint32))
        return bits * (self.factory.rules.max_noops + 1) >> 32

    def _observe(self) -> np.ndarray:
        """Pushes the maximum of both screens, reduced, on the stack and returns a copy of it."""
        # In place, as AtariVectorEnv does: it shows where a game ends inside a frame skip.
        np.maximum(self._screens[0], self._screens[1], out=self._screens[0])
        size = (self.factory.image_size, self.factory.image_size)
        self._stack[:-1] = self._stack[1:].copy()
        self._stack[-1] = cv2.resize(self._screens[0], size, interpolation=cv2.INTER_AREA)
        return self._stack[np.newaxis].copy()

"""What a worker process imports before it plays: every one does it for itself."""

import subprocess
import sys

SCRIPT = """
import sys
import ncrl.agents.playing.worker as worker
from ncrl.agents.playing.buffers import RolloutShape
from ncrl.agents.playing.collector import Collector
from ncrl.agents.playing.env_sources import RegisteredFactory, build
from ncrl.sb3 import NeurocoderMlpLstmPolicy

env = build(RegisteredFactory("CartPole-v1"), 2, 0)
spaces = env.observation_space, env.action_space
policy = worker.PolicySpec(NeurocoderMlpLstmPolicy, *spaces, {}, -1).build()
rollout = RolloutShape(3, 2, *spaces, *policy.state_shape).allocate()
Collector(env, policy, env.reset()).collect(rollout, 3, lambda outcome: True)
heavy = "torch._dynamo", "torch._inductor", "sympy", "sklearn", "matplotlib", "pandas"
print([name for name in heavy if name in sys.modules])
"""


def test_a_worker_imports_neither_the_compiler_nor_what_draws_and_fits() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=80
    )
    assert done.stdout == "[]\n", done.stdout + done.stderr

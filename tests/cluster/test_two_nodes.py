"""Two nodes in network namespaces; one is killed and comes back. Needs root; slow, run by hand:

PYTHONPATH=. python -m pytest -m slow tests/cluster/test_two_nodes.py
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NODES = Path(__file__).parent / "two_nodes.sh"

SCRIPT = """
import logging, signal
from ncrl.agents import A3C, Limits
from tests.agents.conftest import Episodes
from tests.agents.environments import TickingFactory

class Tell(Episodes):
    hosts = None

    def _on_step(self):
        going_on = super()._on_step()
        places = [w.place for w in self.model._pool._workers if w.place]
        hosts = sorted(place.split()[-1] for place in places)
        if hosts != self.hosts and self.n_calls % 5 == 0:
            self.hosts = hosts
            print("hosts", *hosts, flush=True)
        return going_on

if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    model = A3C("MlpLstmPolicy", TickingFactory(length=1, pause=0.01), n_workers=2, n_envs=4,
                n_steps=5, seed=1, device="cpu", policy_kwargs=dict(lstm_hidden_size=8),
                cluster="10.77.0.1:6379", limits=Limits(first_pause=0.2))
    signal.signal(signal.SIGTERM, lambda *_: model.request_stop())
    tell = Tell()
    model.learn(10**9, callback=tell)
    tell.assert_nothing_was_counted_twice()
    print("end", tell.restarts[0], len(tell.ends) == model.num_timesteps, flush=True)
"""


def nodes(*command: str) -> None:
    subprocess.run([str(NODES), *command], check=True, timeout=120, cwd=ROOT)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    nodes("up")
    yield
    nodes("down")


def test_a_node_is_killed_and_comes_back(cluster: None, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [str(NODES), "run", sys.executable, str(tmp_path / "script.py")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None

    def wait_for(*hosts: str) -> float:
        started = time.monotonic()
        assert process.stdout is not None
        for line in process.stdout:
            if line.split() == ["hosts", *hosts]:
                return time.monotonic() - started
        raise AssertionError(process.stderr.read() if process.stderr else "")

    both = ("10.77.0.1", "10.77.0.2")
    wait_for(*both)
    nodes("kill")
    print(f"noticed after {wait_for('10.77.0.1'):.1f} s")
    time.sleep(5)
    nodes("start")
    print(f"back after {wait_for(*both):.1f} s")
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    print(error)
    assert out.split()[-3:] == ["end", "1", "True"]
    assert error.count("10.77.0.2) died") == 1 and "Traceback" not in error

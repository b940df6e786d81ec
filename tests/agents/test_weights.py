"""`SharedWeights`: whole versions only, whoever reads, writes or dies meanwhile."""

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection

import pytest
import torch
from torch import nn

from ncrl.agents.playing.weights import SharedWeights
from tests.agents.conftest import wait_until

SIZE = 300


def make_module() -> nn.Module:
    """Large enough that copying it can be overtaken."""
    module = nn.Sequential(nn.Linear(SIZE, SIZE), nn.BatchNorm1d(SIZE), nn.Linear(SIZE, 2))
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module


def fill(module: nn.Module, value: float) -> None:
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(value)


def publish_in_a_loop(connection: Connection, weights: SharedWeights) -> None:
    """Version v consists of the number v; ends when spoken to."""
    module, version = make_module(), weights.version
    while not connection.poll():
        version += 1
        fill(module, float(version))
        weights.publish(module, version)
    connection.send(version)


def read_in_a_loop(weights: SharedWeights, heartbeat: torch.Tensor) -> None:
    module = make_module()
    while True:
        weights.read_into(module)
        heartbeat += 1


def test_round_trip_of_parameters_and_floating_point_buffers() -> None:
    torch.manual_seed(0)
    source, target = make_module(), make_module()
    source[1].running_mean.normal_()
    source[1].num_batches_tracked.fill_(5)
    weights = SharedWeights(source)
    assert weights.version == -1
    for version in range(3):
        fill(source[2], float(version))
        weights.publish(source, version)
        assert weights.version == version
        assert weights.read_into(target) == version
        for name, value in source.state_dict().items():
            if value.is_floating_point():
                assert torch.equal(value, target.state_dict()[name]), name
    assert target[1].num_batches_tracked == 0
    floats = [t for t in source.state_dict().values() if t.is_floating_point()]
    assert SharedWeights.bytes_for(source) == 2 * sum(t.nbytes for t in floats)


def test_reading_keeps_the_tensors_and_tells_caches() -> None:
    source, target = make_module(), make_module()
    weights = SharedWeights(source)
    weights.publish(source, 0)
    tensors = {name: (id(p), p._version) for name, p in target.named_parameters()}
    weights.read_into(target)
    for name, parameter in target.named_parameters():
        identity, version = tensors[name]
        assert id(parameter) == identity and parameter._version > version
    fill(source, 9.0)
    assert (target[0].weight != 9.0).all(), "a reader's weights are its own copy"


def test_a_copy_that_is_being_overwritten_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer was at version 1 when a reader began, and has begun with 3 when it looks again."""
    module = make_module()
    weights = SharedWeights(module)
    for version in range(4):
        weights.publish(module, version)
    seen = iter([1, 3])
    monkeypatch.setattr(SharedWeights, "version", property(lambda _: next(seen)))
    assert weights.read_into(module) == 3


def assert_whole(module: nn.Module, version: int) -> None:
    values = {
        value
        for tensor in (*module.parameters(), *module.buffers())
        if tensor.is_floating_point()
        for value in (tensor.min().item(), tensor.max().item())
    }
    assert values == {float(version)}


def test_no_mix_of_versions_and_a_killed_reader_harms_nobody() -> None:
    """F2: one process publishes without pause, one reads until it is killed, this one looks on."""
    weights = SharedWeights(make_module())
    heartbeat = torch.zeros(1, dtype=torch.int64).share_memory_()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    writer = context.Process(target=publish_in_a_loop, args=(theirs, weights), daemon=True)
    reader = context.Process(target=read_in_a_loop, args=(weights, heartbeat), daemon=True)
    writer.start()
    reader.start()
    theirs.close()
    module, seen = make_module(), set()
    try:
        assert wait_until(lambda: weights.version >= 0 and heartbeat.item() > 3)
        while len(seen) < 60:
            version = weights.read_into(module)
            assert_whole(module, version)
            seen.add(version)
            if len(seen) == 20:
                os.kill(reader.pid, signal.SIGKILL)
        reader.join(10)
        assert reader.exitcode == -signal.SIGKILL and writer.is_alive()
        ours.send("stop")
        assert ours.poll(30)
        last = ours.recv()
        assert last == weights.version == weights.read_into(module)
        assert_whole(module, last)
        writer.join(10)
        assert writer.exitcode == 0
    finally:
        for process in (writer, reader):
            process.kill()
            process.join(10)

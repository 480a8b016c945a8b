"""The processes of torchrun: what they share, add, gather and tell; and what one says when another has gone."""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from torchrun import torchrun

from cosa_fast.distributed import World, join, leave, requested

SCRIPT = """
import sys
from pathlib import Path
import torch
from cosa_fast.distributed import join, leave

world = join("cpu")
assert join("cpu") == world
assert world.first == (world.rank == 0) and world.quiet == (None if world.first else True)

whole, halves = torch.tensor([1, 2]) * 10**17 + world.rank, torch.full((2,), 0.5)
world.add(whole, halves)
assert whole.tolist() == [3 * 10**17 + 3, 6 * 10**17 + 3] and halves.tolist() == [1.5, 1.5]

with torch.inference_mode():
    mine = {"rank": world.rank, "tensor": torch.arange(world.rank)}
gathered = world.gather(mine)
assert [part["rank"] for part in gathered] == ([0, 1, 2] if world.first else [])
assert [len(part["tensor"]) for part in gathered] == ([0, 1, 2] if world.first else [])

assert world.tell({"from": world.rank}) == {"from": 0}

path = Path(sys.argv[1])
if world.first:
    path.write_text("written")
world.wait()
assert path.read_text() == "written"

print(f"alright {world.rank}\\n", end="", flush=True)  # in one piece, as three processes write
if world.rank < 2:
    try:
        world.gather(None) if world.first else world.wait()
    except ValueError as error:
        print(f"{error}\\n", end="", flush=True)
leave()
"""


def test_the_parts_are_the_whole() -> None:
    for count in range(20):
        items = list(range(count))
        for size in (1, 2, 3, 7, 30):
            worlds = [World(rank, size) for rank in range(size)]
            for whole in (1, 2, 5, 50):
                parts = [world.share(items, whole) for world in worlds]
                assert list(chain.from_iterable(parts)) == items
                assert all(part[0] % whole == 0 for part in parts if part)
                groups = [-(-len(part) // whole) for part in parts]
                assert max(groups) - min(groups) <= 1
    assert World(1, 2).share(range(5)) == range(2, 5)


def test_alone() -> None:
    world = World()
    assert world.first
    assert world.quiet is None
    tensor = torch.tensor([3])
    world.add(tensor)
    world.wait()
    assert (tensor.item(), world.gather("a"), world.tell("b")) == (3, ["a"], "b")
    assert world.share("abc") == "abc"


def test_without_torchrun_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for environment in ({}, {"WORLD_SIZE": "1", "RANK": "0"}):
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert requested() == 1
        assert join("cpu") == World()
        leave()


def test_three_processes(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = torchrun(3, sys.executable, str(tmp_path / "script.py"), str(tmp_path / "told"))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sorted(line for line in lines if line.startswith("alright")) == ["alright 0", "alright 1", "alright 2"]
    assert lines.count("another process of this run ended early or hangs: its own message says why") == 2

"""Many at once: clients that are processes of their own, and threads of one client.

`FARPOINT_CROWD` says how many clients there are.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import farpoint
from farpoint import LocalCluster
from farpoint.bulk import Bulk
from farpoint.limits import Limits
from farpoint.protocol.messages import Kind
from farpoint.protocol.session import Session
from farpoint.testing.transport import eventually
from saboteur import EMPTY, PLUGIN, Station
from strangers import environment, install

farpoint.TorchHook(torch)
CLIENTS = int(os.environ.get("FARPOINT_CROWD", "8"))
OPERATIONS = 1000
THREADS = 8
LIMITS = Limits(links_per_address=100)
MEBI = 2**20

CROWD = """
import os, sys, json, random, torch, farpoint
farpoint.TorchHook(torch)
torch.set_num_threads(1)
url, token, clients, operations = json.loads(sys.argv[1])

def work(seed):
    chance = random.Random(seed)
    with farpoint.connect(url, token=token) as bob:
        return compute(bob, chance)

def compute(bob, chance):
    x = torch.arange(16)
    p = x.send(bob)
    kept = []
    for _ in range(operations // 2):
        n = chance.randrange(2**32)
        x, p = (x + n) * 3, (p + n) * 3
        if chance.random() < 0.1:
            kept.append((x.clone(), p.clone()))
    return torch.equal(p.get(), x) and all(torch.equal(q.get(), y) for y, q in kept)

pids = []
for seed in range(clients):
    pid = os.fork()
    if not pid:
        os._exit(0 if work(seed) else 1)
    pids.append(pid)
print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("saboteur")
    install(made, "stranger-sabotage", "sabotage", PLUGIN)
    return made


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[LocalCluster]:
    with pytest.MonkeyPatch.context() as patch:
        paths = [str(folder), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("FARPOINT_SABOTEUR", str(folder))
        made = farpoint.local_cluster("bob", "alice", limits=LIMITS)
    with made:
        yield made


def let_in(cluster: LocalCluster, folder: Path, clients: int) -> None:
    """Let clients in, and wait until they have left."""
    asked = json.dumps([cluster.urls["bob"], cluster.token, clients, OPERATIONS])
    done = subprocess.run([sys.executable, "-c", CROWD, asked], capture_output=True, text=True, check=False, env=environment(folder))
    assert (json.loads(done.stdout or "[]"), done.stderr) == ([0] * clients, "")


def test_many_clients(cluster: LocalCluster, folder: Path) -> None:
    with Station(folder, "bob") as bob:
        guests = bob.state()["guests"]
        let_in(cluster, folder, CLIENTS)  # once for what Python and torch keep for good
        bob.becomes(**EMPTY, guests=guests)
        before = bob.state()["resident"]
        let_in(cluster, folder, CLIENTS)
        bob.becomes(**EMPTY, guests=guests)
        assert bob.state()["resident"] < before + 16 * MEBI


def test_threads_of_one_client(cluster: LocalCluster, folder: Path) -> None:
    places = [cluster.bob, cluster.alice]

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(20):
            x: Any = torch.randint(2**40, (chance.choice((1, 7, 2**17 + seed)),), generator=torch.Generator().manual_seed(seed))
            here, there = chance.sample(places, 2)
            p = x.send(here)
            match chance.randrange(5):
                case 0:
                    q = p
                    for n in range(50):
                        q = (q + n) * 3
                        x = (x + n) * 3
                    assert torch.equal(q.get(), x)
                case 1:
                    pp = p.send(there)
                    qq = pp * pp + seed
                    assert torch.equal(qq.get().get(), x * x + seed)
                    assert torch.equal(pp.get().get(), x)
                case 2:
                    p = p.move(there)
                    p += seed
                    assert torch.equal(p.move(here).get(), x + seed)
                case 3:
                    r: Any = p.send(there).move(there)  # one hop shorter
                    assert torch.equal((r - 1).get(), x - 1)
                case _:
                    p.mul_(2)
                    p.add_(p)
                    assert torch.equal(p.get(keep=True), 4 * x)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # they get into each other's way as often as possible
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            for future in [pool.submit(work, seed) for seed in range(3 * THREADS)]:
                future.result()
    finally:
        sys.setswitchinterval(interval)
    for place in 2 * places:
        place.ping()
    for name in cluster:
        with Station(folder, name) as station:
            station.becomes(**EMPTY)


def test_no_more_tensors_are_under_way_than_the_other_side_takes() -> None:
    limits = Limits(transfers=3)
    here, there = Session(b"h", b"t"), Session(b"t", b"h")
    bulk, taken = Bulk(Limits()), Bulk(limits)
    bulk.at_once = limits.transfers
    tensors = [torch.full((3 * MEBI,), number, dtype=torch.uint8) for number in range(10)]
    for number, tensor in enumerate(tensors):
        bulk.add(["message", number, None], [2], tensor)
    arrived = []
    while bulk.load(here):
        for _, message in there.receive(here.pack()):
            if message[0] == Kind.CHUNK:
                taken.take_chunk(message)
            else:
                (_, number, tensor), refusal = taken.take_whole(message)
                assert refusal is None and torch.equal(tensor, tensors[number])
                arrived.append(number)
        here.receive(there.pack())
    assert arrived == list(range(10))


def test_many_large_tensors_at_once() -> None:
    with farpoint.local_cluster("carol", limits=Limits(transfers=2)) as cluster:
        x: Any = torch.arange(4 * MEBI, dtype=torch.uint8)
        cluster.processes["carol"].send_signal(signal.SIGSTOP)  # until all of them wait
        peer = cluster.carol.peer
        with ThreadPoolExecutor(8) as pool:
            sent = [pool.submit(x.send, cluster.carol) for _ in range(8)]
            eventually(lambda: peer.channel.bulk is not None and peer.channel.bulk._numbers.__reduce__()[1] == (9,))
            cluster.processes["carol"].send_signal(signal.SIGCONT)
            got = [pool.submit(future.result().get) for future in sent]
            assert all(torch.equal(future.result(), x) for future in got)
        assert len(cluster.carol) == 0

"""Split learning: the layers of one model are on three workers, and no worker sees another one's data, layers or labels.

Alice has the inputs and the first layers, bob has the layers in the middle, carol has the last layer and the labels. In forward the
activations move from worker to worker; in backward their gradients come back the same way. Neither passes through this process, which
only says what shall be done. Run it with `python docs/tutorials/split_learning.py`.
"""

import torch
from torch import nn

import farpoint

farpoint.TorchHook(torch)  # tensors and modules get `send`, `get` and `move`

STEPS = 60


def known():
    """Return inputs and labels: which points are nearer to the origin than 1."""
    x = torch.randn(80, 2, generator=torch.Generator().manual_seed(4))
    return x, (x.norm(dim=1) < 1).long()


def new_layers():
    """Return the three parts of a model that knows nothing yet."""
    torch.manual_seed(5)
    return [nn.Sequential(nn.Linear(2, 16), nn.ReLU()), nn.Sequential(nn.Linear(16, 16), nn.ReLU()), nn.Linear(16, 2)]


def main(alice, bob, carol):
    """Train a model whose parts are on three workers; return the parts, and the losses that were read."""
    x, labels = known()
    x, labels = x.send(alice), labels.send(carol)
    first, middle, last = (part.send(worker) for part, worker in zip(new_layers(), (alice, bob, carol), strict=True))
    parts = nn.ModuleList([first, middle, last])
    optimizer = torch.optim.Adam(parts.parameters(), lr=0.02)  # each parameter is stepped where it is

    losses = []
    for step in range(STEPS):
        seen_by_bob = first(x).move(bob)
        seen_by_carol = middle(seen_by_bob).move(carol)
        loss = nn.functional.cross_entropy(last(seen_by_carol), labels)
        optimizer.zero_grad()
        loss.backward()  # carol -> bob -> alice
        optimizer.step()
        if step % 20 == 19:
            losses.append(loss.get().item())
            print(f"step {step + 1}: loss {losses[-1]:.4f}")

    optimizer.zero_grad()  # so that no gradient comes along with the layers
    with torch.no_grad():
        right = (last(middle(first(x).move(bob)).move(carol)).argmax(dim=1) == labels).sum().get().item()
    print(f"{right} of {len(labels)} points are right")
    return parts.get(), losses


if __name__ == "__main__":
    with farpoint.local_cluster("alice", "bob", "carol") as workers:  # three processes
        main(workers.alice, workers.bob, workers.carol)

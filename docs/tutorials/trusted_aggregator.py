"""The trusted aggregator: many train, one adds up, and nobody else sees what a single one has learned.

From a gradient, or from a model that has just been trained on some data, much of the data can be guessed. So bob and alice each train
a copy of the model, and both copies move, straight from their workers, to a worker that both trust. The average is made there, and only
the average is fetched. Run it with `python docs/tutorials/trusted_aggregator.py`.

What keeps the parties' models from being fetched by somebody who does not follow this script is a policy: let the workers refuse `get`
of everything but averages (`farpoint_authorize` in docs/plugins.md).
"""

import torch
from torch import nn

import farpoint

farpoint.TorchHook(torch)  # tensors and modules get `send`, `get`, `move` and `copy`

ROUNDS = 6
STEPS = 10


def measured(parties):
    """Return what each party has measured, each in a region of its own: y = sin(x)."""
    regions = torch.linspace(-3, 3, 30 * parties).reshape(parties, 30, 1)
    return [(x, torch.sin(x)) for x in regions]


def new_model():
    """Return a model that knows nothing yet."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))


def train(model, x, y):
    """Train a model where its data is, and return the last loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(STEPS):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()  # the gradients stay nowhere
    return loss.detach()


def main(bob, alice, secure_worker):
    """Train with two parties, and average by hand; return the model, and the mean loss of each round."""
    data = [(x.send(owner), y.send(owner)) for owner, (x, y) in zip((bob, alice), measured(2), strict=True)]
    model, losses = new_model(), []
    for turn in range(ROUNDS):
        copies = [model.copy().send(x.location) for x, _ in data]
        scores = [train(copy, x, y) for copy, (x, y) in zip(copies, data, strict=True)]  # both at once: nothing waits

        first, second = (copy.move(secure_worker) for copy in copies)
        with torch.no_grad():
            for one, other in zip(first.parameters(), second.parameters(), strict=True):
                one.add_(other).div_(2)
        model = first.get()  # the average
        losses.append(farpoint.average(scores, on=secure_worker).get().item())
        print(f"round {turn + 1}: mean loss {losses[-1]:.4f}")
    return model, losses


def many(parties, secure_worker):
    """Train with any number of parties: `farpoint.average` moves copies, averages them, and leaves the average there."""
    data = [(x.send(owner), y.send(owner)) for owner, (x, y) in zip(parties, measured(len(parties)), strict=True)]
    model, losses = new_model(), []
    for turn in range(ROUNDS):
        copies = [model.copy().send(x.location) for x, _ in data]
        scores = [train(copy, x, y) for copy, (x, y) in zip(copies, data, strict=True)]
        model = farpoint.average(copies, on=secure_worker).get()
        losses.append(farpoint.average(scores, on=secure_worker).get().item())
        print(f"round {turn + 1}: mean loss of {len(parties)} parties {losses[-1]:.4f}")
    return model, losses


if __name__ == "__main__":
    with farpoint.local_cluster("bob", "alice", "carol", "secure_worker") as workers:  # four processes
        main(workers.bob, workers.alice, workers.secure_worker)
        many([workers.bob, workers.alice, workers.carol], workers.secure_worker)

"""Federated learning: the model goes to the data, for the data does not leave its owner.

Bob and alice have measured the same thing, and neither shows the other what was measured. A linear model is sent to bob and trained
there, fetched, sent to alice and trained there, again and again. One optimizer does it all: what it notes of the parameters, here the
moments of Adam, follows them. Run it with `python docs/tutorials/federated_learning.py`.
"""

import torch
from torch import nn

import farpoint

farpoint.TorchHook(torch)  # tensors and modules get `send`, `get` and `move`

ROUNDS = 15
STEPS = 4


def measured():
    """Return what each of the two has measured: y = 2a - 3b + 1."""
    chance = torch.Generator().manual_seed(1)
    inputs = torch.randn(2, 20, 2, generator=chance)
    return [(x, x @ torch.tensor([[2.0], [-3.0]]) + 1) for x in inputs]


def new_model():
    """Return a model that knows nothing yet."""
    torch.manual_seed(2)
    return nn.Linear(2, 1)


def main(bob, alice):
    """Train a model on what two workers have; return it, and the loss of each visit."""
    # In earnest each owner has put the data there, and we find it: bob.search("#measured").
    data = [(x.send(owner), y.send(owner)) for owner, (x, y) in zip((bob, alice), measured(), strict=True)]

    model = new_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)  # before the first send, and for all of them
    losses = []
    for turn in range(ROUNDS):
        for x, y in data:
            model.send(x.location)
            for _ in range(STEPS):  # the lines that train a model here; nothing in them waits
                loss = nn.functional.mse_loss(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            optimizer.zero_grad()  # so that no gradient comes along
            model.get()
            losses.append(loss.get().item())  # to know a number one asks for it
        if turn % 5 == 4:
            print(f"round {turn + 1:2}: loss {losses[-2]:.5f} at {bob.id}'s, {losses[-1]:.5f} at {alice.id}'s")
    print(f"weight {[round(value, 2) for value in model.weight[0].tolist()]}, bias {model.bias.item():.2f}: it was y = 2a - 3b + 1")
    return model, losses


if __name__ == "__main__":
    with farpoint.local_cluster("bob", "alice") as workers:  # two processes
        main(workers.bob, workers.alice)

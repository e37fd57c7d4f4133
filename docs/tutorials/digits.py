"""A convolutional network reads handwritten digits that two owners keep to themselves.

The data are the 1 797 images of 8 x 8 pixels that come with scikit-learn. Bob has some of them, alice has others, and the network goes
from one to the other, batch by batch: it learns exactly what it would learn if all images were here. Run it with
`python docs/tutorials/digits.py`; it takes `pip install scikit-learn`.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import farpoint

farpoint.TorchHook(torch)  # tensors and modules get `send`, `get` and `move`

EPOCHS = 3
BATCH = 64
OWNED = 640  # images of each owner; the rest is kept for the examination


def images():
    """Return images and labels of each owner, and those of the examination."""
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    *owned, rest = zip(x.split(OWNED), y.split(OWNED), strict=True)
    return owned, rest


def new_model():
    """Return a network that knows nothing yet."""
    torch.manual_seed(6)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 10),
    )


def main(bob, alice):
    """Train a network on the images of two workers; return it, the loss of each batch, and how many of 100 it reads right."""
    owned, (exam, answers) = images()
    data = [(x.send(owner), y.send(owner)) for owner, (x, y) in zip((bob, alice), owned, strict=True)]

    model = new_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for epoch in range(EPOCHS):
        for x, y in data:
            model.move(x.location)  # from here, or straight from the other one
            for inputs, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
                loss = nn.functional.cross_entropy(model(inputs), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
        print(f"epoch {epoch + 1}: loss {losses[-1].get(keep=True).item():.4f}")
    model.get().eval()
    losses = [loss.item() for loss in farpoint.gather(losses)]
    with torch.no_grad():
        score = (model(exam).argmax(dim=1) == answers).float().mean().item() * 100
    print(f"of {len(answers)} digits that it had never seen it reads {score:.1f} % right")
    return model, losses, score


if __name__ == "__main__":
    with farpoint.local_cluster("bob", "alice") as workers:  # two processes
        main(workers.bob, workers.alice)

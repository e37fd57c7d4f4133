"""A walk through pointers, told step by step: `farpoint tutorial`."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from farpoint.connection import connect
from farpoint.errors import InvalidNameError
from farpoint.hook import TorchHook
from farpoint.pointer import PointerTensor
from farpoint.remote import RemoteWorker, VirtualWorker


def run(
    serializer: str | None,
    out: Callable[[str], None],
    workers: Sequence[str] = (),
    *,
    token: str | None = None,
    tls: ssl.SSLContext | None = None,
) -> None:
    """Send, fetch, add and move tensors between two workers, and tell what happens.

    After each step the store of each worker is shown. Nothing is asserted: the values are there to be read.

    Args:
        serializer: How tensors are written, `msgpack` or `torch`; None for the default.
        out: Called with each line.
        workers: Where bob and alice listen. If not given, they are made in this process.
        token: What opens their doors; `FARPOINT_TOKEN` if not given.
        tls: How to verify them, and the certificate to show; None for what the schemes of the URLs imply.

    Raises:
        PluginError: There is no serializer of that name.
        TransportError: A worker cannot be reached, or does not let us in.
        InvalidNameError: Both URLs lead to the same worker.
    """
    TorchHook(torch)
    with ExitStack() as stack:
        made: list[RemoteWorker] = []
        for name, url in zip(("bob", "alice"), workers or ("", ""), strict=True):
            if url:
                handle = connect(url, token=token, tls=tls, serializer=serializer)
            else:
                handle = VirtualWorker(id=name, serializer=serializer)
            if handle in made:
                raise InvalidNameError("second worker", url, f"the URL of another one: {handle.id} listens there, the first one")
            made.append(stack.enter_context(handle))
        bob, alice = made
        _tell(bob, alice, out)


def _look(worker: RemoteWorker, pointers: Sequence[Any]) -> dict[int, Any]:
    """Return what a worker stores, in the order of these pointers, with the values of the tensors that they lead to.

    A worker outside this process lists its objects by their ids, without values; whoever holds a pointer may get them.
    """
    listed = dict(worker._objects)
    found = {}
    for pointer in pointers:
        while isinstance(pointer, PointerTensor):
            value = pointer.get(keep=True)
            if pointer.location is worker:
                here = listed.pop(pointer.id_at_location)
                found[pointer.id_at_location] = here if isinstance(value, PointerTensor) else value
            pointer = value
    return {**found, **listed}


def _tell(bob: RemoteWorker, alice: RemoteWorker, out: Callable[[str], None]) -> None:
    def step(code: str, *shown: object, held: Sequence[Any] = ()) -> None:
        out(f">>> {code}")
        for value in shown:
            out(str(value))
        for name, worker in (("bob", bob), ("alice", alice)):
            out(f"    {name + ':':<7}{_look(worker, held) or 'nothing'}")
        out("")

    out("Two workers, bob and alice. Below each step is what each of them stores.")
    out("")

    out("1. A tensor goes to bob; what stays here is a pointer to it.")
    x: Any = torch.tensor([1, 2, 3, 4])  # Any: type checkers do not know what the hook adds to tensors
    x_ptr = x.send(bob)
    step("x = torch.tensor([1, 2, 3, 4]); x_ptr = x.send(bob)", x_ptr, held=[x_ptr])

    out("2. A pointer is a tensor as well, so it can be sent: alice gets the pointer, the data stays with bob.")
    pointer_to_x_ptr = x_ptr.send(alice)
    step("pointer_to_x_ptr = x_ptr.send(alice)", pointer_to_x_ptr, held=[pointer_to_x_ptr])

    out("3. get() undoes one send: first the pointer comes back ...")
    x_ptr = pointer_to_x_ptr.get()
    step("x_ptr = pointer_to_x_ptr.get()", x_ptr, held=[x_ptr])

    out("4. ... then the data.")
    x = x_ptr.get()
    step("x = x_ptr.get(); x", x)

    out("5. Arithmetic follows the pointers: alice is asked, she asks bob, and he adds.")
    x = torch.tensor([1, 2, 3, 4, 5])
    p2p2x = x.send(bob).send(alice)
    step("x = torch.tensor([1, 2, 3, 4, 5]); p2p2x = x.send(bob).send(alice)", p2p2x, held=[p2p2x])
    y = p2p2x + p2p2x
    step("y = p2p2x + p2p2x", y, held=[p2p2x, y])

    out("6. The sum comes back in two steps, and so does what was added.")
    step("y.get().get()", y.get().get(), held=[p2p2x])
    step("p2p2x.get().get()", p2p2x.get().get())

    out("7. move() hands a tensor from one worker to another.")
    x = torch.tensor([1, 2, 3, 4, 5])
    x = x.send(bob)
    step("x = torch.tensor([1, 2, 3, 4, 5]); x = x.send(bob)", x, held=[x])
    x = x.move(alice)
    step("x = x.move(alice); x", x, held=[x])

"""A walk through pointers, told step by step: `farpoint tutorial`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import farpoint as sy


def run(serializer: str | None, out: Callable[[str], None]) -> None:
    """Send, fetch, add and move tensors between two workers in this process, and tell what happens.

    After each step the store of each worker is shown. Nothing is asserted: the values are there to be read.

    Args:
        serializer: How the workers write tensors, `msgpack` or `torch`; None for the default of `VirtualWorker`.
        out: Called with each line.

    Raises:
        PluginError: There is no serializer of that name.
    """
    import farpoint as sy  # it imports this package's modules; not while it is being imported itself

    hook = sy.TorchHook(torch)
    # The keyword is left out for the default, so that the default is decided in one place.
    options: dict[str, Any] = {} if serializer is None else {"serializer": serializer}
    bob = sy.VirtualWorker(hook, id="bob", **options)
    try:
        alice = sy.VirtualWorker(hook, id="alice", **options)
        try:
            _tell(bob, alice, out)
        finally:
            alice.close()
    finally:
        bob.close()


def _tell(bob: sy.VirtualWorker, alice: sy.VirtualWorker, out: Callable[[str], None]) -> None:
    def step(code: str, *shown: object) -> None:
        out(f">>> {code}")
        for value in shown:
            out(str(value))
        for name, worker in (("bob", bob), ("alice", alice)):
            stored = dict(worker._objects)
            out(f"    {name + ':':<7}{stored or 'nothing'}")
        out("")

    out("Two workers, bob and alice. Below each step is what each of them stores.")
    out("")

    out("1. A tensor goes to bob; what stays here is a pointer to it.")
    x: Any = torch.tensor([1, 2, 3, 4])  # Any: type checkers do not know what the hook adds to tensors
    x_ptr = x.send(bob)
    step("x = torch.tensor([1, 2, 3, 4]); x_ptr = x.send(bob)", x_ptr)

    out("2. A pointer is a tensor as well, so it can be sent: alice gets the pointer, the data stays with bob.")
    pointer_to_x_ptr = x_ptr.send(alice)
    step("pointer_to_x_ptr = x_ptr.send(alice)", pointer_to_x_ptr)

    out("3. get() undoes one send: first the pointer comes back ...")
    x_ptr = pointer_to_x_ptr.get()
    step("x_ptr = pointer_to_x_ptr.get()", x_ptr)

    out("4. ... then the data.")
    x = x_ptr.get()
    step("x = x_ptr.get(); x", x)

    out("5. Arithmetic follows the pointers: alice is asked, she asks bob, and he adds.")
    x = torch.tensor([1, 2, 3, 4, 5])
    p2p2x = x.send(bob).send(alice)
    step("x = torch.tensor([1, 2, 3, 4, 5]); p2p2x = x.send(bob).send(alice)", p2p2x)
    y = p2p2x + p2p2x
    step("y = p2p2x + p2p2x", y)

    out("6. The sum comes back in two steps, and so does what was added.")
    step("y.get().get()", y.get().get())
    step("p2p2x.get().get()", p2p2x.get().get())

    out("7. move() hands a tensor from one worker to another.")
    x = torch.tensor([1, 2, 3, 4, 5])
    x = x.send(bob)
    step("x = torch.tensor([1, 2, 3, 4, 5]); x = x.send(bob)", x)
    x = x.move(alice)
    step("x = x.move(alice); x", x)

"""A forked child must not speak over its parent's sessions, nor give its parent's references up."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

# The parent's links write down which process used them. What the child finds out comes back through a file as well, because its
# standard streams are watched for noise.
HEAD = """
    import gc, os, sys, threading, warnings
    from pathlib import Path
    import torch, farpoint
    from farpoint import VirtualWorker
    from farpoint.errors import FarpointError, ForkedPointerError, UnseenErrorWarning
    from farpoint.plugins import TransportPlugin, hookimpl, plugins
    from farpoint_virtual.transport import VirtualLink, VirtualTransport

    used = os.open(sys.argv[1], os.O_CREAT | os.O_APPEND | os.O_RDWR)
    told = os.open(sys.argv[2], os.O_CREAT | os.O_APPEND | os.O_RDWR)

    def use(link, what):
        os.write(used, f"{os.getpid()} {what} {link._url}\\n".encode())

    write, close = VirtualLink.write, VirtualLink.close
    VirtualLink.write = lambda self, frames: (use(self, "write"), write(self, frames))[1]
    VirtualLink.close = lambda self: (use(self, "close"), close(self))[1]

    def used_by(pid):
        return [line for line in Path(sys.argv[1]).read_text().splitlines() if line.startswith(f"{pid} ")]

    def tell(*words):
        os.write(told, (" ".join(map(str, words)) + "\\n").encode())

    def in_child(work, leave=os._exit):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                work()
                code = 0
            except BaseException as error:
                tell("the child failed:", type(error).__name__, error)
            leave(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, Path(sys.argv[2]).read_text()
        return pid

    farpoint.TorchHook(torch)
    bob, alice = VirtualWorker(id="bob"), VirtualWorker(id="alice")
    x = torch.arange(3.0)
    p = x.send(bob)
    pp = p.send(alice)
    p.get(keep=True)
"""


def run(tmp_path: object, body: str) -> str:
    """Run a script after HEAD, and return what it printed; it must end well, and without a word of warning."""
    script = textwrap.dedent(HEAD) + textwrap.dedent(body)
    options = ["-W", "error", "-W", "ignore:This process:DeprecationWarning"]  # of Python 3.12, about any fork beside a thread
    done = subprocess.run(
        [sys.executable, *options, "-c", script, f"{tmp_path}/used", f"{tmp_path}/told"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_every_use_raises_and_the_parent_goes_on(tmp_path: object) -> None:
    run(
        tmp_path,
        """
        def work():
            uses = {
                "p + 1": lambda: p + 1,
                "p.add_(1)": lambda: p.add_(1),
                "torch.nonzero(p)": lambda: torch.nonzero(p),
                "pp + pp": lambda: pp + pp,
                "p.get()": lambda: p.get(),
                "p.get(keep=True)": lambda: p.get(keep=True),
                "pp.get()": lambda: pp.get(),
                "p.move(alice)": lambda: p.move(alice),
                "p.send(alice)": lambda: p.send(alice),
                "pp.remote_get()": lambda: pp.remote_get(),
                "p.tag('#x')": lambda: p.tag("#x"),
                "x.send(bob)": lambda: x.send(bob),
                "bob.search('#x')": lambda: bob.search("#x"),
                "bob.clear_objects()": lambda: bob.clear_objects(),
                "bob.synchronize()": lambda: bob.synchronize(),
            }
            for name, use in uses.items():
                try:
                    use()
                except ForkedPointerError as error:
                    assert "num_workers=0" in str(error) and error.pointer in ("a pointer to bob", "a pointer to alice")
                    tell(name)
                else:
                    raise AssertionError(f"{name} did not raise")
            assert p.shape == (3,) and "bob" in repr(p)  # what is known here asks nobody

        child = in_child(work)
        assert not used_by(child), used_by(child)
        assert len(Path(sys.argv[2]).read_text().splitlines()) == 15
        assert torch.equal((p + 1).get(), x + 1) and torch.equal(p.get(), x) and torch.equal(pp.get().get(), x)
        """,
    )


def test_finalizers_of_the_child_release_nothing(tmp_path: object) -> None:
    run(
        tmp_path,
        """
        def work():
            global p, pp
            del p, pp
            gc.collect()
            bob.flush()
            bob.close()
            alice.close()

        child = in_child(work)
        assert not used_by(child), used_by(child)
        assert used_by(os.getpid())
        q = p + 1  # sends whatever was released with it
        assert len(bob._objects) == 2 and len(alice._objects) == 1
        assert torch.equal(q.get(), x + 1) and torch.equal(pp.get().get(), x)
        """,
    )


def test_a_child_that_ends_in_the_ordinary_way_is_silent(tmp_path: object) -> None:
    """It runs the functions registered with atexit; the error that nobody has seen is the parent's to report, once."""
    out = run(
        tmp_path,
        """
        index = torch.tensor([7]).send(bob)
        bad = p[index]
        bob.flush()
        assert any(not seen for _, seen in farpoint.me().failures.values())
        child = in_child(lambda: tell("alive"), leave=sys.exit)
        assert not used_by(child), used_by(child)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            bob.close()
        assert [w.category for w in caught] == [UnseenErrorWarning]
        print("reported by the parent")
        """,
    )
    assert out == "reported by the parent\n"


def test_a_child_makes_sessions_of_its_own(tmp_path: object) -> None:
    run(
        tmp_path,
        """
        before = farpoint.me()

        def work():
            assert farpoint.me() is not before and farpoint.me().incarnation != before.incarnation
            own = VirtualWorker(id="bob")  # no warning: the parent's is not replaced
            q = x.send("bob")
            assert torch.equal((q + 1).get(), x + 1)
            for mixed in (lambda: p + q, lambda: q + p, lambda: p.send(own), lambda: p.move(own)):
                try:
                    mixed()
                except ForkedPointerError:
                    continue
                raise AssertionError("the parent's pointer was used")
            assert len(own) == 1 and q.location is own
            own.close()

        in_child(work)
        assert farpoint.me() is before
        assert torch.equal(p.get(), x) and len(bob._objects) == 1, "alice's pointer has its reference still"
        """,
    )


def test_a_lock_that_another_thread_held_is_not_waited_for(tmp_path: object) -> None:
    run(
        tmp_path,
        """
        held, go = threading.Event(), threading.Event()

        def hold():
            with bob.peer.channel.lock:
                held.set()
                go.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()

        def work():
            try:
                p + 1
            except ForkedPointerError:
                return
            raise AssertionError("it did not raise")

        import signal
        signal.alarm(60)  # a child that waits for the lock would wait for ever
        in_child(work)
        go.set()
        thread.join()
        assert torch.equal((p + 1).get(), x + 1)
        """,
    )


def test_workers_of_a_data_loader(tmp_path: object) -> None:
    run(
        tmp_path,
        """
        from torch.utils.data import DataLoader, Dataset

        class Rows(Dataset):
            def __len__(self):
                return 3

            def __getitem__(self, row):
                return p[row]

        try:
            next(iter(DataLoader(Rows(), num_workers=1)))
        except ForkedPointerError as error:
            assert "num_workers=0" in str(error)
        else:
            raise AssertionError("it did not raise")
        assert torch.equal(p.get(), x)
        """,
    )

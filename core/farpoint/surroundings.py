"""What torch lets the calls of a thread depend on beside their arguments: modes, and keys that are switched off."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch

_eval_frame: Any = torch._C._dynamo.eval_frame

# What a thread begins with: torch has no function that says so. A new thread's are the same.
_INCLUDED: Final = torch._C._dispatch_tls_local_include_set()
_EXCLUDED: Final = torch._C._dispatch_tls_local_exclude_set()


_switch = threading.Lock()
_users = 0
_before = True


@contextmanager
def without_onednn() -> Iterator[None]:
    """Let torch take kernels of its own. For all threads: torch has one switch, which the last to leave puts back.

    `torch.backends.mkldnn.flags` would write other settings as well, and warn of one.
    """
    global _users, _before  # noqa: PLW0603  # as the switch is
    with _switch:
        if not _users:
            _before = torch._C._get_mkldnn_enabled()
            torch._C._set_mkldnn_enabled(False)
        _users += 1
    try:
        yield
    finally:
        with _switch:
            _users -= 1
            if not _users:
                torch._C._set_mkldnn_enabled(_before)


@contextmanager
def plain() -> Iterator[None]:
    """Let what is done here be as in a thread of its own.

    A worker in this process may be called from inside an operation on a pointer, where torch has switched off what looks at
    the conj and neg bits of operands, or from below a mode of the user's: autocast, inference mode, a dispatch mode.
    """
    with ExitStack() as stack:
        stack.enter_context(torch._C._ForceDispatchKeyGuard(_INCLUDED, _EXCLUDED))
        stack.enter_context(torch._C.DisableTorchFunction())
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(mode=False))
        yield


def not_compiled(function: Callable[..., Any]) -> None:
    """Let `torch.compile` run a function, and all that it calls, as it is: it would compile what it meets on its way as well."""
    skip = _eval_frame._FrameAction.SKIP
    _eval_frame.set_code_exec_strategy(function.__code__, _eval_frame._FrameExecStrategy(skip, skip))

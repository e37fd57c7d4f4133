"""What torch lets the calls of a thread depend on beside their arguments: modes, and keys that are switched off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

import torch

# What a thread begins with: torch has no function that says so. A new thread's are the same.
_INCLUDED: Final = torch._C._dispatch_tls_local_include_set()
_EXCLUDED: Final = torch._C._dispatch_tls_local_exclude_set()


@contextmanager
def without_onednn() -> Iterator[None]:
    """Let torch take kernels of its own. For all threads: torch has one switch.

    `torch.backends.mkldnn.flags` would write other settings as well, and warn of one.
    """
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


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

"""One genuine message of each kind: what clients and workers say to each other."""

from __future__ import annotations

from typing import Any, Final

import torch

from farpoint.macro import pack
from farpoint.protocol.messages import Kind

SPEC: Final = [[2, 3], [3, 1], 0, "float32", False, False]
_TENSOR: Final = torch.arange(6.0).reshape(2, 3)
_NOTE: Final = [False, ["#tag"], "what it is"]

COMMANDS: Final[list[list[Any]]] = [
    [Kind.DEFINE, 0, "aten::add.Tensor", [["t"], ["t"]], {"alpha": ["s"]}],
    [Kind.DEFINE, 1, "aten::sum.dim_IntList", [["t"], ["l", ["c", 0]], ["c", True]], {"dtype": ["dtype", "float64"]}],
    [Kind.DEFINE, 2, "aten::clone.default", [["t"]], {"memory_format": ["format", "contiguous"]}],
    [Kind.DEFINE, 3, "aten::full.default", [["l", ["c", 2]], ["complex", 1.0, -2.0]], {"layout": ["layout", "strided"], "device": ["device"]}],
    [Kind.RUN, 0, [3, torch.tensor(1.5), 2], [4]],
    [Kind.RUN, 0, [3, 4, [1.0, 2.0]], [0]],
    [Kind.ASK, 1, [3], [5]],
    [Kind.PUT, 6, _TENSOR, *_NOTE],
    [Kind.LINK, 7, "alice", "tcp://127.0.0.1:7001", 8, SPEC, ["#tag"], "", "fp1.YWxpY2U.c2ln"],
    [Kind.CLAIM, 9, ""],
    [Kind.RELEASE, [3, 4, 5]],
    [Kind.FETCH, 6],
    [Kind.MOVE, 6, 1, "alice", "tcp://127.0.0.1:7001", 10, 0, True, ""],
    [Kind.SEARCH, ["#tag", "word"]],
    [Kind.TAG, 6, ["#tag"], None],
    [Kind.CLEAR],
    [Kind.SYNC, ["bob"], ["alice"]],
    [Kind.DESCRIBE, [6]],
    [Kind.TRANSFER, "Push", [["x", "f" * 32], 5, 1, 77, 78, False, None, None], [_TENSOR, *_NOTE, ""]],
    [Kind.TRANSFER, "Inquire", [5, ["x", "0" * 32]], None],
    [Kind.LIST, 0],
    [Kind.LOCATE, 6],
    [Kind.READ, 6, 0, 1024],
    [Kind.SEED, 2**63],
    [Kind.PLAN, 0, [[0, [0, 1, -1], [2]], [1, [2], [-1]]]],
    [Kind.RUNPLAN, 0, pack([3, 4, 12]), [2.5], pack([12, 5])],
]
"""What a client says."""

ANSWERS: Final[dict[int, list[Any]]] = {
    Kind.ASK: [[SPEC]],
    Kind.CLAIM: [True],
    Kind.FETCH: [
        ["tensor", _TENSOR, *_NOTE],
        ["pointer", "alice", "tcp://127.0.0.1:7001", 8, *_NOTE, ""],
    ],
    Kind.SEARCH: [[6, 7]],
    Kind.LIST: [[[6, "tensor", SPEC, *_NOTE, "", 0], [7, "pointer", None, *_NOTE, "alice", 8]]],
    Kind.READ: [torch.arange(24, dtype=torch.uint8)],
    Kind.LOCATE: [[SPEC, ["bob"], *_NOTE]],
}
"""What a worker answers, by the kind of the command."""

FAILURE: Final[dict[str, Any]] = {
    "uid": 11,
    "kind": "RemoteExecutionError",
    "worker": "bob",
    "operation": "aten::inverse",
    "text": "the matrix is singular",
    "evidence": {
        "worker": "bob", "operation": "aten::inverse", "error": "RuntimeError", "text": "singular", "line": "a.py:3", "remote_traceback": "",
    },
    "orphan": False,
}  # fmt: skip


def packets(local: bytes) -> list[list[Any]]:
    """Return packets for whoever has that incarnation: one for each message, and one with all commands."""
    answers = [[int(Kind.ANSWER), 1, content] for contents in ANSWERS.values() for content in contents]
    failures = [[int(Kind.FAILURE), 1, FAILURE], [int(Kind.FAILURE), 2, {**FAILURE, "kind": "QuotaError", "evidence": {}}]]
    said = [*COMMANDS, *answers, *failures]
    return [*([local, 1, 2, [message]] for message in said), [local, 1, 0, list(COMMANDS)], [local, 1, 3, []]]

"""The processes apart from the worker: a zygote that has torch ready, and the executors that it forks.

The zygote runs no operation, and so has one thread and may fork. It serves its control socket:

    fork, serial, bytes, threads, and a socket   → the process id of a new executor, or -1
    end, serial                                  → the wait status of that executor, which is no more; -1 if it is unknown
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import resource
import signal
import socket
import sys
import warnings
from pathlib import Path
from typing import Any, Final

import torch

from farpoint.executor import execute, leaves
from farpoint.failures import describe_failure
from farpoint.isolation.memory import SMALL, build, content, describe, map_file, private, write_file
from farpoint.isolation.pipe import REPLY, REQUEST, Pipe, close_all
from farpoint.operations import lookup
from farpoint.template import Template

_NO_MEMORY: Final = re.compile(r"can't allocate memory|Cannot allocate memory|std::bad_alloc")
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_MANY: Final = 4_096

_templates: dict[str, Template] = {}


def main(descriptor: int) -> None:
    """Serve a worker until it is gone.

    Args:
        descriptor: The control socket.
    """
    control = socket.socket(fileno=descriptor)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    warnings.simplefilter("ignore")
    lookup("aten::add.Tensor")  # reads the table
    gc.freeze()
    children: dict[int, int] = {}
    while True:
        request, descriptors, _, _ = socket.recv_fds(control, REQUEST.size, 1)
        if not request:
            break
        verb, serial, allowed, threads = REQUEST.unpack(request)
        if verb == b"fork":
            answer = _fork(descriptors[0], allowed, threads)
            children[serial] = answer
            close_all(descriptors)
        else:
            answer = _end(children.pop(serial, -1))
        control.send(REPLY.pack(answer))
    for child in children.values():
        _end(child)


def _fork(descriptor: int, allowed: int, threads: int) -> int:
    zygote = os.getpid()
    try:
        child = os.fork()
    except OSError:
        return -1
    if child:
        return child
    # From here on this is the executor, and nothing of the zygote's may run: neither its loop nor what it does at its end.
    try:
        _confine(descriptor, allowed, zygote)
        torch.set_num_threads(threads)
        _serve(Pipe(socket.socket(fileno=descriptor)))
    finally:
        os._exit(1)


def _end(child: int) -> int:
    if child < 0:
        return -1
    os.kill(child, signal.SIGKILL)  # one that has ended already keeps its status
    return os.waitpid(child, 0)[1]


def _confine(kept: int, allowed: int, zygote: int) -> None:
    """Take from this process what an executor does not need."""
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.getppid() != zygote:
        os._exit(1)  # it died before it was watched
    os.dup2(0, 2)  # the zygote's input and output are /dev/null
    os.closerange(3, kept)
    os.closerange(kept + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, allowed))
    # Private writable memory only: operands are shared, and torch's own libraries are large in the address space.
    used = 1024 * int(re.findall(r"VmData:\s*(\d+) kB", Path("/proc/self/status").read_text())[0])
    resource.setrlimit(resource.RLIMIT_DATA, (used + allowed, used + allowed))


def _serve(pipe: Pipe) -> None:
    while True:
        try:
            header, descriptors, data = pipe.receive()
        except EOFError:
            return
        answer, files, blobs = _answer(header, descriptors, data)
        del data
        pipe.send(answer, files, blobs)
        close_all(files)
        del blobs


def _answer(header: Any, descriptors: list[int], data: memoryview) -> tuple[list[Any], list[int], list[Any]]:
    files: list[int] = []
    try:
        try:
            return _carry_out(header, descriptors, data, files)
        finally:
            close_all(descriptors)
    except Exception as error:
        close_all(files)
        if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
            return ["exhausted"], [], []
        return ["failed", describe_failure(error, "", "", expose=True)], [], []


def _carry_out(
    header: Any, descriptors: list[int], data: memoryview, files: list[int]
) -> tuple[list[Any], list[int], list[Any]]:
    """Run one operation and return what the worker needs to know of it.

    Args:
        header: `[template, values, sizes]`, with a size for each storage that comes by value, and None for one in a file.
        descriptors: The files.
        data: The storages by value, one after the other; then the state of the generator, if the operation draws from one.
        files: Where new files are put, for whoever closes them.
    """
    wire, values, sizes = header
    template = _template(wire)
    storages: list[torch.UntypedStorage] = []
    lent: dict[int, tuple[bytearray, memoryview]] = {}
    queue = iter(descriptors)
    begin = 0
    for index, size in enumerate(sizes):
        if size is None:
            storages.append(map_file(next(queue)))
            continue
        was = data[begin : begin + size]
        own = bytearray(was)
        storages.append(private(own))
        lent[index] = (own, was)
        begin += size
    for hole in template.tensors:
        values[hole] = build(values[hole], storages)
    operands = [(hole, values[hole]) for hole in template.tensors]
    known = {storage._cdata: index for index, storage in enumerate(storages)}
    geometry = [_geometry(tensor) for _, tensor in operands]
    generator = torch.Generator()
    if template.operation.random:
        generator.set_state(torch.frombuffer(bytearray(data[begin:]), dtype=torch.uint8))
    returned = leaves(execute(template, values, generator))
    fresh: list[int | None] = []
    blobs: list[Any] = []
    results: list[Any] = []
    for value in returned:
        if not isinstance(value, torch.Tensor):
            results.append(None)
            continue
        described = describe(value, 0)
        storage = value.untyped_storage()
        described[0] = known.get(storage._cdata)
        if described[0] is None:
            described[0] = known[storage._cdata] = len(sizes) + len(fresh)
            if storage.nbytes() <= SMALL:
                fresh.append(storage.nbytes())
                blobs.append(content(storage))
            else:
                fresh.append(None)
                files.append(write_file(content(storage)))
        results.append(described)
    # By comparison, not by the schema: native_batch_norm does not say that it writes to its running statistics.
    changed = [index for index, (own, was) in lent.items() if own != bytes(was)]
    blobs += [lent[index][0] for index in changed]
    moved = []
    for (hole, tensor), before in zip(operands, geometry, strict=True):
        if _geometry(tensor) != before:
            moved.append([hole, describe(tensor, known[tensor.untyped_storage()._cdata])])
    if template.operation.random:
        blobs.append(content(generator.get_state().untyped_storage()))
    return ["done", fresh, results, changed, moved], files, blobs


def _geometry(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset()


def _template(wire: list[Any]) -> Template:
    key = json.dumps(wire)
    known = _templates.get(key)
    if known is None:
        if len(_templates) >= _MANY:
            _templates.clear()
        name, args, kwargs = wire
        known = _templates[key] = Template(lookup(name), args, kwargs)
    return known


if __name__ == "__main__":
    main(int(sys.argv[1]))

"""Compute on PyTorch tensors that live on other machines, through pointers that are tensors."""

from farpoint.errors import (
    DecodeError,
    FarpointError,
    GetNotPermittedError,
    NotColocatedError,
    ObjectNotFoundError,
    OperationNotAllowedError,
    PluginError,
    PointerSpentError,
    ProtocolError,
    RemoteExecutionError,
    TransportError,
    ValueNotHereError,
    WorkerNotFoundError,
)
from farpoint.handover import get, move, send
from farpoint.hook import TorchHook
from farpoint.pointer import PointerTensor
from farpoint.remote import RemoteWorker, VirtualWorker, me

__version__ = "0.1.0"

__all__ = [
    "DecodeError",
    "FarpointError",
    "GetNotPermittedError",
    "NotColocatedError",
    "ObjectNotFoundError",
    "OperationNotAllowedError",
    "PluginError",
    "PointerSpentError",
    "PointerTensor",
    "ProtocolError",
    "RemoteExecutionError",
    "RemoteWorker",
    "TorchHook",
    "TransportError",
    "ValueNotHereError",
    "VirtualWorker",
    "WorkerNotFoundError",
    "get",
    "me",
    "move",
    "send",
]

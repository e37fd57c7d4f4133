"""The operation gate: which operators a worker executes, and with which arguments."""

from farpoint.operations.arguments import Hole, check_arguments, check_scalar
from farpoint.operations.operands import check_operands
from farpoint.operations.table import RESIZING, UNINITIALISED, Operation, lookup, names, of

__all__ = [
    "RESIZING",
    "UNINITIALISED",
    "Hole",
    "Operation",
    "check_arguments",
    "check_operands",
    "check_scalar",
    "lookup",
    "names",
    "of",
]

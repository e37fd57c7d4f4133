"""The laws of farpoint, each a class of tests: whoever has them in a test file runs them.

A test file of a plugin's own repository needs one line::

    from farpoint.testing.laws import *

They run once for each combination of what is registered: a transport, a serializer and a store. docs/contracts.md
tells how to narrow that down, and how to run them on workers of another kind.
"""

from farpoint.testing.laws.autograd import TestL13AcrossWorkers, TestL13Autograd
from farpoint.testing.laws.chains import TestL4GetConsumes, TestL5OperationsFollowTheChain
from farpoint.testing.laws.errors import TestL9ErrorsHappenWhereYouMadeThem
from farpoint.testing.laws.machine import TestL3StateMachine
from farpoint.testing.laws.modules import TestModules
from farpoint.testing.laws.moving import TestL6TheDataEnd, TestL7NothingIsLost
from farpoint.testing.laws.order import TestL11ProgramOrder
from farpoint.testing.laws.places import TestL8TogetherOrNotAtAll, TestL10NothingLeavesByAccident
from farpoint.testing.laws.plans import TestPlans
from farpoint.testing.laws.pointers import TestL2PointerIsTensor
from farpoint.testing.laws.references import TestL3References
from farpoint.testing.laws.sending import TestL1SendCopies
from farpoint.testing.laws.there import TestL12TorchIsTorch
from farpoint.testing.laws.untouched import TestL14FarpointLeavesTorchAlone

__all__ = [
    "TestL1SendCopies",
    "TestL2PointerIsTensor",
    "TestL3References",
    "TestL3StateMachine",
    "TestL4GetConsumes",
    "TestL5OperationsFollowTheChain",
    "TestL6TheDataEnd",
    "TestL7NothingIsLost",
    "TestL8TogetherOrNotAtAll",
    "TestL9ErrorsHappenWhereYouMadeThem",
    "TestL10NothingLeavesByAccident",
    "TestL11ProgramOrder",
    "TestL12TorchIsTorch",
    "TestL13AcrossWorkers",
    "TestL13Autograd",
    "TestL14FarpointLeavesTorchAlone",
    "TestModules",
    "TestPlans",
]

"""What tests need, for users too: a clock that does not wait, and a model that is not there.

>>> from llmkit.testing import FakeClock, Fault, Simulator
>>> simulator = Simulator(clock=FakeClock())
>>> simulator.fail(Fault.status(503, retry_after=2), times=2)
"""

from __future__ import annotations

from llmkit.testing.books import Received
from llmkit.testing.clock import FakeClock
from llmkit.testing.faults import Fault
from llmkit.testing.simulator import Simulator

__all__ = ["FakeClock", "Fault", "Received", "Simulator"]

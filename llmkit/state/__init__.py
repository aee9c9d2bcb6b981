"""What outlives a call, and where it is kept: the protocol, and the stores that follow it."""

from llmkit.state.store import Store, open_store

__all__ = ["Store", "open_store"]

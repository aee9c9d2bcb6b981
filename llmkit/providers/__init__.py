"""One wire format a file; which service speaks which, and where, is data in `llmkit.providers.catalog`."""

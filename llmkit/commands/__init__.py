"""The commands of ``llmkit``, one file each: ``run(arguments)`` does it and gives back the exit code."""

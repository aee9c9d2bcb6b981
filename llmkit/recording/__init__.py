"""Calls that are recorded to a file, and replayed from it: the question, the answer, the file, and what is left out.

`llmkit.recording.asked` says which questions are the same, `llmkit.recording.told` what an answer is made of,
`llmkit.recording.file` how both stand in a file. The layer that records and replays is `llmkit.layers.replay`.
"""

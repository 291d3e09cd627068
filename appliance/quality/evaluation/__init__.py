"""How good models are at a task, on rows whose answers are known.

adapters   data (adapters.toml): which fields of a row are the text and the right answer, and what is asked of it
datasets   a JSONL file as rows; a sample of them, and examples to show
metrics    pure: shares with their intervals, F1, calibration error, differences between two models
scoring    pure: rows and answers -> a report
client     rows -> answers, from a node over HTTP
record     answers on disk, so that a run that was stopped goes on
"""

"""Public benchmarks on a bundle: files of questions read row by row, answers scored, no torch.

`tsv` reads a file, `questions` makes a prompt of a row and says how its answer is scored, `run`
asks the model, `answers` keeps what it said, `summary` adds up.
"""

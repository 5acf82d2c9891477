"""What is measured on a GPU, each part a module here: `make bench-gpu PART=lora`, or kernels, step, kernel_times,
chunks, workload, adapters, sleep.

Parts write `results/<gpu>-<what>.json` row by row, and skip rows that are there: a part that ran out of its time
goes on where it stopped.
"""

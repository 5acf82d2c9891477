"""What is measured on a GPU: `make bench-gpu PART=kernels|lora|step|workload|adapters`, each part a module here.

Parts write `results/<gpu>-<what>.json` row by row, and skip rows that are there: a part that ran out of its time
goes on where it stopped.
"""

"""Makes the demo's assets: the tiny base model, its tokenizer and the adapters.

`python -m benchmarks.demo_assets.train` trains and writes them; `...judge` checks the files with
transformers and PEFT.
"""

"""Typed functions over tensors: what decoders are made of, with a CPU twin for each kernel. Shapes, no requests."""

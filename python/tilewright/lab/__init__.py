"""Proof without a GPU: the interpreter that tells the truth, traffic, offline compilation."""

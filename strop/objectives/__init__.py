"""Objectives: pure functions from tensors to tensors, unreduced, per token or per pair; only aggregate.py sums.

Shape suffixes: B rows, T label positions, R packed rows, P prompts, G samples of a group, K ranked completions,
N anything flat, D width, V vocabulary. Masks are bool, True = counts. Logarithms are natural.
"""

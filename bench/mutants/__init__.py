"""Mutants: copies of a source file with one small fault each, made by rule, and the checks and tests that find them."""

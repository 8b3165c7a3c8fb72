"""Measurements, each a module that runs by itself and prints a table for docs/benchmarks.md. Tests never time anything.
"""

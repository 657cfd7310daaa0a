"""The sub-commands of scripts/benchmark.py, one module each, and the modules that they share."""

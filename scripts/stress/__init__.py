"""Stress tests: a fuzzer for the decoder and the server, a soak test that looks for leaks, attacks through a proxy."""

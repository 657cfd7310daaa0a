"""Stress tests: a fuzzer for the decoder and the server, and a soak test that looks for leaks."""

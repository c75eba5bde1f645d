"""The harness behind `tilewright bench` and `make demo`; benchmarks/ holds the definitions."""

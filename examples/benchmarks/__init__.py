"""The benchmark of gru_jax against other GRUs: `python -m examples.benchmarks`."""

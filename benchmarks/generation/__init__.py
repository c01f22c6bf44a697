"""The sections of `bench_generate`: models of equal size, caches that hold a context, and what a token costs."""

"""Measure models: perplexity of any causal language model, classical baselines, one-page reports with plots."""

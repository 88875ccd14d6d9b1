"""The student: a causal Transformer, a mixture of experts that grows, and the forms in which they are kept."""

"""Task embeddings, found by name: what gives every task its vector."""

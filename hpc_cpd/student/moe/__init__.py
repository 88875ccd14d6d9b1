"""The mixture of experts: gate, experts, the exchange between ranks, and its place under DeepSpeed."""

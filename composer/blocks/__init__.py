"""Expert blocks: the FFNs that a MoE layer mixes."""

"""Query encoders routed among owners' adapters: the layer, the router, the model that sentence-transformers loads."""

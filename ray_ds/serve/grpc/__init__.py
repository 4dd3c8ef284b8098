"""The model over gRPC: messages, and what answers them."""

"""The gRPC side: service, streams, replies, health. No model."""

"""Rollouts: generated, scored and stopped while they grow. Knows protocols, not grpc."""

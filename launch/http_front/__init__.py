"""The HTTP front: OpenAI-compatible completions, health and metrics in front of a `Service`."""

"""The contract of both sides: messages, tensor frames, topics, directions, replay arithmetic."""

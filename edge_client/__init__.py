"""What runs on the board: the client half in ONNX Runtime, the zeroth-order step, the agent."""

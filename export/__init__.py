"""Student folders in, ONNX graphs in model_repository out: traced, checked against PyTorch, published atomically."""

"""Tags of pictures, by a tagger in ONNX."""

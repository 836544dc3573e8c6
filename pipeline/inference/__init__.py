"""From images to stored probability maps, with torch or ONNX Runtime."""

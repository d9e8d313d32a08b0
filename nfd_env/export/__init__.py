"""A world for machines without this package: ONNX files, and a page that needs no server."""

"""The fused network for deployment: python -m repghost.export run=outputs/NAME format=onnx"""

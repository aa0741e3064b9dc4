"""What images show: python -m repghost.predict photos/ run=outputs/NAME, and `repghost.classify` from Python."""

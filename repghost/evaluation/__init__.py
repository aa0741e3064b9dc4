"""Accuracy of a network and of its fused form: what is counted, what is reported, and where it is written."""

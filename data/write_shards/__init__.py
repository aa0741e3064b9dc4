"""Images to shards: python -m data.write_shards FORMAT SRC... OUT"""

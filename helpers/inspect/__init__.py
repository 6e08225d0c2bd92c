"""What notebooks show: a prompt token by token, memory estimates, the preflight table, run receipts.

All four notebooks use it. Read `xray` first: it shows what the model reads.
"""
